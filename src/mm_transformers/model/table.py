"""Columns of numbers and categories: their config, the reader of their cells, and their encoder."""

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any, Optional

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.utils import logging

from .label_cells import shorten, shorten_value
from .limits import limits, named
from .number_bins import CentredShares
from .own_encoders import OwnEncoder
from .table_kinds import COLUMNS, ONE_HOTS, TableColumn, TableError, column_of


logger = logging.get_logger(__name__)

# Keys of a row with another meaning.
RESERVED = ("text", "image", "video", "audio", "table")
# A number that is further from the mean, in standard deviations, counts as this.
FURTHEST = 100.0
# The largest number of one-hot features of a linear model, of all columns together.
_ALL_ONE_HOTS = 4096
_MISSING, _UNKNOWN = -1, 0


@strict
class TableConfig(PreTrainedConfig):
    r"""
    The columns of numbers and categories that a model reads, and the sizes of their encoder.

    [`~mm_transformers.table_columns`] makes it from training rows.

    Args:
        columns (`list[dict]`):
            One dict per column: `{"name": "price", "kind": "number", "mean": 3.1, "std": 0.7}` with the mean and the
            standard deviation over the training rows, and optionally `"bins": [1.0, 3.0, 9.0]`, the edges of bins for
            piecewise-linear numbers (https://arxiv.org/abs/2203.05556); `{"name": "sold", "kind": "date", "format": "",
            ...}` with the same of days since 1970 and the format of texts (ISO 8601 by default); or `{"name": "brand",
            "kind": "category", "values": ["acme"]}` with the known values, the most frequent first. All other values
            count as one, the unknown one.
        hidden_size (`int`, *optional*, defaults to 64): The width of the tokens; there is one per column.
        num_hidden_layers (`int`, *optional*, defaults to 0):
            Self-attention layers between the columns of a row, as in FT-Transformer (https://arxiv.org/abs/2106.11959).
        num_attention_heads (`int`, *optional*, defaults to 4): Of these layers.
        dropout (`float`, *optional*, defaults to 0.1): Of these layers.

    Raises:
        ValueError: one sentence, if a column is not as above, two have one name, or there are more than
            [`~mm_transformers.set_limits`] allows.

    Example:

    ```python
    >>> table = TableConfig(
    ...     columns=[
    ...         {"name": "price", "kind": "number", "mean": 3.0, "std": 2.0},
    ...         {"name": "brand", "kind": "category", "values": ["acme", "other"]},
    ...     ]
    ... )
    >>> table.names
    ['price', 'brand']
    ```
    """

    model_type = "mm_table"

    columns: list | None = None
    hidden_size: int = 64
    num_hidden_layers: int = 0
    num_attention_heads: int = 4
    dropout: float | int = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        self.columns = [_checked_column(column, i) for i, column in enumerate(self.columns or [])]
        if len(self.columns) > limits().table_columns:
            raise ValueError(f"The table has {len(self.columns):,} columns, more than {named('table_columns')}.")
        seen = set()
        for name in self.names:
            if name in seen:
                raise ValueError(f"The table has two columns {name!r}.")
            seen.add(name)
        sizes = (self.hidden_size, self.num_attention_heads)
        if min(sizes) < 1 or self.num_hidden_layers < 0 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) of the table must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), and num_hidden_layers ({self.num_hidden_layers}) at least 0."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout of the table must be at least 0 and less than 1, but is {self.dropout}.")
        super().__post_init__(**kwargs)

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [column["name"] for column in self.columns or []]

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """The columns that the model reads as numbers."""
        return [column for column in self.columns or [] if COLUMNS[column["kind"]].is_number]

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The columns that the model reads as categories."""
        return [column for column in self.columns or [] if not COLUMNS[column["kind"]].is_number]

    @property
    def token_names(self) -> list[str]:
        """The columns in the order of the tokens of the encoder: numbers, then categories."""
        return [column["name"] for column in (*self.numbers, *self.categories)]

    @property
    def num_bins(self) -> list[int]:
        """The number of bins of each column of numbers; 0 without bins."""
        return [max(len(column.get("bins", ())) - 1, 0) for column in self.numbers]

    @property
    def one_hots(self) -> list[tuple[int, int]]:
        """The one-hot features of a linear model: number of the category column, id of the value."""
        most = min(ONE_HOTS, max(1, _ALL_ONE_HOTS // max(len(self.categories), 1)))
        return [
            (place, value)
            for place, column in enumerate(self.categories)
            for value in range(1, 1 + min(most, len(column["values"])))
        ]


def _checked_column(column: Any, place: int) -> dict[str, Any]:
    where = f"Column {place} of the table"
    if not isinstance(column, Mapping) or not isinstance(column.get("name"), str) or not column["name"]:
        raise ValueError(f"{where} must be a dict with a name and a kind, but is {shorten_value(column)}.")
    where = f"Column {shorten(column['name'])!r} of the table"
    if column["name"] in RESERVED:
        raise ValueError(f"{where} has the name of another input of the row; rename it.")
    if column.get("kind") not in COLUMNS:
        kinds = ", ".join(map(repr, COLUMNS))
        raise ValueError(f"{where} must have one of the kinds {kinds}, but has {column.get('kind')!r}.")
    kind = COLUMNS[column["kind"]]
    known = {"name", "kind", *kind.keys}
    if not known <= set(column) <= known | set(kind.optional_keys):
        raise ValueError(
            f"{where} must have {', '.join(sorted(known))}, but has {', '.join(sorted(map(str, column)))}; "
            "table_columns(rows, columns) finds them in the training rows."
        )
    return column_of(column).checked(where)


# Cells


def read_cell(column: TableColumn, cells: Mapping[str, Any]) -> Any:
    """
    The value of a column in a row.

    Raises:
        TableError: one sentence that names the column.
    """
    try:
        return column.read(cells.get(column.name))
    except ValueError as error:
        raise TableError(f"column {column.name!r}: {error}") from None


class TableReader:
    """
    Reads the cells of one row: column -> cell becomes numbers in the order of the tokens.

    The result is an array: the standardised numbers and their shares of bins, NaN if missing; then ids of values, -1 if
    missing and 0 if unknown. It is `None` if all are missing. The reader returns its own results unchanged.

    Args:
        config ([`TableConfig`]): The columns.

    Example:

    ```python
    >>> read = TableReader(TableConfig(columns=[{"name": "price", "kind": "number", "mean": 3.0, "std": 2.0}]))
    >>> read({"price": "7"})
    array([2.])
    ```
    """

    def __init__(self, config: TableConfig) -> None:
        self.numbers = [column_of(column) for column in config.numbers]
        self.shares = [CentredShares(column) for column in config.numbers]
        self.categories = [column_of(column) for column in config.categories]
        self.ids = [{value: i for i, value in enumerate(column["values"], 1)} for column in config.categories]
        self._warned: set[str] = set()
        self._columns = _kinds_and_columns(config)

    def fits(self, config: TableConfig) -> bool:
        """Whether it reads the columns of a config as they are now."""
        return self._columns == _kinds_and_columns(config)

    def __call__(self, cells: Any) -> Any:
        import numpy as np

        if isinstance(cells, np.ndarray):
            return cells
        if not isinstance(cells, Mapping):
            raise TableError(
                f"the columns of a row must be a dict from column to cell, but are {shorten_value(cells)} of type "
                f"{type(cells).__name__}"
            )
        numbers = [read_cell(column, cells) for column in self.numbers]
        ids = [self._id(column, ids, cells) for column, ids in zip(self.categories, self.ids, strict=True)]
        if all(number is None for number in numbers) and all(value == _MISSING for value in ids):
            return None
        found = [
            math.nan if number is None else self._standardised(column, number)
            for column, number in zip(self.numbers, numbers, strict=True)
        ]
        for shares, number in zip(self.shares, numbers, strict=True):
            found += shares(number)
        return np.array(found + ids, dtype=np.float64)

    def _id(self, column: TableColumn, ids: Mapping[str, int], cells: Mapping[str, Any]) -> int:
        value = read_cell(column, cells)
        return _MISSING if value is None else ids.get(value, _UNKNOWN)

    def _standardised(self, column: TableColumn, number: float) -> float:
        score = (number - column.config["mean"]) / column.config["std"]
        if abs(score) > FURTHEST and column.name not in self._warned:
            self._warned.add(column.name)
            logger.warning(
                f"Column {shorten(column.name)!r} has {number:.6g}, more than {FURTHEST:.0f} standard deviations from "
                f"the mean of the training rows ({column.config['mean']:.6g}). Such numbers count as "
                f"{FURTHEST:.0f} standard deviations; check the unit of the column."
            )
        return min(max(score, -FURTHEST), FURTHEST)


def _kinds_and_columns(config: TableConfig) -> list[tuple[type[TableColumn], dict[str, Any]]]:
    return [(COLUMNS[column["kind"]], dict(column)) for column in config.columns or []]


def as_rows(cell: Any) -> list[Any]:
    """The columns of a row as a list of at most one item."""
    return [] if cell is None or (isinstance(cell, (Mapping, list, tuple)) and not cell) else [cell]


def row_key(cell: Any) -> tuple[str, int]:
    """The columns of a row are an item of that row alone."""
    return "table", id(cell)


def _not_empty(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors with columns: an exported graph takes no empty ones."""
    return {name: value for name, value in tensors.items() if value.shape[1] > 0}


