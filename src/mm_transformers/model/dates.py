"""Dates as numbers: days since the beginning of 1970."""

import datetime
from collections.abc import Iterable
from typing import Any, Optional

from .label_cells import as_scalar, is_null, shorten, shorten_value


# "" is ISO 8601. Where day and month are written by numbers alone and both orders fit, the month comes first.
FORMATS = (
    "", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%d-%m-%Y", "%b %d %Y", "%d %b %Y", "%d-%b-%Y", "%B %d, %Y",
    "%d %B %Y", "%m/%d/%y", "%d/%m/%y",
)  # fmt: skip
_EPOCH = datetime.datetime(1970, 1, 1)
_LONGEST = 40


class DateError(ValueError):
    """A cell that is no date."""


def read_date(cell: Any, format: str = "") -> Optional[float]:
    """
    The days between the beginning of 1970 and a date; `None` if the cell is empty.

    Args:
        cell: a `datetime.date` or `datetime.datetime`, a scalar of NumPy, or a text. Time zones are taken into account.
        format (`str`, *optional*, defaults to `""`): Of texts, as in `datetime.strptime`; ISO 8601 by default.

    Raises:
        DateError: one sentence without a full stop, if it is no date.

    Example:

    ```python
    >>> read_date("1970-01-02 12:00")
    1.5
    ```
    """
    cell = as_scalar(cell)
    if is_null(cell):
        return None
    if isinstance(cell, str):
        text = cell.strip()
        if not text:
            return None
        cell = _parsed(text, format)
    if isinstance(cell, datetime.datetime):
        if cell.tzinfo is not None:
            cell = cell.astimezone(datetime.timezone.utc).replace(tzinfo=None)
        return (cell - _EPOCH).total_seconds() / 86_400
    if isinstance(cell, datetime.date):
        return float((cell - _EPOCH.date()).days)
    raise DateError(f"expected a date, but got {shorten_value(cell)} of type {type(cell).__name__}")


def _parsed(text: str, format: str) -> datetime.datetime:
    if len(text) <= _LONGEST:
        try:
            if format:
                return datetime.datetime.strptime(text, format)
            return datetime.datetime.fromisoformat(text.replace("Z", "+00:00") if text.endswith("Z") else text)
        except (ValueError, OverflowError):
            pass
    raise DateError(f"{shorten(text)!r} is no date" + (f" of the format {format}" if format else ""))


def date_format(cells: Iterable[Any]) -> Optional[str]:
    """
    The first format in which all texts are dates; `None` if there is none.

    Example:

    ```python
    >>> date_format(["24.12.2025", "01.02.2026"])
    '%d.%m.%Y'
    ```
    """
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    return next((format for format in FORMATS if all(_fits(text, format) for text in texts)), None)


def _fits(text: str, format: str) -> bool:
    # Whole numbers such as 20250101, which newer versions of Python take for dates, are numbers.
    if text.strip().isdigit():
        return False
    try:
        read_date(text, format)
        return True
    except DateError:
        return False
