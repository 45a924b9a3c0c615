"""A galaxy's neighbours on the sky as inputs: rows of a sky graph, sampled, and the features of every row that is seen.

Training draws them anew in each epoch, keyed by the sample's position; an evaluation draws them once, keyed by its row.

Labels of neighbours may be shown where the galaxy's own are to be predicted ("masked label prediction", Shi et al. 2021,
arXiv:2009.03509): a training set's redshifts or types are known when a new galaxy is looked at. The galaxy's own values are then
hidden from it, also on the way back over a neighbour. Of a leak-free graph these are labels of the split train only; an
inductive or a published graph shows those of the test split too, which is a leak.

Shape legend: B samples, U rows seen as their neighbours, S graphs, f1 and f2 neighbours, F features, N rows of the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from armillary.engine.data.format.columns import Columns, column_problems
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.vector_files import read_vectors
from armillary.models.method import Batch

if TYPE_CHECKING:
    from armillary.engine.data.sky_graph.graph import SkyGraph

# Graphs and tables are imported where they are read: every recipe imports this module, and most read neither.

__all__ = ["NeighbourInput", "Neighbours"]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The recipe's description of neighbours.

    Attributes:
        graphs: Names of graphs that `armillary data graph` wrote beside the survey (NAME of graph-NAME.safetensors): one for
            each space of the model, or one for all.
        columns: Columns of the catalogue that are features of every galaxy, standardised by the training split; 0 where
            unknown.
        embeddings: File of `armillary embed` with a vector for every galaxy of the survey, which are features as they are.
        shown: Columns that are shown of neighbours and hidden of the galaxy itself: its labels. Two features each, the
            standardised value and whether it is known.
        fan_outs: Neighbours f1 of a galaxy, and f2 of each of these; both 0: the galaxy alone.
        walks: Random walks from each node: its neighbours are then the rows that these come to most often. 0: neighbours are drawn
            evenly.
        walk_length: Steps of a walk.
    """

    graphs: tuple[str, ...] = ("euclidean-k5-inductive", "hyperbolic-k5-inductive", "spherical-k5-inductive")
    columns: tuple[str, ...] = ()
    embeddings: Path | None = None
    shown: tuple[str, ...] = ()
    fan_outs: tuple[int, int] = (5, 5)
    walks: int = 0
    walk_length: int = 5

    @property
    def standardised(self) -> tuple[str, ...]:
        """Columns whose moments the model keeps."""
        return self.columns + self.shown

    def problems(self, survey: Survey) -> list[str]:
        """Every rule that is broken for a survey, as `views.neighbours.field: rule, got value`; empty if none."""
        from armillary.engine.data.sky_graph.sampling import STREAMS

        field = "views.neighbours"
        found: list[str] = []
        if not (self.columns or self.embeddings or self.shown):
            found.append(f"{field}: need columns, embeddings or shown labels as features, got none of them")
        if not self.graphs:
            found.append(f"{field}.graphs: must name at least one graph, got none")
        if min(self.fan_outs) < 0 or (self.fan_outs[0] == 0) != (self.fan_outs[1] == 0):
            found.append(f"{field}.fan_outs: must both be at least 1, or both 0, got {self.fan_outs}")
        if self.walk_length < 1 or not 0 <= self.walks * (1 + self.fan_outs[0]) <= STREAMS:
            found.append(
                f"{field}.walks: must be at least 0, of at least 1 step, and at most {STREAMS:,} for a galaxy and its "
                f"{self.fan_outs[0]} neighbours, got {self.walks} of {self.walk_length}"
            )
        if both := set(self.columns) & set(self.shown):
            found.append(f"{field}.shown: must be no features of the galaxy itself, got {sorted(both)[0]!r} in both")
        found += column_problems(survey, f"{field}.columns", self.columns)
        found += column_problems(survey, f"{field}.shown", self.shown)
        if not found:
            try:
                NeighbourInput.of(self, survey)
            except (OSError, ValueError) as error:
                found.append(f"{field}: {error}")
        return found


