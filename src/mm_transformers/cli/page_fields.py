"""The fields of the demo page: texts and files, numbers and categories."""

from dataclasses import dataclass
from typing import Any, Optional

from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.label_cells import shorten
from ..model.modalities import PARTS
from ..model.table_kinds import column_of


# Values of a category in the list of the field. The browser receives all of them; others can be typed.
_MOST_CHOICES = 1_000
# Characters of a typed value.
_MOST_CHARACTERS = 1_000
# With more columns, their fields are folded.
MOST_OPEN = 12


@dataclass
class ColumnField:
    """
    A field for one column.

    Args:
        name: of the column.
        example: a typical cell.
        choices: the known values; `None` if any value is known.
    """

    name: str
    example: Any
    choices: Optional[list[str]] = None

    def component(self) -> Any:
        """The component of gradio, empty."""
        import gradio as gr

        label = shorten(self.name)
        if self.choices is not None:
            shown, is_cut = self.choices[:_MOST_CHOICES], len(self.choices) > _MOST_CHOICES
            return gr.Dropdown(["", *shown], value="", label=label, allow_custom_value=is_cut)
        placeholder = f"for example {shorten(str(self.example))}"
        if isinstance(self.example, (int, float)):
            return gr.Number(value=None, label=label, placeholder=placeholder)
        return gr.Textbox(label=label, placeholder=placeholder)

    def cell(self, given: Any) -> Any:
        """
        The value that a client sent; `None` for an empty field.

        Raises:
            ValueError: one sentence, if it is neither a number nor a short text.
        """
        if given is None or given == "":
            return None
        if isinstance(given, bool) or not isinstance(given, (int, float, str)):
            raise ValueError(f"Column {shorten(self.name)!r}: give a number or a text, or leave the field empty.")
        if isinstance(given, str) and len(given) > _MOST_CHARACTERS:
            raise ValueError(
                f"Column {shorten(self.name)!r}: the value has {len(given):,} characters, and may have "
                f"{_MOST_CHARACTERS:,}."
            )
        return given


def media_fields(config: MMTransformerConfig) -> list[str]:
    """The fields for text, pictures and sound, in their order on the page; each is a key of a row."""
    # A page has no field for the frames of a video, and for modalities of a user's own.
    files = [
        name
        for name, part in PARTS.items()
        if part.encoder.name in config.modalities and not part.is_sequence and part.encoder.own is None
    ]
    return [*(["text"] if config.reads_text else []), *files]


def column_fields(config: MMTransformerConfig) -> list[ColumnField]:
    """One field per column of numbers and categories that the model reads."""
    if config.table_config is None:
        return []
    columns = map(column_of, config.table_config.columns or [])
    return [ColumnField(column.name, column.example(), column.choices()) for column in columns]
