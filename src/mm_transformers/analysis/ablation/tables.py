"""Tables that fit a screen."""

from collections.abc import Sequence
from typing import NamedTuple

from ...data.markdown import plain_markdown


class Table(NamedTuple):
    """
    The cells of a table.

    Args:
        header, rows: cells, the same number in each.
        num_keys: the number of first columns that identify a row.
    """

    header: list[str]
    rows: list[list[str]]
    num_keys: int


def as_markdown(table: Table, width: int) -> str:
    """
    The table in Markdown, with columns that also line up as plain text.

    A table of more than `width` characters is split. Each part has the key columns, and as many other columns as fit.
    """
    lines = [[plain_markdown(cell) for cell in line] for line in (table.header, *table.rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(table.header))]
    keys, parts = list(range(table.num_keys)), []
    chosen = list(keys)
    for column in range(table.num_keys, len(table.header)):
        if len(chosen) > len(keys) and _line_width(widths, [*chosen, column]) > width:
            parts.append(chosen)
            chosen = list(keys)
        chosen.append(column)
    return "\n\n".join(_markdown(lines, widths, columns, table.num_keys) for columns in [*parts, chosen])


def _line_width(widths: Sequence[int], columns: Sequence[int]) -> int:
    return sum(widths[column] + 3 for column in columns) + 1


def _markdown(lines: Sequence[Sequence[str]], widths: Sequence[int], columns: Sequence[int], num_keys: int) -> str:
    shown = []
    for line in lines:
        cells = [line[c].ljust(widths[c]) if c < num_keys else line[c].rjust(widths[c]) for c in columns]
        shown.append(f"| {' | '.join(cells)} |")
    rule = ["-" * widths[c] if c < num_keys else "-" * (widths[c] - 1) + ":" for c in columns]
    return "\n".join([shown[0], f"| {' | '.join(rule)} |", *shown[1:]])
