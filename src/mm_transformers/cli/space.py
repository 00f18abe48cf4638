"""A folder that the Hub runs as a Space: the page of a model, from [`load_page`]."""

import json
import os
import re
from pathlib import Path

from .. import __version__
from ..model.safe_writing import write_atomically


_APP = '''"""The demo page of {model}."""

from mm_transformers.cli.page import launch_options, load_page


demo = load_page({model!r})

if __name__ == "__main__":
    demo.launch(**launch_options())
'''

_README = """---
title: {title}
sdk: gradio
app_file: app.py
models:
- {model}
---

The demo page of [{model}](https://huggingface.co/{model}), made by mm_transformers.
"""


def write_space(folder: Path, model: str) -> list[Path]:
    """
    Writes `app.py`, `requirements.txt` and `README.md`; existing files stay. `hf upload me/my-space folder .
    --repo-type space` pushes them.

    Args:
        model: Hub id of the model, which the Space loads when it starts.

    Returns:
        The files that were written.

    Raises:
        ValueError: if `model` is no Hub id; a Space cannot load a local folder.

    Example:

    ```python
    >>> write_space(Path("space"), "me/my-model")
    [PosixPath('space/app.py'), PosixPath('space/requirements.txt'), PosixPath('space/README.md')]
    ```
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or Path(model).exists():
        raise ValueError(f"A Space loads its model from the Hub, so give its id, such as 'me/my-model', not {model!r}.")
    title = re.sub(r"[^\w .-]", " ", model.rpartition("/")[2])
    contents = {
        "app.py": _APP.format(model=model),
        "requirements.txt": f"mm-transformers[demo]=={__version__}\n",
        "README.md": _README.format(model=model, title=json.dumps(title)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in contents.items():
        if not os.path.lexists(folder / name):  # nor through a link
            with write_atomically(folder / name) as file:
                file.write(content.encode())
            written.append(folder / name)
    return written
