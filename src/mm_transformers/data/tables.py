"""Reads and writes tables of any size, row by row: CSV, JSON lines, Parquet."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet

from ..model.limits import limits, named
from ..model.messages import one_line, shortened
from .formulas import without_formula
from .parquet_sizes import MOST_COMPRESSED, check_columns, num_bytes


SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
# The number of rows that are read, or written, at a time.
CHUNK_SIZE = 1024
_FEW_ROWS = 16  # at a time, where one may be large
_LARGE_PART = 2**25  # bytes of as many rows; larger parts become Python objects row by row


class _Part(NamedTuple):
    """
    A few rows of a table, as they are read.

    Args:
        rows ([`pyarrow.RecordBatch`]): A few rows.
        size: their bytes as Python objects, about.
    """

    rows: Any
    size: int


def check_suffix(path: Path, others: Sequence[str] = ()) -> str:
    """
    Checks that the name ends like a known kind of table, or in one of `others`.

    Raises:
        ValueError: if it does not.
    """
    if path.suffix not in (*SUFFIXES, *others):
        raise ValueError(f"{path} must end in one of {', '.join((*SUFFIXES, *others))}.")
    return path.suffix


class TableRows:
    """
    The rows of a file, as dicts that all have the columns of `schema`. Each iteration reads the file again, in parts.

    Cells of CSV are texts as written, so 007 stays 007; an empty cell is `None`. CSV and JSON lines are read once
    beforehand, to find their columns and unreadable rows.

    Args:
        path: CSV, JSON lines or Parquet; a .json file may also hold one list of objects, which is read at once.

    Raises:
        ValueError: if the file does not exist or has no rows, or one sentence that names an unreadable row.
    """

    def __init__(self, path: Path):
        suffix = check_suffix(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist.")
        self.path = path
        # Columns of JSON with texts, numbers and truth values: all become texts, as they are written.
        self._as_texts: set[str] = set()
        self._read = {".csv": self._read_csv, ".parquet": self._read_parquet}.get(suffix, self._read_json)
        first = next(self._read(), None)
        if first is None:
            raise ValueError(f"{path} has no rows.")
        if suffix == ".parquet":
            self.schema = pyarrow.parquet.read_schema(path)
            self._check_names(self.schema.names)
        elif suffix == ".csv":
            self.schema = pyarrow.schema([(name, pyarrow.string()) for name in first])
            for _ in self._read():  # an error in the last row is found before a long run
                pass
        else:
            self.schema = self._find_schema()
            self._check_names(self.schema.names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._read():
            row = {name: row.get(name) for name in self.schema.names}
            for name in self._as_texts:
                if row[name] is not None and not isinstance(row[name], str):
                    row[name] = json.dumps(row[name])
            yield row

    def plain_types(self) -> dict[str, pyarrow.DataType]:
        """The columns that [`plain_cells`] can keep, with their types."""
        types = {field.name: _plain_type(field.type) for field in self.schema}
        return {name: dtype for name, dtype in types.items() if dtype is not None}

    def _find_schema(self) -> pyarrow.Schema:
        types: dict[str, pyarrow.DataType] = {}
        rows = self._read_json()
        while chunk := list(islice(rows, CHUNK_SIZE)):
            for name in dict.fromkeys(name for row in chunk for name in row):
                try:
                    if name in self._as_texts and all(isinstance(row.get(name), _SCALARS) for row in chunk):
                        continue
                    found = pyarrow.array([row.get(name) for row in chunk]).type
                    fields = [pyarrow.schema([(name, dtype)]) for dtype in (types.get(name, found), found)]
                    types[name] = pyarrow.unify_schemas(fields, promote_options="permissive").field(0).type
                except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
                    if _are_texts_and_numbers([row.get(name) for row in chunk], types.get(name)):
                        self._as_texts.add(name)
                        types[name] = pyarrow.string()
                        continue
                    raise ValueError(
                        f"{self.path} is not a table: column {shortened(name)} has values of several types, or of a "
                        f"type that tables do not support ({one_line(error).rstrip('.')})."
                    ) from error
        return pyarrow.schema(types)

    def _read_csv(self) -> Iterator[dict[str, Any]]:
        csv.field_size_limit(int(limits().file_bytes))  # long texts are no error
        start = 1  # the line in which the next row begins
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                names: list[str] = []
                number = 0
                lines = csv.reader(file, strict=True)  # otherwise an open quote includes the rest of the file
                for cells in lines:
                    line, start = start, lines.line_num + 1
                    if not cells or (len(cells) == 1 < len(names) and not cells[0].strip()):
                        continue
                    if not names:
                        names = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(cells)]
                        self._check_names(names)
                        continue
                    if len(cells) < len(names) or any(cells[len(names) :]):
                        hint = "a text with a comma must be in quotes"
                        hint = hint if len(cells) > len(names) else "an empty cell needs its comma, too"
                        raise ValueError(
                            f"{self.path} cannot be read as CSV: row {number:,} has {len(cells)} cells, but there are "
                            f"{len(names)} columns (line {line:,}; {hint})."
                        )
                    yield {name: cell or None for name, cell in zip(names, cells, strict=False)}
                    number += 1
        except csv.Error as error:
            if "field larger" in str(error):
                raise ValueError(
                    f"{self.path} cannot be read as CSV: the row that begins in line {start:,} has a cell with more "
                    f"characters than {named('file_bytes')}."
                ) from error
            raise ValueError(
                f"{self.path} cannot be read as CSV: the row that begins in line {start:,} has a quote that is not "
                f"closed, or a quote within a text that is not doubled ({error})."
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} cannot be read as CSV: {str(error).strip()}.") from error

    def _check_names(self, names: Sequence[str]) -> None:
        seen: set[str] = set()
        twice = next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
        if twice is not None:
            raise ValueError(f"{self.path} has two columns {shortened(twice)}: rename one.")
        if any("\0" in name for name in names):
            raise ValueError(f"{self.path} is not a table: the name of a column has a zero byte.")

    def _read_parquet(self) -> Iterator[dict[str, Any]]:
        number = 0
        for part in self._parquet_parts():
            if part.size <= _LARGE_PART:
                yield from part.rows.to_pylist()
            else:
                for i in range(len(part.rows)):
                    row = part.rows.slice(i, 1)
                    size = num_bytes(row.to_struct_array())
                    if size > limits().file_bytes:
                        raise ValueError(
                            f"{self.path}: row {number + i:,} has {size:,} bytes, more than {named('file_bytes')}."
                        )
                    yield from row.to_pylist()
            number += len(part.rows)

    def _parquet_parts(self) -> Iterator["_Part"]:
        """At most 16 rows each."""
        try:
            # Cells that are stored once for many rows stay so, and few rows at a time are unpacked. Otherwise a file
            # of a few kilobytes could fill the memory.
            metadata = pyarrow.parquet.read_metadata(self.path)
            schema, largest = metadata.schema.to_arrow_schema(), check_columns(self.path, metadata)
            num_rows = CHUNK_SIZE if all(_stays_small(field.type) for field in schema) else _FEW_ROWS
            if largest * num_rows > limits().file_bytes:
                num_rows = 1
            # Arrow cannot do so within lists and structures; `check_columns` bounds those.
            names = [field.name for field in schema if _is_text(field.type)]
            with pyarrow.parquet.ParquetFile(self.path, metadata=metadata, read_dictionary=names) as file:
                for batch in file.iter_batches(num_rows):
                    for start in range(0, len(batch), _FEW_ROWS):
                        rows = batch.slice(start, _FEW_ROWS)
                        yield _Part(rows, num_bytes(rows.to_struct_array()))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} cannot be read as Parquet: {one_line(error)}") from error

    def largest_part(self) -> int:
        """
        The bytes of the largest 16 rows. All of the table is read once, part by part.

        Raises:
            ValueError: if all rows together are far larger than the file.
        """
        most, total, stored = 0, 0, self.path.stat().st_size
        for part in self._parquet_parts():
            most, total = max(most, part.size), total + part.size
            if total > limits().file_bytes and total > MOST_COMPRESSED * stored:
                raise ValueError(
                    f"{self.path} cannot be read as Parquet: its rows have more than {total:,} bytes in {stored:,}, "
                    f"which is more than {named('file_bytes')}."
                )
        return most

    def _read_json(self) -> Iterator[dict[str, Any]]:
        number = 0
        try:
            for row in self._json_values():
                if not isinstance(row, dict):
                    raise ValueError(f"{self.path}: row {number:,} must be a JSON object, but is {str(row)[:50]!r}.")
                yield row
                number += 1
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, _WrongNumber) as error:
            raise ValueError(f"{self.path}: row {number:,} cannot be read as JSON ({error}).") from error

    def _json_values(self) -> Iterator[Any]:
        with self.path.open(encoding="utf-8-sig") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            options: dict[str, Any] = {"parse_constant": _constant, "parse_int": _whole_number}
            if start == "[":
                yield from json.load(file, **options)
            else:
                yield from (json.loads(line, **options) for line in file if line.strip())


class _WrongNumber(ValueError):
    pass


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:  # Python refuses thousands of digits
        raise _WrongNumber(f"a number of {len(text):,} digits") from error


def _constant(name: str) -> float | None:
    """Constants that Python writes, but JSON lacks: NaN is an empty cell."""
    return None if name == "NaN" else float(name)


_SCALARS = (str, bool, int, float, type(None))


def _are_texts_and_numbers(cells: list[Any], known: pyarrow.DataType | None) -> bool:
    """
    Whether the cells of a column are texts and other scalars, so that no type of Arrow fits all.

    Args:
        known: the type of earlier cells.
    """
    types = pyarrow.types
    if known is not None and types.is_nested(known):
        return False
    has_texts = any(isinstance(cell, str) for cell in cells) or (known is not None and types.is_string(known))
    has_others = any(isinstance(cell, (bool, int, float)) for cell in cells) or (
        known is not None and not types.is_string(known) and not types.is_null(known)
    )
    are_valid = all(not isinstance(cell, str) or cell.isascii() or _is_valid(cell) for cell in cells)
    return has_texts and has_others and are_valid and all(isinstance(cell, _SCALARS) for cell in cells)


def _is_valid(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _stays_small(kind: pyarrow.DataType) -> bool:
    """Whether many rows of a column take little memory: numbers, and texts and files that are read as a dictionary."""
    types = pyarrow.types
    return not (
        types.is_nested(kind) or types.is_fixed_size_binary(kind) or isinstance(kind, pyarrow.BaseExtensionType)
    )


def _is_text(dtype: pyarrow.DataType) -> bool:
    types = pyarrow.types
    kinds = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_kind(dtype) for is_kind in kinds)


def plain_cells(names: Sequence[str], row: dict[str, Any]) -> dict[str, Any]:
    """The cells of a row that any table can hold; for pictures and the like the path, or `None`."""
    cells = {name: row.get(name) for name in names}
    for name, cell in cells.items():
        if isinstance(cell, dict):
            cells[name] = cell.get("path")
        elif isinstance(cell, (date, time, timedelta, Decimal)):
            cells[name] = str(cell)
    return cells


def _plain_type(kind: pyarrow.DataType) -> pyarrow.DataType | None:
    """The type of the result of [`plain_cells`] for such cells; `None` if it does not keep them."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return pyarrow.string() if {f.name for f in kind} == {"bytes", "path"} else None
    if types.is_list(kind) or types.is_large_list(kind):
        item = _plain_type(kind.value_type)
        return pyarrow.list_(item) if item == kind.value_type else None
    if types.is_temporal(kind) or types.is_decimal(kind):
        return pyarrow.string()
    is_plain = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)
    return kind if is_plain or types.is_string(kind) or types.is_large_string(kind) else None


