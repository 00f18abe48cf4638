"""Links in the folder of a training. They must not lead uploads or written files to other places."""

import json
import os
from pathlib import Path

from transformers.utils import logging

from ...model.safe_writing import drop_link, leads_outside, write_atomically


logger = logging.get_logger(__name__)


def check_links(output_dir: str | os.PathLike[str]) -> None:
    """
    Checks the links in the folder.

    Raises:
        ValueError: if a link in the folder would upload a file from elsewhere.
    """
    folder = Path(output_dir)
    for path in folder.rglob("*"):
        if path.is_symlink() and leads_outside(path, folder):
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, so a push would upload a file from outside of the folder: "
                "remove the link."
            )


def prepare_push(checkpoint: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> None:
    """Copies the model code, which the Trainer leaves out when it copies a checkpoint into the folder to push."""
    for code in Path(checkpoint).glob("*.py"):
        with write_atomically(Path(output_dir, code.name)) as copy:
            copy.write(code.read_bytes())
    for file in os.listdir(checkpoint):
        drop_link(os.path.join(output_dir, file))


def make_room_for_metrics(path: Path) -> None:
    """Removes a link; renames a file that holds no metrics."""
    drop_link(path)
    if path.is_file():
        try:
            if isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                return
        except (ValueError, RecursionError):
            pass
        kept = path.with_name(f"{path.name}.damaged")
        logger.warning(f"{path} holds no metrics in JSON; it is renamed to {kept.name}, and a new file is written.")
        path.replace(kept)
