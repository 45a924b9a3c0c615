"""A sky graph and its file: which rows of a survey's catalogue are neighbours, and how that was decided.

The file lies beside the survey, SURVEY/graph-NAME.safetensors: three arrays, and the record as JSON in its header.

Shape legend: N nodes (rows of catalog.parquet), E edges.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from armillary.engine.atomic_file import atomic_path
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sky_graph.spaces import SPACES, Space
from armillary.kernels.pixels.philox import check_seed
from armillary.models.file_hash import sha256_of

__all__ = ["GraphOptions", "GraphRecord", "Mode", "SkyGraph", "catalog_checksum", "graph_file"]

Mode = Literal["published", "leak-free", "inductive"]

FORMAT_VERSION = 1
ARRAYS = {"indptr": np.int64, "indices": np.int32, "left_out": np.bool_}


def catalog_checksum(folder: Path | str) -> str:
    """SHA-256 of a survey's catalog.parquet: rows, their order, positions, splits and labels."""
    return sha256_of(Path(folder) / "catalog.parquet")


def graph_file(folder: Path | str, name: str) -> Path:
    """The file beside a survey that holds the graph of this name."""
    return Path(folder) / f"graph-{name}.safetensors"


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """Which rows become neighbours.

    Attributes:
        space: Whose distance is compared, see `spaces`.
        mode: "published": every row may be everybody's neighbour. "leak-free": only rows of the split train may be seen.
            "inductive": rows see rows of their own split.
        k: Neighbours of a row, itself not counted; of no meaning in the comoving space.
        linking_length_mpc: Greatest comoving distance of neighbours; for the comoving space alone.
        redshift: Label with redshifts; for the comoving space alone. A model that sees such a graph has been told it.
        buffer_arcmin: Rows of train this near to a row of another split are left out; not for the mode published.
        symmetrise: Add the way back of every edge whose row may be seen.
        shuffle_seed: Shuffle the neighbours by this seed; None: keep the true ones.
    """

    space: Space = "spherical"
    mode: Mode = "published"
    k: int = 5
    linking_length_mpc: float | None = None
    redshift: str | None = None
    buffer_arcmin: float = 0.0
    symmetrise: bool = True
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse options that break a rule."""
        for name, word, known in (("space", self.space, SPACES), ("mode", self.mode, get_args(Mode))):
            if word not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, got {word!r}")
        if self.k < 1:
            raise ValueError(f"k: must be at least 1, got {self.k}")
        comoving = self.space == "comoving"
        for name in ("redshift", "linking_length_mpc"):
            if (getattr(self, name) is None) == comoving:
                rule = "must be given in" if comoving else "is for"
                raise ValueError(f"{name}: {rule} the comoving space; the space is {self.space}")
        if self.linking_length_mpc is not None and not 0 < self.linking_length_mpc < math.inf:
            raise ValueError(f"linking_length_mpc: must be positive and finite, got {self.linking_length_mpc}")
        if not 0 <= self.buffer_arcmin <= 60 * 180:
            raise ValueError(f"buffer_arcmin: must be at least 0 and at most 10800, got {self.buffer_arcmin}")
        if self.buffer_arcmin and self.mode == "published":
            raise ValueError("buffer_arcmin: is for the modes leak-free and inductive; the mode is published")
        if self.shuffle_seed is not None:
            check_seed(self.shuffle_seed)

    @property
    def name(self) -> str:
        """What a graph's file is called by: space, extent, mode, and what differs from the defaults."""
        extent = f"k{self.k}" if self.linking_length_mpc is None else f"{self.linking_length_mpc:g}mpc"
        parts = [self.space, extent, self.mode]
        parts += [f"buffer{self.buffer_arcmin:g}"] if self.buffer_arcmin else []
        parts += [] if self.symmetrise else ["directed"]
        return "-".join(parts + ([] if self.shuffle_seed is None else [f"shuffled{self.shuffle_seed}"]))


