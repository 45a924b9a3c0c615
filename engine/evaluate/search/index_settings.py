"""How an index of vectors is laid out: exact, or an inverted file of product-quantised vectors, and the bytes it takes.

Shape legend: N indexed vectors, D embedding dimensions, m bytes of a code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Kind", "IndexSettings"]

Kind = Literal["exact", "ivfpq", "auto"]

EXACT_BYTES = 4 << 30  # the largest exact index that "auto" makes: a million vectors of 1024 dimensions
CODES = 256  # values of a byte of a code
LEAST_POINTS = 39  # training vectors a centroid, FAISS's least for k-means
POINTS = 64  # training vectors a centroid, where there are as many
OPQ_ROUNDS, OPQ_STEPS = 10, 4  # of fitting rotation and codes in turn, and k-means steps in each
LARGEST_CODE = 64  # bytes
LONGEST_PIECE = 32  # dimensions that share a byte
ID_BYTES = 8  # row number beside each code
LEAST_PROBES = 16


@dataclass(frozen=True)
class IndexSettings:
    """Layout of an index. Fields but the first two matter to "ivfpq" only.

    Attributes:
        kind: "exact" or "ivfpq".
        dimensions: D.
        lists: Lists of the inverted file: its coarse centroids.
        code_bytes: m, a divisor of D; each byte stands for D / m rotated dimensions.
        probes: Lists that a query looks at.
        training: Vectors that centroids, rotation and codes are fitted on; they lie in memory while the index is built.
    """

    kind: Literal["exact", "ivfpq"]
    dimensions: int
    lists: int = 0
    code_bytes: int = 0
    probes: int = 0
    training: int = 0

    def __post_init__(self) -> None:
        """Check the settings against each other."""
        if self.kind not in ("exact", "ivfpq"):
            raise ValueError(f"kind: must be exact, ivfpq or auto, got {self.kind!r}")
        if self.dimensions < 1:
            raise ValueError(f"dimensions: must be at least 1, got {self.dimensions}")
        if self.kind == "exact":
            return
        if self.code_bytes < 1 or self.dimensions % self.code_bytes:
            raise ValueError(f"code_bytes: must divide the {self.dimensions} dimensions, got {self.code_bytes}")
        if not 1 <= self.probes <= self.lists:
            raise ValueError(f"probes: must lie between 1 and the {self.lists} lists, got {self.probes}")
        least = LEAST_POINTS * max(self.lists, CODES)
        if self.training < least:
            raise ValueError(
                f"ivfpq: needs {least:,} vectors or more to train ({LEAST_POINTS} for each of "
                f"{max(self.lists, CODES)} centroids), got {self.training:,}; use an exact index"
            )

    @classmethod
    def choose(
        cls,
        count: int,
        dimensions: int,
        kind: Kind = "auto",
        *,
        lists: int | None = None,
        code_bytes: int | None = None,
        probes: int | None = None,
    ) -> IndexSettings:
        """Settings for N vectors.

        There are 4 sqrt(N) lists, rounded to a power of two, fewer where that leaves too few training vectors for each;
        probes are a 256th of them and at least 16; codes have the most bytes up to 64 that divide D; the training set
        holds 64 vectors a list, and no fewer than 65,536.

        Args:
            count: N.
            dimensions: D.
            kind: "auto" is exact up to 4 GiB of float32 vectors.
            lists: In place of the rule.
            code_bytes: In place of the rule.
            probes: In place of the rule.

        Raises:
            ValueError: There are too few vectors to train, or D has no suitable divisor.
        """
        if kind == "auto":
            kind = "exact" if 4 * count * dimensions <= EXACT_BYTES else "ivfpq"
        if kind != "ivfpq":
            return cls(kind, dimensions)
        if lists is None:
            lists = 2 ** round(math.log2(4 * math.sqrt(max(count, 1))))
            while lists > 1 and LEAST_POINTS * lists > count:
                lists //= 2
        if code_bytes is None:
            code_bytes = max(b for b in range(1, min(dimensions, LARGEST_CODE) + 1) if dimensions % b == 0)
            if dimensions > LONGEST_PIECE * code_bytes:
                raise ValueError(
                    f"dimensions: {dimensions} have no divisor from {math.ceil(dimensions / LONGEST_PIECE)} to "
                    f"{LARGEST_CODE} for the bytes of a code; give code_bytes, or use an exact index"
                )
        if probes is None:
            probes = min(lists, max(LEAST_PROBES, lists // 256))
        return cls("ivfpq", dimensions, lists, code_bytes, probes, min(count, max(POINTS * lists, CODES * 256)))

    def memory_bytes(self, count: int) -> int:
        """Bytes of an index of N vectors without its keys.

        Exact: 4 N D. IVF-PQ: N (m + 8) for codes and row numbers, 4 lists D for the centroids, 4 D^2 for the rotation and
        4 * 256 D for the codes' values. While it is built, twice 4 training D come on top, and a piece of the input.
        """
        if self.kind == "exact":
            return 4 * count * self.dimensions
        shared = 4 * self.dimensions * (self.lists + self.dimensions + CODES)
        return count * (self.code_bytes + ID_BYTES) + shared

    def make(self) -> Any:
        """An empty FAISS index of this layout."""
        import faiss

        if self.kind == "exact":
            return faiss.IndexFlatIP(self.dimensions)
        text = f"OPQ{self.code_bytes},IVF{self.lists},PQ{self.code_bytes}"
        index: Any = faiss.index_factory(self.dimensions, text, faiss.METRIC_INNER_PRODUCT)
        ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        ivf.do_polysemous_training = False  # reorders codes for a filter that is not used here; takes most of the time
        ivf.pq.cp.max_points_per_centroid = POINTS
        rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
        rotation.niter, rotation.niter_pq, rotation.niter_pq_0 = OPQ_ROUNDS, OPQ_STEPS, OPQ_ROUNDS
        rotation.max_train_points = POINTS * CODES
        return index

    def parameters(self, probes: int | None = None) -> Any:
        """FAISS's parameters of a search.

        Args:
            probes: Lists to look at; the plan's number by default.

        Raises:
            ValueError: There are not as many lists.
        """
        import faiss

        library: Any = faiss  # its stubs know no keyword arguments
        probes = self.probes if probes is None else probes
        if not 1 <= probes <= self.lists:
            raise ValueError(f"probes: must lie between 1 and the {self.lists} lists, got {probes}")
        return library.SearchParametersPreTransform(index_params=library.SearchParametersIVF(nprobe=probes))
