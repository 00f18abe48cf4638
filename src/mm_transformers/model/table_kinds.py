"""The kinds of the columns of a table: what a cell may be, what training rows tell, and how it is saved."""

import math
import numbers
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional

from .dates import FORMATS, date_format, read_date
from .label_cells import NO_NUMBER, NUMBER, as_scalar, is_finite_number, is_null, shorten, shorten_value
from .limits import limits, named
from .number_bins import checked_bins, find_bins
from .registry import registered


# The largest number of one-hot features of a linear model of one column.
ONE_HOTS = 256


class TableError(ValueError):
    """A cell of a table that cannot be read."""


class TableColumn(ABC):
    """
    One column of a table, and the base class of the kinds of columns.

    A kind is a subclass with a `kind`, decorated with [`register_column`]. Its columns are either numbers, which the
    model reads standardised, or categories, which the model reads as entries of an embedding.

    Args:
        config (`dict`): `{"name": ..., "kind": ...}` and the keys that [`TableColumn.learned`] adds. The config of a
            number has `mean` and `std`, that of a category `values`.

    Raises:
        ValueError: when checked, one sentence.

    Example:

    ```python
    >>> import math

    >>> @register_column
    ... class LogNumber(NumberColumn):
    ...     kind = "log_number"
    ...
    ...     def read(self, cell):
    ...         number = super().read(cell)
    ...         return None if number is None else math.log1p(number)
    ...
    ...     def example(self):  # a cell, not its logarithm
    ...         return round(math.expm1(self.config["mean"]), 2)

    >>> table_columns([{"price": 0}, {"price": 99}], {"price": "log_number"}).columns[0]["kind"]
    'log_number'
    ```
    """

    kind: ClassVar[str] = ""
    is_number: ClassVar[bool] = True
    # The keys of `config` beside name and kind.
    keys: ClassVar[tuple[str, ...]] = ()
    # Those that may be left out.
    optional_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.name: str = config["name"]

    @abstractmethod
    def read(self, cell: Any) -> Any:
        """
        The value of a cell: a `float` of a number, a `str` of a category; `None` if the cell is empty.

        Raises:
            ValueError: one sentence without a full stop, if the cell is of another type.
        """

    def prepare(self, cells: Sequence[Any]) -> dict[str, Any]:
        """
        What must be known before cells can be read, such as the format of dates.

        Args:
            cells: of the training rows.
        """
        return {}

    @abstractmethod
    def learned(self, values: Sequence[Any]) -> dict[str, Any]:
        """
        What the training rows tell about the column: a JSON dict.

        Args:
            values: of the training rows, without missing ones; at least one.

        Raises:
            ValueError: one sentence, if the column cannot be of this kind.
        """

    @abstractmethod
    def checked(self, where: str) -> dict[str, Any]:
        """
        The config, checked: it may come from a stranger.

        Args:
            where: the name of the column in messages.

        Raises:
            ValueError: one sentence.
        """

    @abstractmethod
    def example(self) -> Any:
        """A typical cell, for the example of a model card; a kind whose [`read`] changes numbers overrides it."""

    def choices(self) -> Optional[list[str]]:
        """The known values, for the field of a page; `None` if the column takes any value."""
        return None


COLUMNS: dict[str, type[TableColumn]] = {}


def register_column(cls: type[TableColumn]) -> type[TableColumn]:
    """
    Class decorator that makes a kind of columns known; see [`TableColumn`].

    Raises:
        ValueError: if the class has no `kind`, or another class has the same one.

    Example:

    ```python
    >>> @register_column
    ... class Percent(NumberColumn):
    ...     kind = "percent"
    ...
    ...     def read(self, cell):
    ...         return super().read(cell.rstrip("%") if isinstance(cell, str) else cell)
    ```
    """
    return registered(COLUMNS, "kind of columns")(cls)


def column_of(config: Mapping[str, Any]) -> TableColumn:
    """The column of a config."""
    return COLUMNS[config["kind"]](config)


@register_column
class NumberColumn(TableColumn):
    """
    A column of numbers; see [`read_number`].

    Example:

    ```python
    >>> NumberColumn({"name": "price", "kind": "number"}).learned([2.0, 4.0])
    {'mean': 3.0, 'std': 1.0}
    ```
    """

    kind = "number"
    keys: ClassVar[tuple[str, ...]] = ("mean", "std")
    optional_keys = ("bins",)

    def read(self, cell: Any) -> Optional[float]:
        return read_number(cell)

    def learned(self, values: Sequence[float]) -> dict[str, Any]:
        """The mean, the standard deviation (1 if all values are equal), and the edges of bins if there are some."""
        # Scaled first, since the square of a large number is not finite.
        largest = max(map(abs, values)) or 1.0
        scaled = [value / largest for value in values]
        mean = math.fsum(scaled) / len(scaled)
        variance = math.fsum((value - mean) ** 2 for value in scaled) / len(scaled)
        # Equal values may differ from their mean by rounding.
        std = math.sqrt(variance) * largest if len(set(values)) > 1 else 0.0
        found = {"mean": mean * largest, "std": std if std > 0 and math.isfinite(std) else 1.0}
        bins = find_bins(values)
        return {**found, "bins": bins} if bins else found

    def checked(self, where: str) -> dict[str, Any]:
        mean, std = self.config["mean"], self.config["std"]
        if not (is_finite_number(mean) and is_finite_number(std) and std > 0):
            both = f"{shorten_value(mean)} and {shorten_value(std)}"
            raise ValueError(f"{where} must have a finite mean and a std above 0, but has {both}.")
        found = {**self.config, "mean": float(mean), "std": float(std)}
        return {**found, "bins": checked_bins(self.config["bins"], where)} if "bins" in self.config else found

    def example(self) -> Any:
        return float(f"{self.config['mean']:.3g}")


