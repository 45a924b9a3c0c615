"""Objects like one, for the page: the search of `armillary search`, with an index that is made while the page is open."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.evaluate.search.index import Index
from armillary.engine.evaluate.search.query import Query, query_from_file

if TYPE_CHECKING:
    import torch

__all__ = ["NotReady", "Similar"]


class NotReady(RuntimeError):
    """The index is being made, or could not be made; the message says so."""


class Similar:
    """Similarity search among embeddings. The index is made, or read, by a thread of its own.

    Args:
        files: The embeddings.
        keys: Their keys.
        saved: Folder of an index that `armillary search --save-index` wrote; one is made of the embeddings where None.
        run: The run that made the embeddings; without it no files can be searched for.
        device: Where to run it.
    """

    def __init__(
        self, files: EmbeddingFiles, keys: pa.Array, saved: Path | None, run: Path | None, device: torch.device
    ) -> None:
        self._files, self._keys, self._saved = files, keys, saved
        self._run, self._device = run, device
        self._embedding = threading.Lock()  # one file at a time
        self._index: Index | None = None
        self._row: np.ndarray | None = None  # of the embeddings, by row of the index, where the two differ
        self._problem = ""
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._prepare, name="index", daemon=True)
        self._thread.start()

    @property
    def takes_files(self) -> bool:
        """Whether there is a run to embed files with."""
        return self._run is not None

    def wait(self) -> None:
        """Return when the index is made, or has failed."""
        self._thread.join()

    def _prepare(self) -> None:
        try:
            index = Index.read_files([self._files.path]) if self._saved is None else Index.load(self._saved)
            index.check(self._files.metadata)
            if not index.keys.equals(self._keys):
                found = pc.index_in(index.keys, value_set=self._keys)
                if found.null_count:
                    raise ValueError(f"index: holds {found.null_count:,} objects that {self._files.path} lacks")
                self._row = found.to_numpy()
            self._index = index
        except (OSError, ValueError, RuntimeError) as error:
            self._problem = str(error)

    def _ready(self) -> Index:
        if self._index is not None:
            return self._index
        if self._problem:
            raise NotReady(f"there is no index to search: {self._problem}")
        raise NotReady(f"the index is being made, since {time.monotonic() - self._since:.0f} s; ask again")

    def of_row(self, row: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the embeddings most similar to one of them, itself left out, and their cosines.

        Raises:
            NotReady: There is no index yet.
            ValueError: It does not hold the object.
        """
        index = self._ready()
        key = self._keys[row].as_py()
        own = row if self._row is None else index.find(key)
        vector = index.vectors([own]) if index.has_vectors else self._files.vector_of(key)
        return self._search(index, vector, k, np.array([own]))

    def of_file(self, path: Path, k: int) -> tuple[Query, np.ndarray, np.ndarray]:
        """The object of a file, rows of the embeddings most similar to it, and their cosines.

        Raises:
            NotReady: There is no index yet.
            ValueError, OSError: The file cannot be embedded, see `query_from_file`.
        """
        index = self._ready()
        if self._run is None:
            raise ValueError("a file has to be embedded first; start `armillary explore` with --run RUN")
        with self._embedding:
            one = query_from_file(index, path, self._run, None, self._device)
        return one, *self._search(index, one.vector, k, None)

    def _search(
        self, index: Index, vector: np.ndarray, k: int, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        most = len(index) - (own is not None)
        if most < 1:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        answers = index.search(vector, min(k, most), leave_out=own)
        row = answers.row[0]
        return row if self._row is None else self._row[row], answers.similarity[0]
