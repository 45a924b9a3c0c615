"""The two-dimensional map of embeddings: made once, and kept beside them with its recipe.

    NAME.tsne.parquet, NAME.umap.parquet,     columns key, x, y (float32), in the order of the embeddings; the schema's
    NAME.pca.parquet                          metadata says how the map was made

t-SNE (van der Maaten & Hinton 2008; Barnes-Hut, van der Maaten 2014; by scikit-learn) and UMAP (McInnes et al. 2018,
arXiv:1802.03426; by umap-learn, extra `umap`) are made of at most `WHOLE` embeddings. Of a larger set they are made of a sample of
that size, and every other object is put among its nearest neighbours in the sample.

Shape legend: N embeddings, D dimensions, M of them in the sample.
"""

from __future__ import annotations

import importlib.util
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

__all__ = [
    "CHOICES",
    "WHOLE",
    "EmbeddingMap",
    "MapChoice",
    "Method",
    "choice_problem",
    "make_map",
    "map_file",
    "open_map",
    "read_map",
]

Method = Literal["tsne", "umap", "pca"]
MapChoice = Literal["auto", "tsne", "umap", "pca"]
CHOICES: tuple[MapChoice, ...] = get_args(MapChoice)

WHOLE = 20_000
"""Embeddings that t-SNE and UMAP are made of, at most."""

COMPONENTS = 50  # principal components that they see, as is usual
PERPLEXITY = 30.0
UMAP_NEIGHBOURS = 15  # umap-learn's own default, as is the least distance
LEAST_DISTANCE = 0.1
NEIGHBOURS = 5  # of the sample, among which another object is put
LEAST = 4  # objects of a t-SNE or a UMAP


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
        if r.get("method") not in ("tsne", "umap"):
            return f"map of {r.get('file', 'a file')}"
        of = f"{r['sample']:,} embeddings" if r["sample"] == len(self.point) else f"a sample of {r['sample']:,}"
        if r["method"] == "tsne":
            return f"t-SNE of {of}, perplexity {r['perplexity']:g}, seed {r['seed']}, scikit-learn {r['scikit_learn']}"
        settings = f"{r['neighbours']} neighbours, least distance {r['least_distance']:g}, seed {r['seed']}"
        return f"UMAP of {of}, {settings}, umap-learn {r['umap_learn']}"


def map_file(embeddings: Path, method: Method) -> Path:
    """Where the map of a file or folder of embeddings is kept: beside it."""
    return embeddings.with_name(f"{embeddings.name.removesuffix('.parquet')}.{method}.parquet")


def choice_problem(files: EmbeddingFiles, choice: MapChoice | Path) -> str:
    """Why this map of embeddings can neither be read nor made; empty if it can."""
    if choice == "umap" and not map_file(files.path, choice).is_file() and importlib.util.find_spec("umap") is None:
        return "map: umap needs umap-learn, `pip install 'armillary[umap]'`, which is not installed"
    if isinstance(choice, Path) and not choice.is_file():
        return f"map: must be {', '.join(CHOICES)} or a Parquet file, got '{choice}', which is not there"
    return ""


def open_map(
    files: EmbeddingFiles, choice: MapChoice | Path = "auto", say: Callable[[str], None] = print
) -> EmbeddingMap:
    """The kept map of embeddings, or one that is made now and kept.

    Args:
        files: The embeddings.
        choice: "tsne", "umap" or "pca"; a Parquet file with columns key, x and y; or "auto": a kept t-SNE, else a new one of
            up to `WHOLE` embeddings, else PCA.
        say: Is told what takes time, and where a map could not be kept.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: umap-learn is not there.
        ValueError: The file is no map of these embeddings.
    """
    if isinstance(choice, Path):
        return read_map(choice, files)
    method: Method = "tsne" if choice == "auto" else choice
    if (kept := map_file(files.path, method)).is_file():
        return read_map(kept, files)
    if choice == "auto" and len(files) > WHOLE:
        say(f"a PCA of {len(files):,} embeddings; --map tsne makes a t-SNE map, which takes longer, once")
        method = "pca"
        if (kept := map_file(files.path, method)).is_file():
            return read_map(kept, files)
    elif method != "pca":
        name = {"tsne": "t-SNE", "umap": "UMAP"}[method]
        say(f"{name} of {min(len(files), WHOLE):,} embeddings, once ...")
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
        raise FileNotFoundError(f"{path}: no such map; need a Parquet file with columns key, x and y, or tsne or pca")
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
        method: "tsne", "umap" or "pca"; fewer than `LEAST` objects get a PCA.
        seed: Of the sample, of t-SNE and of UMAP.
        whole: Embeddings that t-SNE and UMAP are made of, at most.

    Raises:
        ModuleNotFoundError: umap-learn is not there.
        ValueError: A number is not finite, or a vector has no direction.
    """
    mean, axes, share = _principal_axes(files, 2 if method == "pca" else COMPONENTS)
    reduced = np.concatenate([(unit(chunk) - mean) @ axes for chunk in files.chunks()])  # [N, at most COMPONENTS]
    if method == "pca" or len(reduced) < LEAST:
        point = np.zeros((len(reduced), 2), np.float32)
        point[:, : reduced.shape[1]] = reduced[:, :2]
        return EmbeddingMap(point, {"method": "pca", "variance": float(share[:2].sum())})
    count = len(reduced)
    sample = np.sort(np.random.default_rng(seed).permutation(count)[:whole])
    chosen = reduced[sample]
    # Begins as the PCA, so that the map keeps its large scales (Kobak & Berens 2019).
    begin = chosen[:, :2] / max(float(chosen[:, 0].std()), 1e-30)
    if begin.shape[1] < 2:
        begin = np.pad(begin, ((0, 0), (0, 1)))
    placed, recipe = (_tsne if method == "tsne" else _umap)(chosen, begin, seed)
    point = placed if len(sample) == count else _among(reduced, chosen, placed)
    about = {"method": method, "sample": len(sample), "seed": seed, "components": reduced.shape[1]}
    return EmbeddingMap(point, about | recipe)


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


def _tsne(chosen: np.ndarray, begin: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    import sklearn
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(chosen) - 1) / 3)
    model = TSNE(2, perplexity=perplexity, init=1e-4 * begin, learning_rate="auto", random_state=seed)
    placed = model.fit_transform(chosen).astype(np.float32)
    return placed, {"perplexity": perplexity, "scikit_learn": sklearn.__version__}


def _umap(chosen: np.ndarray, begin: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    import umap

    neighbours = min(UMAP_NEIGHBOURS, len(chosen) - 1)
    # UMAP divides by the width of each axis, which must not be 0.
    begin = begin + 1e-4 * np.random.default_rng(seed).standard_normal(begin.shape)
    settings = {"n_neighbors": neighbours, "min_dist": LEAST_DISTANCE, "init": begin.astype(np.float32)}
    placed = umap.UMAP(**settings, n_jobs=1, random_state=seed).fit_transform(chosen).astype(np.float32)
    return placed, {"neighbours": neighbours, "least_distance": LEAST_DISTANCE, "umap_learn": umap.__version__}


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