@register_column
class DateColumn(NumberColumn):
    """A column of dates, which are numbers of days; see [`read_date`]."""

    kind = "date"
    keys = ("mean", "std", "format")

    def read(self, cell: Any) -> Optional[float]:
        return read_date(cell, self.config["format"])

    def prepare(self, cells: Sequence[Any]) -> dict[str, Any]:
        return {"format": date_format(cells) or ""}

    def learned(self, values: Sequence[float]) -> dict[str, Any]:
        return {"format": self.config["format"], **super().learned(values)}

    def checked(self, where: str) -> dict[str, Any]:
        if self.config["format"] not in FORMATS:
            raise ValueError(f"{where} must have one of the formats {', '.join(map(repr, FORMATS))}.")
        return super().checked(where)

    def example(self) -> Any:
        import datetime

        days = min(max(self.config["mean"], -500_000), 500_000)
        return (datetime.datetime(1970, 1, 1) + datetime.timedelta(days=days)).strftime(
            self.config["format"] or "%Y-%m-%d"
        )


@register_column
class CategoryColumn(TableColumn):
    """A column of categories; see [`read_category`]. All values that are not known count as one."""

    kind = "category"
    is_number = False
    keys = ("values",)

    def read(self, cell: Any) -> Optional[str]:
        return read_category(cell)

    def learned(self, values: Sequence[str]) -> dict[str, Any]:
        """The known values, the most frequent first."""
        counts = Counter(values)
        most = limits().category_values
        if len(counts) > most:
            raise ValueError(
                f"Column {shorten(self.name)!r} has {len(counts):,} different values, too many for a category "
                f"({named('category_values')}); leave it out, or use it as a text."
            )
        return {"values": sorted(counts, key=lambda value: (-counts[value], value))}

    def checked(self, where: str) -> dict[str, Any]:
        values = self.config["values"]
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) and value for value in values):
            raise ValueError(f"{where} must have values that are a list of texts.")
        if len(set(values)) < len(values):
            raise ValueError(f"{where} lists a value twice.")
        if len(values) > limits().category_values:
            raise ValueError(f"{where} has {len(values):,} values, more than {named('category_values')}.")
        return {**self.config, "values": list(values)}

    def example(self) -> Any:
        return self.config["values"][0] if self.config["values"] else ""

    def choices(self) -> list[str]:
        return list(self.config["values"])


def read_number(cell: Any) -> Optional[float]:
    """
    The number in a cell; `None` if the cell is empty.

    Args:
        cell: an `int`, a `float`, a scalar of NumPy, or a text such as "3.5".

    Raises:
        TableError: one sentence without a full stop, if it is no finite number.

    Example:

    ```python
    >>> read_number(" 3.5 ")
    3.5
    ```
    """
    cell = as_scalar(cell)
    if is_null(cell):
        return None
    if isinstance(cell, str):
        text = cell.strip()
        if not text or text.lower() in NO_NUMBER:
            return None
        if not NUMBER.fullmatch(text) or len(text) > 400:
            raise TableError(f"{shorten(cell)!r} is no number")
        cell = float(text)
    if not isinstance(cell, numbers.Real):
        raise TableError(f"expected a number, but got {shorten_value(cell)} of type {type(cell).__name__}")
    try:
        number = float(cell)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise TableError(f"{shorten_value(cell)} is not finite; leave the cell empty if it is not known")
    return number


def read_category(cell: Any) -> Optional[str]:
    """
    The value in a cell of a category, as a text; `None` if the cell is empty.

    Args:
        cell: a text, a whole number (3 and 3.0 are the value "3"), or a truth value.

    Raises:
        TableError: one sentence without a full stop, if it is of another type.

    Example:

    ```python
    >>> read_category(3.0)
    '3'
    ```
    """
    cell = as_scalar(cell)
    if is_null(cell):
        return None
    if isinstance(cell, str):
        return cell.strip() or None
    if isinstance(cell, (bool, int)):
        return str(cell)
    if is_finite_number(cell):
        number = float(cell)
        return str(int(number)) if number.is_integer() else repr(number)
    raise TableError(f"expected a text or a whole number, but got {shorten_value(cell)} of type {type(cell).__name__}")