@dataclass(frozen=True)
class GraphRecord:
    """How a graph was made.

    Attributes:
        survey: Name of the survey.
        catalog_sha256: See `catalog_checksum`.
        rows: Nodes N.
        options: Which rows became neighbours.
        provenance: Commit, command, versions, fingerprint of the survey.
    """

    survey: str
    catalog_sha256: str
    rows: int
    options: GraphOptions
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SkyGraph:
    """Neighbours of every row, as a sparse matrix by rows (CSR).

    The neighbours of row i are indices[indptr[i] : indptr[i + 1]], ascending; every row is its own neighbour.

    Attributes:
        indptr: [N + 1] int64.
        indices: [E] int32.
        left_out: [N] bool, rows that the buffer took out: nothing but their own neighbour, and not to be trained on.
        record: How it was made.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    left_out: NDArray[np.bool_]
    record: GraphRecord

    @property
    def nodes(self) -> int:
        """Nodes N."""
        return len(self.indptr) - 1

    @property
    def edges(self) -> int:
        """Edges E, each direction counted, with the edge of each row to itself."""
        return len(self.indices)

    @property
    def isolated(self) -> int:
        """Nodes that are nothing but their own neighbour."""
        return int((np.diff(self.indptr) == 1).sum())

    def neighbours(self, row: int) -> NDArray[np.int32]:
        """Ascending rows that a row sees, itself among them."""
        return self.indices[self.indptr[row] : self.indptr[row + 1]]

    def save(self, path: Path) -> None:
        """Write the graph's file atomically."""
        from safetensors.numpy import save_file

        about = json.dumps({"format_version": FORMAT_VERSION, **asdict(self.record)})
        arrays = {name: getattr(self, name) for name in ARRAYS}
        with atomic_path(path) as temporary:
            save_file(arrays, temporary, {"armillary": about, "sha256": _digest(about, arrays)})

    @classmethod
    def open(cls, path: Path | str, survey: Path | str) -> SkyGraph:
        """Read a graph of a survey.

        Args:
            path: The graph's file.
            survey: Folder of the survey whose rows it is used for.

        Raises:
            FileNotFoundError: There is no such file or survey.
            ValueError: It is not a whole graph, or one of another survey.
        """
        from safetensors import SafetensorError

        described = Survey.load(survey)
        try:
            record, arrays = _read(Path(path))
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a readable sky graph: {error}") from error
        checksum = catalog_checksum(survey)
        if record.catalog_sha256 != checksum:
            raise ValueError(
                f"{path}: was made for the survey {record.survey!r} (catalogue {record.catalog_sha256[:12]}, "
                f"{record.rows:,} rows), not for {described.name!r} in {survey} (catalogue {checksum[:12]}, "
                f"{described.count():,} rows); make another with `armillary data graph {survey}`"
            )
        return cls(**arrays, record=record)


def _digest(about: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of a graph's record and arrays, as hex digits."""
    digest = hashlib.sha256(about.encode())
    for name in ARRAYS:
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[GraphRecord, dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        written = file.metadata()
        raw: Mapping[str, Any] = json.loads(written["armillary"])
        arrays = {name: file.get_tensor(name) for name in ARRAYS}
    if written.get("sha256") not in (None, _digest(written["armillary"], arrays)):  # none: of an earlier version
        raise ValueError("it is damaged: its SHA-256 differs; make it again with `armillary data graph`")
    if raw["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {raw['format_version']}, this program reads {FORMAT_VERSION}")
    fields = {name: value for name, value in raw.items() if name != "format_version"}
    record = GraphRecord(**fields | {"options": GraphOptions(**raw["options"])})
    indptr, indices = arrays["indptr"], arrays["indices"]
    sound = (
        all(arrays[name].dtype == dtype and arrays[name].ndim == 1 for name, dtype in ARRAYS.items())
        and len(indptr) == record.rows + 1 == len(arrays["left_out"]) + 1
        and indptr[0] == 0
        and indptr[-1] == len(indices)
        and (np.diff(indptr) >= 1).all()
        and indices.min(initial=0) >= 0
        and indices.max(initial=0) < record.rows
    )
    if not sound:
        raise ValueError("its arrays are not those of a graph over its rows")
    return record, arrays