def table_writer(
    file: IO[bytes],
    suffix: str,
    types: dict[str, pyarrow.DataType],
    escape_formulas: bool = True,
    example: Mapping[str, Any] | None = None,
) -> "TableWriter":
    """
    A writer for rows.

    Args:
        file: open for writing, empty.
        suffix: the kind of table.
        types: column -> type, if known; Parquet takes the others from the first rows.
        escape_formulas: in CSV, puts an apostrophe before texts that begin like a formula.
        example: cells of other columns, which have no content in the first rows perhaps.
    """
    if suffix == ".parquet":
        return _ParquetWriter(file, types, example or {})
    return _CsvWriter(file, escape_formulas) if suffix == ".csv" else _JsonWriter(file)


class TableWriter:
    """Writes rows, which all have the columns of the first."""

    def __init__(self, file: IO[bytes]):
        self.file = file

    def write(self, rows: list[dict[str, Any]]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Call it after the last row."""


class _JsonWriter(TableWriter):
    def write(self, rows: list[dict[str, Any]]) -> None:
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


class _CsvWriter(TableWriter):
    has_header = False

    def __init__(self, file: IO[bytes], escape_formulas: bool):
        super().__init__(file)
        self.text: Callable[[str], str] = without_formula if escape_formulas else str

    def write(self, rows: list[dict[str, Any]]) -> None:
        if not self.has_header and rows:
            self.file.write(_csv_line(map(self.text, rows[0])))
            self.has_header = True
        self.file.write(b"".join(_csv_line(map(self._cell, row.values())) for row in rows))

    def _cell(self, cell: Any) -> Any:
        return self.text(cell) if isinstance(cell, str) else _as_csv(cell)


def _csv_line(cells: Iterable[Any]) -> bytes:
    text = io.StringIO(newline="")
    # With this line end, cells with either of its characters are quoted.
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue()[:-2].encode() + b"\n"


def _as_csv(cell: Any) -> Any:
    return json.dumps(cell, ensure_ascii=False) if isinstance(cell, (list, dict, bool)) else cell


class _ParquetWriter(TableWriter):
    def __init__(self, file: IO[bytes], types: dict[str, pyarrow.DataType], example: Mapping[str, Any]):
        super().__init__(file)
        self.types, self.example = types, example
        self.waiting: list[dict[str, Any]] = []
        self.writer: Any = None

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.waiting += rows
        if len(self.waiting) >= CHUNK_SIZE:
            self._write_waiting()

    def close(self) -> None:
        if self.waiting or self.writer is None:
            self._write_waiting()
        self.writer.close()

    def _write_waiting(self) -> None:
        if self.writer is None:
            found = pyarrow.Table.from_pylist(
                [{k: v for k, v in r.items() if k not in self.types} for r in [*self.waiting, self.example]]
            )
            types = {f.name: f.type for f in found.schema} | self.types
            names = list(self.waiting[0]) if self.waiting else list(types)
            schema = pyarrow.schema([(name, _settled(types[name])) for name in names])
            self.writer = pyarrow.parquet.ParquetWriter(self.file, schema)
        self.writer.write_table(pyarrow.Table.from_pylist(self.waiting, schema=self.writer.schema))
        self.waiting = []


def _settled(kind: pyarrow.DataType) -> pyarrow.DataType:
    """A type for the writer: for a column of empty cells, text."""
    if pyarrow.types.is_null(kind):
        return pyarrow.string()
    return pyarrow.list_(_settled(kind.value_type)) if pyarrow.types.is_list(kind) else kind