@dataclass(frozen=True)
class NeighbourInput:
    """`Neighbours` fixed for a survey.

    Attributes:
        settings: What was asked for.
        graphs: S sky graphs of the survey.
        columns: Its columns and shown labels; None where there are none.
        vectors: [N, V] float32 embeddings by row; V may be 0.
        left_out: [N] bool, rows that the buffer of a leak-free graph took out.
    """

    settings: Neighbours
    graphs: tuple[SkyGraph, ...]
    columns: Columns | None
    vectors: np.ndarray
    left_out: np.ndarray

    @classmethod
    def of(cls, settings: Neighbours, survey: Survey) -> NeighbourInput:
        """Open the graphs and features of a survey that was loaded from its folder.

        Raises:
            FileNotFoundError: A graph or the embeddings are not there.
            ValueError: A graph is damaged or of another survey, or a row has no embedding.
        """
        from armillary.engine.data.sky_graph.graph import graph_file

        assert survey.folder is not None, "a survey that was loaded from its folder"
        graphs = []
        for name in settings.graphs:
            path = graph_file(survey.folder, name)
            if not path.is_file():
                have = ", ".join(p.stem.removeprefix("graph-") for p in sorted(survey.folder.glob("graph-*"))) or "none"
                raise FileNotFoundError(
                    f"graphs: {survey.folder} has no graph {name!r}, only {have}; make it with `armillary data graph`"
                )
            graphs.append(_opened(path, survey.folder, _stamp(path, survey.folder)))
        vectors = np.zeros((graphs[0].nodes, 0), np.float32)
        if settings.embeddings is not None:
            vectors = _vectors(settings.embeddings, survey)
        names = settings.standardised
        left_out = np.logical_or.reduce([graph.left_out for graph in graphs])
        return cls(settings, tuple(graphs), Columns.read(survey, names) if names else None, vectors, left_out)

    @property
    def features(self) -> int:
        """Features F of a node."""
        return self.vectors.shape[1] + len(self.settings.columns) + 2 * len(self.settings.shown)

    def scaled(self, mean: tuple[float, ...], std: tuple[float, ...]) -> NeighbourInput:
        """The same with columns standardised by other moments: those of the survey that a model was trained on."""
        return self if self.columns is None else replace(self, columns=self.columns.scaled(mean, std))

    def of_batch(self, batch: Batch, *, seed: int | None = None, epoch: int = 0) -> Batch:
        """A batch with neighbours.

        Args:
            batch: With `row`, and `position` where there is a seed.
            seed: The run's seed; None: keyed by the row, the same each time.
            epoch: Which pass over the survey.

        Returns:
            The batch with `node_features`, `node_row`, `neighbours` and `left_out`, see `Batch`.
        """
        device = batch["row"].device
        rows = batch["row"].cpu().numpy()
        position = rows if seed is None else batch["position"].cpu().numpy()
        seen = np.stack([self._sampled(graph, rows, position, seed or 0, epoch) for graph in self.graphs], 1)
        if self.settings.shown:  # its own label would come back over a neighbour
            seen[seen == rows[:, None, None, None]] = -1
            seen[..., 1:][seen[..., 0] < 0] = -1
        others, places = np.unique(seen, return_inverse=True)
        none = int(others.size > 0 and others[0] < 0)  # -1, where it occurs, is the least
        nodes = np.concatenate([rows, others[none:]])
        features = self._features(nodes)
        hidden = 2 * len(self.settings.shown)
        features[: len(rows), features.shape[1] - hidden :] = 0
        places = np.where(seen < 0, -1, places.reshape(seen.shape) - none + len(rows))
        out: Batch = batch.copy()
        out["node_features"] = torch.from_numpy(features).to(device)
        out["node_row"] = torch.from_numpy(nodes).to(device)
        out["neighbours"] = torch.from_numpy(places).to(device)
        out["left_out"] = torch.from_numpy(self.left_out[rows]).to(device)
        return out

    def _sampled(self, graph: SkyGraph, rows: np.ndarray, position: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """[B, f1, 1 + f2] rows: a neighbour, and some of its own."""
        from armillary.engine.data.sky_graph.sampling import sample_neighbours, walked_neighbours

        wanted = self.settings
        if not wanted.fan_outs[0]:
            return np.zeros((len(rows), 0, 1), np.int64)
        if wanted.walks:
            near, far = walked_neighbours(
                graph, rows, wanted.fan_outs, walks=wanted.walks, length=wanted.walk_length, position=position, seed=seed, epoch=epoch
            )  # fmt: skip
        else:
            near, far = sample_neighbours(graph, rows, wanted.fan_outs, position=position, seed=seed, epoch=epoch)
        return np.concatenate([near[..., None], far], -1)

    def _features(self, nodes: np.ndarray) -> np.ndarray:
        """[n, F] float32 features of rows; labels that are shown come last."""
        parts = [self.vectors[nodes]]
        if self.columns is not None:
            values = self.columns.values[torch.from_numpy(nodes)].numpy()
            known = np.isfinite(values)
            values = np.where(known, values, np.float32(0))
            own = len(self.settings.columns)
            parts += [values[:, :own], values[:, own:], known[:, own:].astype(np.float32)]
        return np.concatenate(parts, 1)


def _stamp(path: Path, survey: Path) -> tuple[int, int]:
    """When a file and the survey's catalogue were written: what was read of them holds as long as that."""
    return path.stat().st_mtime_ns, (survey / "catalog.parquet").stat().st_mtime_ns


@lru_cache(maxsize=8)  # checks, input spec and views of a run all ask for the same
def _opened(path: Path, survey: Path, _: tuple[int, int]) -> SkyGraph:
    from armillary.engine.data.sky_graph.graph import SkyGraph

    return SkyGraph.open(path, survey)


def _vectors(path: Path, survey: Survey) -> np.ndarray:
    """[N, V] float32 vectors of a file of embeddings, which has one for every row of the survey's catalogue."""
    from armillary.engine.data.format.catalog import (
        read_catalog,  # here, since recipes import this module, and Arrow starts threads
    )

    assert survey.folder is not None
    vectors = read_vectors(path, survey).numpy()
    missing = np.flatnonzero(np.isnan(vectors).any(1))
    if len(missing):
        first = read_catalog(survey, ["key"])["key"][int(missing[0])].as_py()
        raise ValueError(
            f"embeddings: {len(missing)} of {len(vectors)} galaxies have no vector in {path}, first {first!r}; embed all "
            "splits of this survey"
        )
    return vectors
