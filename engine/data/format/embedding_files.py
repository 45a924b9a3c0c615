"""Embeddings on disk: one Parquet file, or a folder of parts that many processes wrote, both read as one.

NAME.parquet                columns key, split and vector (fixed-size list of float32); the schema's metadata says where they
                            come from
FOLDER/
  part-000000.parquet ...   the same, one a stretch of the survey: in their order the survey's own
  embeddings.json           dimensions, origin, rows and SHA-256 of every part; written last
  .fill/                    only while unfinished, see `armillary.engine.embed.parts`

Whatever the form, rows are read in pieces: the vectors never have to lie in memory together. A part is compared with its
SHA-256 before its vectors are read, once a process; pages of a file carry checksums, which are compared as they are read.

Shape legend: N embeddings, D dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from armillary.engine.sealed_json import unsealed
from armillary.models.file_hash import sha256_of

__all__ = ["CHUNK", "FILL", "FORMAT", "RECORD", "EmbeddingFiles", "EmbeddingPart", "EmbeddingWriter", "vectors_of"]

CHUNK = 65_536
"""Rows that are read at a time."""

GROUP_BYTES = 16 << 20
"""Bytes of vectors in a row group, which is what a writer holds."""

RECORD, FILL, FORMAT = "embeddings.json", ".fill", 1
METADATA_KEY = b"armillary"


@dataclass(frozen=True)
class EmbeddingPart:
    """One Parquet file of a folder of embeddings.

    Attributes:
        name: Its name in the folder.
        split: The split that all its rows are of.
        rows: How many.
        bytes: Size of the file.
        sha256: Hex digest of the file.
    """

    name: str
    split: str
    rows: int
    bytes: int
    sha256: str

    def problem(self, folder: Path, *, whole: bool = True) -> str | None:
        """What is wrong with the file, in words; None if nothing is.

        Args:
            folder: Where it lies.
            whole: Compare the hash of all its bytes, not only the size.
        """
        path = folder / self.name
        if not path.is_file():
            return f"{path}: missing"
        if (size := path.stat().st_size) != self.bytes:
            return f"{path}: damaged: {size} bytes in place of {self.bytes}"
        if whole and sha256_of(path) != self.sha256:
            return f"{path}: damaged: its SHA-256 is not that of {RECORD}"
        return None


class EmbeddingWriter:
    """Writes embeddings to one Parquet file as they come; a context manager that closes it.

    Args:
        path: File to write, under whatever name it has until it is whole.
        metadata: What the file shall say of itself.

    Attributes:
        rows: Rows written so far.
        dimensions: D; 0 before the first rows.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path, self._metadata = path, dict(metadata)
        self._writer: Any = None
        self._waiting: list[pa.RecordBatch] = []
        self.rows = self.dimensions = 0

    def __enter__(self) -> EmbeddingWriter:
        """Nothing to do yet: the file is made with the first rows, which tell D."""
        return self

    def __exit__(self, *error: object) -> None:
        """Write what waits, unless there was an error, and close."""
        try:
            if error[0] is None:
                self._flush()
        finally:
            if self._writer is not None:
                self._writer.close()

    def write(self, key: pa.Array, split: str | np.ndarray, vector: np.ndarray) -> None:
        """Append rows.

        Args:
            key: [n] strings.
            split: Of all of them, or [n].
            vector: [n, D] floating.

        Raises:
            ValueError: D is not that of the rows before.
        """
        if self._writer is None:
            self.dimensions = vector.shape[1]
            fields = [("key", pa.string()), ("split", pa.string()), ("vector", pa.list_(pa.float32(), self.dimensions))]
            schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(self._metadata)})
            self._writer = pq.ParquetWriter(self._path, schema, use_dictionary=["split"], write_page_checksum=True)
        if vector.shape[1] != self.dimensions:
            raise ValueError(f"embeddings: must have {self.dimensions} dimensions as before, got {vector.shape[1]}")
        splits = np.full(len(vector), split, object) if isinstance(split, str) else split
        values = pa.array(np.ascontiguousarray(vector, np.float32).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(values, self.dimensions)
        columns = [pc.cast(key, pa.string()), pa.array(splits, pa.string()), vectors]
        self._waiting.append(pa.record_batch(columns, schema=self._writer.schema))
        self.rows += len(vector)
        if sum(batch.num_rows for batch in self._waiting) * self.dimensions * 4 >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting))
            self._waiting = []


