"""Tables in Parquet, a column at a time, and in CSV, as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from armillary.engine.data.sources.files.text_tables import EXACT, IDENTIFIER, WHOLE_FLOAT, TextTable
from armillary.engine.data.sources.tables.columns import UNREADABLE, Column, Table, Values

__all__ = ["ArrowTable"]

WHOLE_CSV = 2**31 - 1  # bytes from which the types of a CSV's columns are told
LISTS = 1024  # rows in which the length of lists is looked for at a time


class ArrowTable(Table):
    """Parquet, a column at a time; or a CSV, which can only be read as a whole.

    Args:
        path: The file.
        csv: Whether it is a CSV.
    """

    def __init__(self, path: Path, *, csv: bool) -> None:
        super().__init__(path)
        self._csv = csv
        self._file: Any = self._open()
        schema = self._file.schema if csv else self._file.schema_arrow
        self.count = self._file.num_rows if csv else self._file.metadata.num_rows
        if twice := [name for name, n in Counter(schema.names).items() if n > 1]:
            raise ValueError(f"column {twice[0]!r} occurs twice")
        self.columns = {field.name: c for field in schema if (c := _arrow_column(field, self._length)) is not None}
        self.unread = {field.name: str(field.type)[:40] for field in schema if field.name not in self.columns}

    def _open(self) -> Any:
        return _read_csv(self.path) if self._csv else pq.ParquetFile(self.path, memory_map=True)

    def _length(self, name: str) -> int:
        """Numbers a row in a column of lists, as its first row that has any has them."""
        for batch in self._file.iter_batches(LISTS, columns=[name]):
            lengths = pc.list_value_length(batch.column(0)).drop_null()
            if known := lengths.filter(pc.greater(lengths, 0)).slice(0, 1).to_pylist():
                return int(known[0])
        return 0

    def parts(self, name: str, start: int, stop: int) -> Iterator[Values]:
        """Rows [start, stop) of a column, a piece for each group of rows."""
        if self._csv:
            yield from super().parts(name, start, stop)
            return
        if self._file is None:
            self._file = self._open()
        begin = 0
        for group in range(self._file.num_row_groups):
            end = begin + self._file.metadata.row_group(group).num_rows
            if begin < stop and start < end:
                number, values = self._group.get(name, (-1, Values(None)))
                if number != group:
                    try:
                        values = self._values(name, self._file.read_row_group(group, columns=[name]).column(0))
                    except UNREADABLE as error:
                        raise ValueError(f"{self.path}: column {name!r}: not readable: {error}") from error
                    self._group[name] = group, values
                yield Values(values.array[max(start - begin, 0) : stop - begin])
            begin = end

    def _load(self, name: str) -> Values:
        if self._file is None:
            self._file = self._open()
        return self._values(name, self._file.column(name) if self._csv else self._file.read(columns=[name]).column(0))

    def _values(self, name: str, chunks: pa.ChunkedArray) -> Values:
        kind, size = self.columns[name].kind, self.columns[name].size
        if kind == "text":
            return Values(_text(chunks))
        if size is not None:
            flat = np.full((len(chunks), size), np.nan)
            lengths = pc.fill_null(pc.list_value_length(chunks), 0).to_numpy()  # an empty list is unknown, as null is
            known = lengths > 0
            if (odd := known & (lengths != size)).any():
                row = int(np.argmax(odd))
                raise ValueError(f"row {row} has {lengths[row]} numbers, the first row with any has {size}")
            flat[known] = pc.list_flatten(chunks).combine_chunks().to_numpy(zero_copy_only=False).reshape(-1, size)
            return Values(flat)
        array = chunks.combine_chunks()
        plain = array.null_count == 0 and kind in ("int", "float") and not pa.types.is_decimal(array.type)
        return Values(array.to_numpy() if plain else array)


def _text(chunks: pa.ChunkedArray) -> pa.Array:
    """Text; bytes are read as UTF-8, or as Latin-1 where they are none."""
    kind = chunks.type.value_type if pa.types.is_dictionary(chunks.type) else chunks.type
    try:
        return chunks.cast(pa.large_string()).combine_chunks()
    except pa.ArrowInvalid:
        if not _is_bytes(kind):
            raise
        return pa.array([None if v is None else v.decode("latin-1") for v in chunks.to_pylist()], pa.large_string())


def _read_csv(path: Path) -> pa.Table:
    """Read a CSV as one block, so that a column's type is told from all of its cells.

    Columns whose cells are identifiers (see `text_tables`) stay text, though they are digits.
    """
    source = TextTable.read(path.read_bytes(), path.name)
    raw = pa.py_buffer(source.text.encode())
    block = max(1, min(raw.size + 1, WHOLE_CSV))
    options = pc_csv.ReadOptions(use_threads=False, block_size=block)  # threads lose the number of a faulty row
    parse = pc_csv.ParseOptions(delimiter=source.delimiter)
    table = pc_csv.read_csv(pa.BufferReader(raw), options, parse)
    if twice := [name for name, n in Counter(table.column_names).items() if n > 1]:
        raise ValueError(f"column {twice[0]!r} occurs twice")
    doubtful = [f.name for f in table.schema if f.type == pa.int64() or _beyond_integers(f, table.column(f.name))]
    if doubtful:
        texts = pc_csv.ConvertOptions(column_types=dict.fromkeys(doubtful, pa.string()), include_columns=doubtful)
        again = pc_csv.read_csv(pa.BufferReader(raw), options, parse, texts)
        for name in doubtful:
            rounded = table.schema.field(name).type == pa.float64()
            if (text := _identifiers(name, again.column(name), rounded)) is not None:
                table = table.set_column(table.column_names.index(name), name, text)
    return table.rename_columns([name.strip() for name in table.column_names])


def _beyond_integers(field: pa.Field, column: pa.ChunkedArray) -> bool:
    """Whether whole numbers may have been taken for fractions, and lost their last digits."""
    greatest = pc.max(column).as_py() if field.type == pa.float64() else None
    return greatest is not None and greatest > EXACT


def _identifiers(name: str, text: pa.ChunkedArray, rounded: bool) -> pa.ChunkedArray | None:
    """The text of a column of identifiers; None where it holds numbers, whole ones of 64 bits (not `rounded`) included."""

    def any_is(pattern: str) -> bool:
        return bool(pc.any(pc.match_substring_regex(text, rf"^\s*({pattern})\s*$")).as_py())

    if any_is(IDENTIFIER) or any_is(WHOLE_FLOAT):
        return pc.replace_substring_regex(text, r"^\s*([0-9]{16,})\.0*\s*$", r"\1")
    if rounded and any_is("[0-9]{17,}") and not any_is(r"[^0-9]*[.eE].*"):
        return text
    if name.strip().lower().endswith("id") and any_is(r"[0-9.]+[eE]\+?(1[6-9]|[2-9][0-9])"):
        raise ValueError(f"column {name!r}: identifiers whose last digits are lost (1.2e+18); write them anew as text")
    return None


def _arrow_column(field: pa.Field, length: Callable[[str], int]) -> Column | None:
    kind, types = field.type, pa.types
    unit = (field.metadata or {}).get(b"unit", b"").decode("utf-8", "replace")
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if not (types.is_integer(kind.value_type) or types.is_floating(kind.value_type)):
            return None
        return Column("float", kind.list_size if types.is_fixed_size_list(kind) else length(field.name), unit)
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_boolean(kind) or types.is_null(kind):
        return Column("bool" if types.is_boolean(kind) else "empty", None, unit)
    if types.is_integer(kind):
        return Column("int", None, unit)
    if types.is_floating(kind) or types.is_decimal(kind):
        return Column("float", None, unit)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_temporal(kind) or _is_bytes(kind):
        return Column("text", None, unit)
    return None


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
