"""The two-dimensional map of embeddings: made once, and kept beside them with its recipe.

    NAME.tsne.parquet, NAME.pca.parquet     columns key, x, y (float32), in the order of the embeddings; the schema's metadata
                                            says how the map was made

t-SNE (van der Maaten & Hinton 2008; Barnes-Hut, van der Maaten 2014; by scikit-learn) is made of at most `WHOLE` embeddings. Of
a larger set it is made of a sample of that size, and every other object is put among its nearest neighbours in the sample.

Shape legend: N embeddings, D dimensions, M of them in the sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from armillary.engine.atomic_file import atomic_path
from armillary.engine.data.format.embedding_files import METADATA_KEY, EmbeddingFiles
from armillary.engine.evaluate.search.vectors import difference, unit

__all__ = ["WHOLE", "EmbeddingMap", "MapChoice", "Method", "make_map", "map_file", "open_map", "read_map"]

Method = Literal["tsne", "pca"]
MapChoice = Literal["auto", "tsne", "pca"]

WHOLE = 20_000
"""Embeddings that t-SNE is made of, at most."""

COMPONENTS = 50  # principal components that t-SNE sees, as is usual
PERPLEXITY = 30.0
NEIGHBOURS = 5  # of the sample, among which another object is put
LEAST = 4  # objects of a t-SNE


@dataclass(frozen=True)
class EmbeddingMap:
    """Where embeddings lie in two dimensions.

    Attributes:
        point: [N, 2] float32, in the order of the embeddings.
        recipe: How it was made: method, settings, versions, and where the embeddings come from.
    """

    point: np.ndarray
    recipe: dict[str, Any]

    @property
    def sentence(self) -> str:
        """The recipe in a few words."""
        r = self.recipe
        if r.get("method") == "pca":
            return f"PCA: two components with {100 * r['variance']:.0f}% of the variance of unit vectors"
        if r.get("method") != "tsne":
            return f"map of {r.get('file', 'a file')}"
        of = f"{r['sample']:,} embeddings" if r["sample"] == len(self.point) else f"a sample of {r['sample']:,}"
        return f"t-SNE of {of}, perplexity {r['perplexity']:g}, seed {r['seed']}, scikit-learn {r['scikit_learn']}"


def map_file(embeddings: Path, method: Method) -> Path:
    """Where the map of a file or folder of embeddings is kept: beside it."""
    return embeddings.with_name(f"{embeddings.name.removesuffix('.parquet')}.{method}.parquet")


def open_map(files: EmbeddingFiles, choice: str | Path = "auto", say: Callable[[str], None] = print) -> EmbeddingMap:
    """The kept map of embeddings, or one that is made now and kept.

    Args:
        files: The embeddings.
        choice: "tsne", "pca" or the path of a Parquet file with columns key, x and y; or "auto": a kept t-SNE, else a new one
            of up to `WHOLE` embeddings, else PCA.
        say: Is told what takes time, and where a map could not be kept.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no map of these embeddings.
    """
    if choice not in get_args(MapChoice):
        return read_map(Path(choice), files)
    method: Method = "pca" if choice == "pca" else "tsne"
    if (kept := map_file(files.path, method)).is_file():
        return read_map(kept, files)
    if choice == "auto" and len(files) > WHOLE:
        say(f"a PCA of {len(files):,} embeddings; --map tsne makes a t-SNE map, which takes longer, once")
        method = "pca"
        if (kept := map_file(files.path, method)).is_file():
            return read_map(kept, files)
    elif method == "tsne":
        say(f"t-SNE of {min(len(files), WHOLE):,} embeddings, once ...")
    made = make_map(files, method)
    try:
        _save(kept, made, files)
    except OSError as error:
        say(f"the map cannot be kept, and will be made again: {error}")
    return made


def read_map(path: Path, files: EmbeddingFiles) -> EmbeddingMap:
    """Read a map that was kept, or one from elsewhere with columns key, x and y.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no map, or not of these embeddings.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"map: must be auto, tsne, pca or a Parquet file, got {str(path)!r}, which is not there"
        )
    try:
        table: Any = pq.read_table(path, columns=["key", "x", "y"])
        recipe = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
        point = np.stack([np.asarray(table[name], np.float32) for name in "xy"], 1)
    except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a map (columns key, x, y): {error}") from error
    if problem := difference(files.metadata, recipe.get("origin", {})):
        raise ValueError(f"{path}: is the map of other embeddings: {problem}; delete it or move it away")
    keys = files.keys().combine_chunks()
    known = table["key"].cast(pa.large_string()).combine_chunks()
    if not keys.equals(known):
        place = pc.index_in(keys, value_set=known)
        if place.null_count:
            raise ValueError(f"{path}: has no place for {place.null_count:,} of {len(keys):,} embeddings")
        point = point[place.to_numpy()]
    if not np.isfinite(point).all():
        raise ValueError(f"{path}: x and y must be finite")
    return EmbeddingMap(point, recipe or {"file": path.name})