@dataclass(frozen=True)
class EmbeddingFiles:
    """A file or folder of embeddings, opened; nothing of the vectors is in memory.

    Attributes:
        path: The file or folder.
        parts: The parts of a folder; none of a file.
        rows: N.
        dimensions: D.
        metadata: What it says of itself: run, encoder, survey, readout, ...
    """

    path: Path
    parts: tuple[EmbeddingPart, ...]
    rows: int
    dimensions: int
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path | str) -> EmbeddingFiles:
        """Read what the file or folder says of itself.

        Raises:
            FileNotFoundError: There is no such thing.
            ValueError: It holds something else, is not finished, or a part is missing or cut short.
        """
        path = Path(path)
        return cls._of_folder(path) if path.is_dir() else cls._of_file(path)

    @classmethod
    def _of_file(cls, path: Path) -> EmbeddingFiles:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no embeddings here; make them with `armillary embed`")
        try:
            about = pq.read_metadata(path)
            schema = about.schema.to_arrow_schema()
            width = schema.field("vector").type.list_size
            schema.field("key")
            metadata = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
        except (pa.ArrowException, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of embeddings (key, split, vector): {error}") from error
        return cls(path, (), about.num_rows, width, metadata)

    @classmethod
    def _of_folder(cls, folder: Path) -> EmbeddingFiles:
        record = folder / RECORD
        if not record.is_file():
            if (folder / FILL).is_dir():
                raise ValueError(f"{folder}: these embeddings are not finished; run the same `armillary embed` again")
            raise FileNotFoundError(f"{folder}: no embeddings here ({RECORD} is missing)")
        try:
            raw = unsealed(json.loads(record.read_text()))
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']}, this program reads {FORMAT}")
            parts = tuple(EmbeddingPart(**part) for part in raw["parts"])
            found = cls(folder, parts, sum(p.rows for p in parts), int(raw["dimensions"]), dict(raw["metadata"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{record}: not a record of embeddings: {error}") from error
        for part in parts:
            _refuse(part.problem(folder, whole=False))
        return found

    def __len__(self) -> int:
        """N."""
        return self.rows

    @property
    def record(self) -> Path:
        """The file whose time of writing changes when the embeddings do."""
        return self.path / RECORD if self.parts else self.path

    def keys(self) -> pa.ChunkedArray:
        """N keys in order, as large strings."""
        tables = [_read(path, ["key"])["key"].cast(pa.large_string()) for path in self._paths()]
        return pa.chunked_array([chunk for column in tables for chunk in column.chunks], pa.large_string())

    def batches(self, columns: Sequence[str] = ("vector",), rows: int = CHUNK) -> Iterator[pa.RecordBatch]:
        """All rows in order, some at a time.

        Raises:
            ValueError: A part is damaged.
        """
        for number, path in enumerate(self._paths()):
            if self.parts:
                _refuse(self.parts[number].problem(self.path))
            # A buffer reads the pages of a column one by one: whole row groups may not fit into memory.
            with (
                _named(path),
                pq.ParquetFile(path, buffer_size=1 << 24, page_checksum_verification=True) as file,
            ):
                yield from file.iter_batches(rows, columns=list(columns))

    def chunks(self) -> Iterator[np.ndarray]:
        """All vectors in order, some [n, D] at a time."""
        for batch in self.batches():
            yield vectors_of(batch)

    def vector_of(self, key: str) -> np.ndarray:
        """[1, D] float32 embedding of an object; [0, D] where none has this key.

        Raises:
            ValueError: The part that holds it is damaged.
        """
        for number, path in enumerate(self._paths()):
            found = _read(path, ["vector"], filters=[("key", "==", key)])["vector"]
            if len(found):
                if self.parts:
                    _refuse(self.parts[number].problem(self.path))
                return found.combine_chunks().flatten().to_numpy().reshape(-1, self.dimensions)[:1]
        return np.empty((0, self.dimensions), np.float32)

    def _paths(self) -> list[Path]:
        return [self.path / part.name for part in self.parts] or [self.path]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        _refuse(f"{path}: damaged: {error}")


def _read(path: Path, columns: list[str], **options: Any) -> pa.Table:
    with _named(path):
        return pq.read_table(path, columns=columns, page_checksum_verification=True, **options)


def vectors_of(batch: pa.RecordBatch) -> np.ndarray:
    """[n, D] vectors of some rows, as they are stored."""
    return batch["vector"].flatten().to_numpy().reshape(len(batch), -1)


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"{problem}; copy it again, or run the same `armillary embed` again, which makes it anew")
