"""An example row for a model, which the page of the API shows: it can be sent as it is."""

import base64
import io
import wave
from typing import Any

from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.modalities import PARTS
from ...model.table_kinds import column_of


_SIDE = 32  # pixels
_RATE, _SECONDS = 8_000, 0.25


def example_row(config: MMTransformerConfig) -> dict[str, Any]:
    """
    A row with a text, a picture, a sound and columns, as far as the model reads them.

    Example:

    ```python
    >>> example_row(model.config)["text"]
    'Lovely weather!'
    ```
    """
    row: dict[str, Any] = {"text": "Lovely weather!"} if config.reads_text else {}
    made = {"image": _picture, "audio": _sound}
    for name, part in PARTS.items():
        if name in made and part.encoder.name in config.modalities:
            row[name] = base64.b64encode(made[name]()).decode()
    columns = map(column_of, config.table_config.columns or []) if config.table_config is not None else ()
    return {**row, **{column.name: column.example() for column in columns}}


def _picture() -> bytes:
    """A small grey PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), (153, 153, 153)).save(buffer, "PNG")
    return buffer.getvalue()


def _sound() -> bytes:
    """A quarter of a second of a deep tone."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(_RATE)
        file.writeframes(bytes(160 if i // 40 % 2 else 96 for i in range(int(_RATE * _SECONDS))))
    return buffer.getvalue()