def _save(path: Path, made: EmbeddingMap, files: EmbeddingFiles) -> None:
    about = {**made.recipe, "origin": files.metadata}
    columns = {"key": files.keys(), "x": pa.array(made.point[:, 0]), "y": pa.array(made.point[:, 1])}
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(about)})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def make_map(files: EmbeddingFiles, method: Method, seed: int = 0, whole: int = WHOLE) -> EmbeddingMap:
    """Make a map of unit vectors, in pieces: the embeddings never lie in memory together.

    Args:
        files: The embeddings.
        method: "tsne" or "pca"; fewer than `LEAST` objects get a PCA.
        seed: Of the sample and of t-SNE.
        whole: Embeddings that t-SNE is made of, at most.

    Raises:
        ValueError: A number is not finite, or a vector has no direction.
    """
    mean, axes, share = _principal_axes(files, 2 if method == "pca" else COMPONENTS)
    reduced = np.concatenate([(unit(chunk) - mean) @ axes for chunk in files.chunks()])  # [N, at most COMPONENTS]
    if method == "pca" or len(reduced) < LEAST:
        point = np.zeros((len(reduced), 2), np.float32)
        point[:, : reduced.shape[1]] = reduced[:, :2]
        return EmbeddingMap(point, {"method": "pca", "variance": float(share[:2].sum())})
    return _tsne(reduced, seed, whole)


def _principal_axes(files: EmbeddingFiles, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], principal axes [D, at most count] and their shares of the variance."""
    total = np.zeros(files.dimensions)
    square = np.zeros((files.dimensions, files.dimensions))
    for chunk in files.chunks():
        ready = unit(chunk).astype(np.float64)
        total += ready.sum(0)
        square += ready.T @ ready
    mean = total / len(files)
    value, axes = np.linalg.eigh(square / len(files) - np.outer(mean, mean))
    value, axes = np.maximum(value[::-1][:count], 0), axes[:, ::-1][:, :count]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])  # else either sign would do
    everything = max(float(np.trace(square) / len(files) - mean @ mean), 1e-30)
    return mean.astype(np.float32), axes.astype(np.float32), value / everything


def _tsne(reduced: np.ndarray, seed: int, whole: int) -> EmbeddingMap:
    import sklearn
    from sklearn.manifold import TSNE

    count = len(reduced)
    sample = np.sort(np.random.default_rng(seed).permutation(count)[:whole])
    chosen = reduced[sample]
    perplexity = min(PERPLEXITY, (len(chosen) - 1) / 3)
    # Begins as the PCA, so that the map keeps its large scales (Kobak & Berens 2019).
    begin = chosen[:, :2] * (1e-4 / max(float(chosen[:, 0].std()), 1e-30))
    if begin.shape[1] < 2:
        begin = np.pad(begin, ((0, 0), (0, 1)))
    model = TSNE(2, perplexity=perplexity, init=begin, learning_rate="auto", random_state=seed)
    placed = model.fit_transform(chosen).astype(np.float32)
    point = placed if len(sample) == count else _among(reduced, chosen, placed)
    recipe = {"method": "tsne", "sample": len(sample), "perplexity": perplexity, "seed": seed}
    return EmbeddingMap(point, {**recipe, "components": reduced.shape[1], "scikit_learn": sklearn.__version__})


def _among(reduced: np.ndarray, chosen: np.ndarray, placed: np.ndarray) -> np.ndarray:
    """[N, 2]: each object in the mean of its nearest neighbours in the sample, weighted by inverse squared distance."""
    import faiss

    index: Any = faiss.IndexFlatL2(chosen.shape[1])
    index.add(np.ascontiguousarray(chosen))
    point = np.empty((len(reduced), 2), np.float32)
    step = 1 << 16
    for start in range(0, len(reduced), step):
        square, near = index.search(np.ascontiguousarray(reduced[start : start + step]), NEIGHBOURS)
        weight = 1 / np.maximum(square, 1e-9)  # one of the sample lies on itself
        point[start : start + step] = (placed[near] * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
    return point
