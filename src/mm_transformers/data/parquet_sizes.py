"""The sizes of Parquet columns and cells, before they take memory."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ..model.limits import limits, named
from ..model.messages import shortened


# The largest compression of a large column. In a data set the file is rarely under a tenth.
MOST_COMPRESSED = 200
# Bytes of one value of a list in memory: its number in a dictionary, and its levels.
_BYTES_OF_A_VALUE = 8
_DEEPEST = 16
_DICTIONARY = 2  # the type of a page


class Page(NamedTuple):
    """
    What the header of a page says. Arrow trusts it, not the footer of the file.

    Args:
        start: its place in the file, behind the header.
        stored: its bytes in the file.
        size: its bytes without compression.
        num_values: values, empty ones included.
        is_dictionary: whether it holds the values that the other pages name by numbers.
    """

    start: int
    stored: int
    size: int
    num_values: int
    is_dictionary: bool


def check_columns(path: Path, metadata: pyarrow.parquet.FileMetaData) -> int:
    """
    Checks the sizes of the columns by the headers of their pages, since a footer may lie.

    Returns:
        The bytes of the largest text within a structure that a few bytes in each of many rows may repeat.

    Raises:
        ValueError: if a column is far larger than the file, so that one cell, or one page, may fill the memory. Or if
            the header of a page cannot be read.
    """
    largest = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column, schema = metadata.row_group(group).column(number), metadata.schema.column(number)
                try:
                    pages = list(_pages(content, column))
                except (IndexError, ValueError) as error:
                    raise ValueError(
                        f"{path} cannot be read as Parquet: column {shortened(column.path_in_schema)} has a page "
                        f"without a valid header ({error})."
                    ) from None
                size = max(column.total_uncompressed_size, sum(page.size for page in pages))
                if "." in schema.path:  # within a list or a structure, where Arrow copies equal cells
                    longest = max([_longest(content, column, page) for page in pages if page.is_dictionary], default=0)
                    largest = max(largest, longest)
                    if schema.max_repetition_level:  # one row may hold all values
                        count = sum(page.num_values for page in pages if not page.is_dictionary)
                        size = max(size, count * max(longest, _BYTES_OF_A_VALUE))
                stored = min(max(column.total_compressed_size, 1), len(content))
                if size > limits().file_bytes and size > MOST_COMPRESSED * stored:
                    raise ValueError(
                        f"{path} cannot be read as Parquet: column {shortened(column.path_in_schema)} has {size:,} "
                        f"bytes in {stored:,}, which is more than {named('file_bytes')}."
                    )
    return largest


def num_bytes(array: Any) -> int:
    """The bytes of all cells of an Arrow array. Equal cells of a dictionary count each time."""
    types, kind = pyarrow.types, array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return num_bytes(array.storage)
    if types.is_dictionary(kind):
        lengths = _lengths(array.dictionary)
        found = None if lengths is None else pyarrow.compute.sum(lengths.take(array.indices)).as_py()
        return array.nbytes if lengths is None else found or 0
    if types.is_struct(kind):
        return sum(num_bytes(array.field(i)) for i in range(kind.num_fields))
    if types.is_map(kind):
        return num_bytes(array.keys) + num_bytes(array.items)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        values = array.flatten()
        return num_bytes(values) + len(values) * _BYTES_OF_A_VALUE
    lengths = _lengths(array)
    return array.nbytes if lengths is None else pyarrow.compute.sum(lengths).as_py() or 0


def _lengths(array: Any) -> Any:
    """The bytes of each text; `None` for other types."""
    types, kind = pyarrow.types, array.type
    is_text = types.is_string(kind) or types.is_large_string(kind)
    if not (is_text or types.is_binary(kind) or types.is_large_binary(kind)):
        return None
    return pyarrow.compute.cast(pyarrow.compute.binary_length(array), pyarrow.int64())


def _pages(content: Any, column: pyarrow.parquet.ColumnChunkMetaData) -> Iterator[Page]:
    """
    The pages of a column chunk.

    Args:
        content: all bytes of the file.
    """
    start, first = column.data_page_offset, column.dictionary_page_offset
    start = first if first is not None and 0 < first < start else start
    end = min(start + column.total_compressed_size, len(content))
    if start < 0:
        raise ValueError("it begins before the file")
    while start < end:
        reader = _Reader(content, start, end)
        header = reader.struct()
        size, stored = header.get(2), header.get(3)
        if not (isinstance(size, int) and isinstance(stored, int) and size >= 0 and stored >= 0):
            raise ValueError("it has no size")
        # The headers of data pages and dictionary pages: their first field is the number of values.
        counts = [header[field].get(1) for field in (5, 7, 8) if isinstance(header.get(field), dict)]
        count = max([count for count in counts if isinstance(count, int)], default=0)
        yield Page(reader.place, stored, size, count, header.get(1) == _DICTIONARY)
        start = reader.place + stored


def _longest(content: Any, column: pyarrow.parquet.ColumnChunkMetaData, page: Page) -> int:
    """The bytes of the longest text of a dictionary; at most its size, if it cannot be read."""
    if column.physical_type != "BYTE_ARRAY" or page.size > limits().file_bytes:
        return 0 if column.physical_type != "BYTE_ARRAY" else page.size
    plain = content[page.start : page.start + page.stored]
    try:
        if column.compression != "UNCOMPRESSED":
            plain = pyarrow.decompress(plain, page.size, codec=column.compression.lower(), asbytes=True)
    except (pyarrow.ArrowException, OSError, ValueError):  # a compression that Arrow knows by another name
        return page.size
    place = longest = 0
    while place + 4 <= len(plain):  # four bytes for the length, then the text
        length = int.from_bytes(plain[place : place + 4], "little")
        longest, place = max(longest, length), place + 4 + length
    return min(longest, page.size)


class _Reader:
    """
    Reads a structure of Thrift's compact protocol, in which Parquet writes the headers of pages.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md

    Args:
        place, end: where it begins, and where it must end.
    """

    def __init__(self, content: Any, place: int, end: int):
        self.content, self.place, self.end = content, place, end

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Number of the field -> value: integers, structures; `None` for others."""
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while True:
            byte = self._byte()
            if byte == 0:
                return fields
            number = number + (byte >> 4) if byte >> 4 else self._integer()
            fields[number] = self._value(byte & 15, depth)

    def _byte(self) -> int:
        if self.place >= self.end:
            raise ValueError("it is cut short")
        self.place += 1
        return self.content[self.place - 1]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number is too long")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, length: int) -> None:
        if length > self.end - self.place:
            raise ValueError("it is cut short")
        self.place += length

    def _value(self, code: int, depth: int) -> Any:
        if code in (1, 2):  # a truth value, which is in the code
            return None
        if code in (4, 5, 6):
            return self._integer()
        if code in (3, 7):  # a byte, and a float
            return self._skip(1 if code == 3 else 8)
        if code == 8:
            return self._skip(self._unsigned())
        if code in (9, 10):
            return self._list(depth)
        if code == 12:
            return self.struct(depth + 1)
        raise ValueError(f"it has a field of the unknown code {code}")

    def _list(self, depth: int) -> None:
        byte = self._byte()
        length, code = byte >> 4, byte & 15
        if length == 15:
            length = self._unsigned()
        if length > self.end - self.place or depth > _DEEPEST:
            raise ValueError("a list is too long")
        for _ in range(length):  # a truth value in a list takes a byte
            self._value(3 if code in (1, 2) else code, depth + 1)