def _without_nan(numbers: torch.Tensor) -> torch.Tensor:
    return torch.where(numbers.isnan(), 0.0, numbers)


class TableEncoder(OwnEncoder):
    """
    One token per column: the feature tokenizer of FT-Transformer (https://arxiv.org/abs/2106.11959).

    The token of a number is a vector times the number, plus one vector per bin times its share, plus another vector.
    That of a category is the vector of its value plus one of the column. Missing cells are masked. The vector of an
    unknown value is 0 at the start.
    """

    config_class = TableConfig
    scales_linear_features = False

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        if not config.columns:
            raise ValueError("table_config has no columns; table_columns(rows, columns) makes one from training rows.")
        width, sizes = config.hidden_size, [len(column["values"]) + 1 for column in config.categories]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.one_hots = config.one_hots
        if config.numbers:
            self.number_weight = nn.Parameter(torch.zeros(len(config.numbers), width))
            self.number_bias = nn.Parameter(torch.zeros(len(config.numbers), width))
        # For each column of numbers, the places of its shares of bins among those of all; padded with a place beyond.
        most, total = max(config.num_bins, default=0), sum(config.num_bins)
        places = iter(range(total))
        self.bins = [[*islice(places, bins), *[total] * (most - bins)] for bins in config.num_bins]
        if total:
            self.bin_weight = nn.Parameter(torch.zeros(len(config.numbers), most, width))
        if sizes:
            self.value_weight = nn.Parameter(torch.zeros(sum(sizes), width))
            self.category_bias = nn.Parameter(torch.zeros(len(sizes), width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config.num_attention_heads,
                4 * width,
                config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_hidden_layers)
        )

    def init_own_parameters(self, std: float) -> None:
        bound = self.config.hidden_size**-0.5
        for parameter in self.parameters(recurse=False):
            init.uniform_(parameter, -bound, bound)
        if self.offsets:
            with torch.no_grad():
                self.value_weight[self.offsets] = 0.0

    @classmethod
    def prepare(cls, config: TableConfig, items: list[Any]) -> dict[str, torch.Tensor]:
        import numpy as np

        sizes = len(config.numbers), sum(config.num_bins), len(config.categories)
        numbers, bins, categories = torch.from_numpy(np.stack(items)).split(sizes, 1)
        return _not_empty(table_numbers=numbers.float(), table_bins=bins.float(), table_categories=categories.long())

    @classmethod
    def blank_input(cls, config: TableConfig) -> dict[str, torch.Tensor]:
        numbers, categories = len(config.numbers), len(config.categories)
        return _not_empty(
            table_numbers=torch.full((1, numbers), math.nan),
            table_bins=torch.full((1, sum(config.num_bins)), math.nan),
            table_categories=torch.full((1, categories), _MISSING),
        )

    @classmethod
    def linear_width(cls, config: TableConfig) -> int:
        return len(config.numbers) + sum(config.num_bins) + len(config.one_hots)

    @classmethod
    def linear_tokens(cls, config: TableConfig) -> list[int]:
        count = len(config.numbers)
        of_bins = [place for place, bins in enumerate(config.num_bins) for _ in range(bins)]
        return [*range(count), *of_bins, *(count + place for place, _ in config.one_hots)]

    @classmethod
    def neutral(cls, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Means instead of numbers, unknown values instead of categories; missing cells stay missing."""
        return {
            name: torch.where(value.isnan(), value, 0.0) if value.is_floating_point() else value.clamp(max=_UNKNOWN)
            for name, value in inputs.items()
        }

    def forward(  # type: ignore[override]
        self,
        table_numbers: Optional[torch.Tensor] = None,
        table_bins: Optional[torch.Tensor] = None,
        table_categories: Optional[torch.Tensor] = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The tokens of the columns, and which of them hold something.

        Args:
            table_numbers (num_tables, num_numbers) float32: standardised; NaN where missing. `None` without such
                columns, and likewise:
            table_bins (num_tables, num_bins) float32: the shares of the bins of all columns, minus those of the mean of
                the column; NaN where missing.
            table_categories (num_tables, num_categories) int64: -1 where missing, 0 for an unknown value.
        """
        tokens, masks = [], []
        for name, one, given, expected in (
            ("numbers", "column of numbers", table_numbers, len(self.config.numbers)),
            ("bins", "bin of the columns of numbers", table_bins, sum(self.config.num_bins)),
            ("categories", "column of categories", table_categories, len(self.config.categories)),
        ):
            count = 0 if given is None else given.shape[1]
            if count != expected:
                raise ValueError(f"table_{name} must have {expected} columns, one per {one}, but has {count}.")
        if table_numbers is not None:
            known = _without_nan(table_numbers).to(self.dtype)
            of_numbers = known[..., None] * self.number_weight + self.number_bias
            if table_bins is not None:
                shares = nn.functional.pad(_without_nan(table_bins).to(self.dtype), (0, 1))
                shares = shares[:, torch.tensor(self.bins, device=shares.device)]
                of_numbers = of_numbers + torch.einsum("ncb,cbw->ncw", shares, self.bin_weight)
            tokens.append(of_numbers)
            masks.append(~table_numbers.isnan())
        if table_categories is not None:
            ids = table_categories.clamp(min=_UNKNOWN) + torch.tensor(self.offsets, device=table_categories.device)
            tokens.append(nn.functional.embedding(ids, self.value_weight) + self.category_bias)
            masks.append(table_categories != _MISSING)
        states, mask = torch.cat(tokens, 1), torch.cat(masks, 1)
        # Attention without any key is NaN; such an item is masked later.
        hidden = ~mask & mask.any(1, keepdim=True)
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=hidden)
        return states, mask

    def linear_features(  # type: ignore[override]
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        table_numbers: Optional[torch.Tensor] = None,
        table_bins: Optional[torch.Tensor] = None,
        table_categories: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """
        The standardised numbers and their shares of bins, 0 if missing; and a one-hot of each category, 0 if missing or
        unknown.
        """
        features = [_without_nan(x).float() for x in (table_numbers, table_bins) if x is not None]
        if table_categories is not None:
            places, values = torch.tensor(self.one_hots, device=table_categories.device).unbind(1)
            features.append((table_categories[:, places] == values).float())
        return torch.cat(features, 1)


__all__ = ["TableConfig"]
