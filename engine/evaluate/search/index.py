"""Similarity search: an index of unit vectors by inner product, which is the cosine, with FAISS (Douze et al. 2024).

    index = Index.build(embeddings.vector, embeddings.key, metadata=embeddings.metadata)
    answers = index.search(index.vectors([index.find("key-1")]), k=8)
    print(answers.key, answers.similarity)

An exact index compares a query with every vector, at 4 D bytes each. Beyond a few million vectors an inverted file of
product-quantised residuals (IVF-PQ, Jegou et al. 2011, behind an optimised rotation, OPQ, Ge et al. 2013) takes m + 8
bytes a vector and looks at `probes` of its lists only. It is filled in pieces, so that the vectors themselves never lie in
memory together; `IndexSettings.memory_bytes` is the formula. Kept beside it as half-precision numbers in a memory-mapped file,
they put the best candidates in their exact order.

Shape legend: N indexed vectors, M queries, D embedding dimensions, k answers, m bytes of a code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from armillary.engine.atomic_file import atomic_path
from armillary.engine.evaluate.probes.similarity import on_grid
from armillary.engine.evaluate.search.index_settings import IndexSettings, Kind
from armillary.engine.evaluate.search.kept_vectors import SUMS, KeptVectors
from armillary.engine.evaluate.search.vectors import CHUNK, ORIGIN, VectorFiles, difference, unit
from armillary.engine.sealed_json import sealed, unsealed
from armillary.models.file_hash import sha256_of

__all__ = ["Answers", "Index"]

CANDIDATES = 8  # fetched for each answer that is re-ranked
EXTRA = 8  # candidates of an exact index beyond the answers
HELD = 2**24  # candidates of all queries held at a time
VERSION = 1
HASHED = ("index.faiss", "keys.parquet", SUMS)
"""Files whose SHA-256 is compared when a folder is loaded; of kept vectors the rows are checked that are read."""


class Answers(NamedTuple):
    """The best answers to M queries, best first.

    Attributes:
        row: [M, k] int64 places in the index.
        key: [M, k] their keys.
        similarity: [M, k] float32 cosines: exact for an exact index, to 1e-3 where candidates are re-ranked, otherwise as
            the codes give them. Equal vectors are equally similar, the lower row first, except by codes alone.
    """

    row: np.ndarray
    key: np.ndarray
    similarity: np.ndarray


class Index:
    """Keys and vectors that can be searched. Made by `build`, `read_files` or `load`.

    Attributes:
        keys: N keys, an Arrow array.
        plan: How the vectors are stored.
        metadata: What the embeddings said of themselves: survey, encoder, readout, ...
    """

    def __init__(
        self,
        engine: Any,
        keys: pa.Array,
        plan: IndexSettings,
        metadata: Mapping[str, str],
        kept: KeptVectors | None = None,
    ) -> None:
        self._engine, self._kept = engine, kept
        self.keys, self.plan, self.metadata = keys, plan, dict(metadata)

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        """Whether a vector has this key."""
        return int(pc.index(self.keys, pa.scalar(key, pa.large_string())).as_py()) >= 0

    @property
    def has_vectors(self) -> bool:
        """Whether `vectors` can give them back."""
        return self._kept is not None or self.plan.kind == "exact"

    @property
    def dimensions(self) -> int:
        """D."""
        return int(self._engine.d)

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        keys: Sequence[str] | np.ndarray | None = None,
        *,
        kind: Kind = "auto",
        plan: IndexSettings | None = None,
        metadata: Mapping[str, str] | None = None,
        keep: Path | None = None,
    ) -> Index:
        """Index vectors that are in memory, or a memory-mapped array.

        Args:
            vectors: [N, D] floating, of any length but zero.
            keys: N different keys; "0", "1", ... if absent.
            kind: "exact", "ivfpq", or "auto" (see `IndexSettings.choose`).
            plan: In place of `kind`, every setting.
            metadata: Where the vectors come from.
            keep: File for the vectors in half precision, with which the candidates of an IVF-PQ index are re-ranked; an
                exact index has no use for it.

        Raises:
            ValueError: There is nothing to index, shapes disagree, keys repeat, a number is not finite, a vector has no
                direction, or there are too few vectors to train.
        """
        if vectors.ndim != 2 or not vectors.size:
            raise ValueError(f"vectors: need [N, D] with N and D of at least 1, got {vectors.shape}")
        names = pa.array([str(i) for i in range(len(vectors))] if keys is None else list(keys), pa.large_string())
        if len(names) != len(vectors):
            raise ValueError(f"keys: need one for each of {len(vectors)} vectors, got {len(names)}")

        def chunks() -> Iterator[np.ndarray]:
            for start in range(0, len(vectors), CHUNK):
                yield vectors[start : start + CHUNK]

        width = vectors.shape[1]
        return cls._fill(
            names, width, chunks, plan or IndexSettings.choose(len(names), width, kind), metadata or {}, keep
        )

    @classmethod
    def read_files(
        cls, paths: Sequence[Path], *, kind: Kind = "auto", plan: IndexSettings | None = None, keep: Path | None = None
    ) -> Index:
        """Index files of embeddings, in pieces: the vectors never lie in memory together (but in an exact index).

        Args:
            paths: Files or folders of `armillary embed`, of one survey and encoder.
            kind: As for `build`.
            plan: As for `build`.
            keep: As for `build`.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: As for `build`, or the files are of different surveys, encoders or readouts.
        """
        files = VectorFiles.open(paths)
        plan = plan or IndexSettings.choose(len(files.keys), files.dimensions, kind)
        return cls._fill(files.keys, files.dimensions, files.chunks, plan, files.metadata, keep)

    @classmethod
    def _fill(
        cls,
        keys: pa.Array,
        width: int,
        chunks: Callable[[], Iterator[np.ndarray]],
        plan: IndexSettings,
        metadata: Mapping[str, str],
        keep: Path | None,
    ) -> Index:
        """Train on a subset, then add everything; two passes over the chunks."""
        if not len(keys):
            raise ValueError("vectors: there are none to index")
        if repeated := len(keys) - pc.count_distinct(keys).as_py():
            raise ValueError(f"keys: {repeated} of {len(keys)} repeat; each vector needs its own")
        if plan.training > len(keys):
            raise ValueError(f"plan: trains on {plan.training:,} vectors, but there are {len(keys):,}")
        if plan.dimensions != width:
            raise ValueError(f"plan: is for {plan.dimensions} dimensions, the vectors have {width}")
        engine = plan.make()
        if plan.kind == "ivfpq":
            chosen = np.zeros(len(keys), bool)
            chosen[np.random.default_rng(0).permutation(len(keys))[: plan.training]] = True
            at, parts = 0, []
            for chunk in chunks():
                parts.append(unit(chunk, at)[chosen[at : at + len(chunk)]])
                at += len(chunk)
            engine.train(np.concatenate(parts))
        kept = None
        if keep is not None and plan.kind == "ivfpq":
            kept = KeptVectors.create(keep, len(keys), plan.dimensions)
        at = 0
        for chunk in chunks():
            ready = unit(chunk, at)
            engine.add(ready)
            if kept is not None:
                kept.write(at, ready)
            at += len(chunk)
        if kept is not None:
            kept.flush()
        return cls(engine, keys, plan, metadata, kept)

    def search(
        self, queries: np.ndarray, k: int = 8, *, leave_out: np.ndarray | None = None, probes: int | None = None
    ) -> Answers:
        """The k vectors of the largest cosine with each query.

        Args:
            queries: [M, D] floating.
            k: Answers to each.
            leave_out: [M] row that may not be among the answers to each query: its own, where it is indexed too.
            probes: Lists of an IVF-PQ index to look at; the plan's number by default.

        Raises:
            ValueError: Dimensions differ, k is larger than the index, a number is not finite, a query has no direction, or a kept
                vector is damaged.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise ValueError(f"queries: need [M, {self.dimensions}] as this index has, got {queries.shape}")
        most = len(self) - (leave_out is not None)
        if not 1 <= k <= most:
            besides = " besides the query" if leave_out is not None else ""
            raise ValueError(f"k: must lie between 1 and the {most} vectors of this index{besides}, got {k}")
        if leave_out is not None and np.shape(leave_out) != (len(queries),):
            raise ValueError(f"leave_out: need a row for each of {len(queries)} queries, got {np.shape(leave_out)}")
        ready = unit(queries)
        wanted = k + (leave_out is not None)
        similarity, row = self._candidates(ready, wanted, probes)
        if leave_out is not None:
            own = row == np.asarray(leave_out)[:, None]
            own[~own.any(1), -1] = True  # it is not among them: the last one goes
            row, similarity = (a[~own].reshape(len(ready), k) for a in (row, similarity))
        names = self.keys.take(pa.array(row.reshape(-1)))
        return Answers(row, np.array(names.to_pylist(), object).reshape(row.shape), similarity)

    def _candidates(self, queries: np.ndarray, k: int, probes: int | None) -> tuple[np.ndarray, np.ndarray]:
        if self.plan.kind == "exact":
            return self._exact(queries, k, min(k + EXTRA, len(self)))
        fetched = k if self._kept is None else min(CANDIDATES * k, len(self))
        similarity, row = self._engine.search(queries, fetched, params=self.plan.parameters(probes))
        # A query whose lists hold too few vectors gets rows of -1; such a one looks at all lists.
        if (short := (row < 0).any(1)).any():
            everywhere = self.plan.parameters(self.plan.lists)
            similarity[short], row[short] = self._engine.search(queries[short], fetched, params=everywhere)
        if self._kept is None:
            return similarity, row
        return self._in_order(queries, row, k)

    def _exact(self, queries: np.ndarray, k: int, fetched: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS compares in float32; what it fetches beyond k must include all that rounding may have put below the k-th."""
        similarity, row = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        rounding = self.dimensions * float(np.finfo(np.float32).eps)  # of a sum of D products, in any order
        step = max(1, HELD // fetched)
        for start in range(0, len(queries), step):
            piece = slice(start, start + step)
            rough, found = self._engine.search(queries[piece], fetched)
            similarity[piece], row[piece] = self._in_order(queries[piece], found, k)
            unsure = start + np.flatnonzero(rough[:, -1] >= rough[:, k - 1] - 2 * rounding)
            if fetched < len(self) and len(unsure):
                similarity[unsure], row[unsure] = self._exact(queries[unsure], k, min(4 * fetched, len(self)))
        return similarity, row

    def _in_order(self, queries: np.ndarray, row: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best k of the candidates [M, f] by the exact cosine, the lower row first where it is equal."""
        row = np.sort(row, 1)
        similarity = np.stack([on_grid(self._stored(r)) @ on_grid(q) for r, q in zip(row, queries, strict=True)])
        order = np.argsort(-similarity, 1, kind="stable")[:, :k]
        return np.take_along_axis(similarity, order, 1).astype(np.float32), np.take_along_axis(row, order, 1)

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        """[len(rows), D] vectors as they are stored, in half precision beside an IVF-PQ index."""
        if self._kept is not None:
            return self._kept.rows(rows)
        import faiss

        return faiss.rev_swig_ptr(self._engine.get_xb(), len(self) * self.dimensions).reshape(len(self), -1)[rows]

    def find(self, key: str) -> int:
        """Row of a key.

        Raises:
            ValueError: No vector has it.
        """
        row = pc.index(self.keys, pa.scalar(key, pa.large_string())).as_py()
        if row < 0:
            raise ValueError(f"key {key!r}: none of the {len(self):,} here; they look like {self.keys[0].as_py()!r}")
        return int(row)

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """[len(rows), D] float32 unit vectors of rows.

        Raises:
            ValueError: The index holds codes only, or a kept vector is damaged.
        """
        if not self.has_vectors:
            raise ValueError(
                "vectors: this IVF-PQ index holds codes only; look the query up in its file of embeddings, or build the "
                "index with the vectors kept"
            )
        return self._stored(np.asarray(rows)).astype(np.float32)

    def check(self, metadata: Mapping[str, str], names: Sequence[str] = ORIGIN) -> None:
        """Refuse embeddings that the index's own cannot be compared with; what either does not know is not compared.

        Args:
            metadata: What the other embeddings say of themselves.
            names: What must agree.

        Raises:
            ValueError: They are from another survey, encoder or readout.
        """
        if problem := difference(self.metadata, metadata, names):
            raise ValueError(problem)

    def save(self, folder: Path) -> None:
        """Write index.faiss, keys.parquet, index.json and, where vectors are kept, these and their sums into a new folder.

        Raises:
            FileExistsError: There is something in the way.
        """
        import faiss

        if folder.exists():
            raise FileExistsError(f"{folder}: exists already; choose another place or delete it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        about = {"version": VERSION, "count": len(self), "plan": asdict(self.plan), "metadata": self.metadata}
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            faiss.write_index(self._engine, str(temporary / "index.faiss"))
            pq.write_table(pa.table({"key": self.keys}), temporary / "keys.parquet")
            if self._kept is not None:
                self._kept.save(temporary)
            about["files"] = {name: sha256_of(temporary / name) for name in HASHED if (temporary / name).exists()}
            (temporary / "index.json").write_text(json.dumps(sealed(about), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, metadata: Mapping[str, str] | None = None) -> Index:
        """Read what `save` wrote; kept vectors stay on disk.

        Args:
            folder: The folder.
            metadata: Of the embeddings that it will be searched with, to be refused where they do not fit.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: It is damaged, or of another survey, encoder or readout.
        """
        import faiss

        if not (folder / "index.json").is_file():
            raise FileNotFoundError(f"{folder}: no index here (index.json is missing)")
        try:
            about = unsealed(json.loads((folder / "index.json").read_text()))
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}, this program reads {VERSION}")
            hashed = about.get("files", {})  # of an earlier version: none, or no sums
            for name, digest in hashed.items():
                if name in HASHED and sha256_of(folder / name) != digest:
                    raise ValueError(f"{name} is damaged: its SHA-256 is not that of index.json; build the index again")
            plan = IndexSettings(**about["plan"])
            engine: Any = faiss.read_index(str(folder / "index.faiss"))
            keys = pq.read_table(folder / "keys.parquet")["key"].cast(pa.large_string()).combine_chunks()
            kept = KeptVectors.load(folder, plan.dimensions, checked=SUMS in hashed)
            found = {engine.ntotal, len(keys), about["count"], *([] if kept is None else [len(kept)])}
            if len(found) > 1 or engine.d != plan.dimensions:
                raise ValueError(f"its files disagree: {sorted(found)} vectors of {engine.d} dimensions")
            index = cls(engine, keys, plan, about["metadata"], kept)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: not a readable index: {error}") from error
        index.check(metadata or {})
        return index
