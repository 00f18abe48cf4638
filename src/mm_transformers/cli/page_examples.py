"""The example rows of the demo page."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.cells import absolute_paths
from ..data.tables import TableRows
from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.images import load_image
from ..model.label_cells import is_null
from ..model.modalities import PARTS
from ..model.processing_mm_transformer import MMTransformerProcessor
from .page_fields import column_fields, media_fields


_NUM_EXAMPLES = 6
_MOST_ROWS = 1_000  # of a table, in which complete rows are looked for
_SIZE = 256  # pixels; the 64 pixels of the demo are too few for viewers


def table_examples(table: Path, model: str, folder: Path) -> list[list[Any]]:
    """
    The first complete rows of a table; the first rows with any content if none is complete.

    Args:
        table: CSV, JSON lines or Parquet, with the columns of the training table.
        model: folder or Hub id; its fields are those of the page.
        folder: gets the pictures as files.

    Returns:
        For each row the values of the fields, in their order on the page.

    Raises:
        ValueError: one sentence, if the table cannot be read, or has none of the columns.
    """
    config, processor = MMTransformerConfig.from_pretrained(model), MMTransformerProcessor.from_pretrained(model)
    names = [*media_fields(config), *(field.name for field in column_fields(config))]
    rows = list(itertools.islice(_rows_with_content(table, processor, names), _MOST_ROWS))
    if not rows:
        raise ValueError(f"{table} has no content in {', '.join(map(repr, names))}, so there are no examples.")
    complete = [row for row in rows if all(name in row for name in names)]
    chosen = (complete or rows)[:_NUM_EXAMPLES]
    return [
        [_field(row.get(name), name, folder / f"{number}-{name}") for name in names]
        for number, row in enumerate(chosen)
    ]


def _rows_with_content(table: Path, processor: MMTransformerProcessor, names: list[str]) -> Iterator[dict[str, Any]]:
    root = str(table.absolute().parent)
    for row in TableRows(table):
        keys = processor.with_keys(row)
        found = {name: keys[name] for name in names if not is_null(keys.get(name)) and keys[name] not in ("", [])}
        for name in found.keys() & PARTS.keys():
            items = PARTS[name].items(absolute_paths(found.pop(name), root))
            if items:
                found[name] = items[0]  # the page has one field for it
        if found:
            yield found


def _field(cell: Any, name: str, file: Path) -> Any:
    """The value of a field; pictures become files."""
    if cell is None or name != "image":
        return cell if isinstance(cell, (str, int, float)) else None
    path = file.with_suffix(".png")
    load_image(cell).save(path)
    return str(path)


def demo_examples(folder: Path, num_texts: int = 3) -> list[list[str]]:
    """
    Rows of the test split of the embedded data set, for the demo model: texts, each with two pictures.

    The two pictures give the text different sentiments. They become files in `folder`.
    """
    from ..data.embedded.dataset import GRID, load_demo_dataset

    by_text: dict[str, dict[str, Any]] = {}
    for row in load_demo_dataset(1, 1, len(GRID), image_size=_SIZE)["test"]:
        by_text.setdefault(row["text"], {}).setdefault(row["sentiment"], row["image"])
    examples: list[list[str]] = []
    for text, pictures in [(text, found) for text, found in by_text.items() if len(found) > 1][:num_texts]:
        for picture in list(pictures.values())[:2]:
            examples.append([text, str(folder / f"{len(examples)}.png")])
            picture.save(examples[-1][1])
    return examples
