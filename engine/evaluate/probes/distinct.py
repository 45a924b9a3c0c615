"""Equal vectors, once each: so that they tie on every machine.

The last bit of a similarity depends on where a vector stands in the matrix product: BLAS takes other paths at the edges of
its blocks, and other blocks on other processors. Two equal vectors may so get similarities that differ, and their order,
which is no order at all, would decide ranks and votes. Products are therefore formed of distinct vectors only, in an order
of their own, and each result is given to all that are equal.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Distinct", "distinct"]


class Distinct(NamedTuple):
    """The U distinct rows of N vectors.

    Attributes:
        vectors: [U, D], in an order that does not depend on that of the N.
        of: [N] the distinct row that each is equal to.
        copies: [U] how many are equal to each.
    """

    vectors: np.ndarray
    of: np.ndarray
    copies: np.ndarray

    def mean(self, values: np.ndarray) -> np.ndarray:
        """[U, ...] means over equal vectors of [N, ...] values."""
        total = np.zeros((len(self.copies), *values.shape[1:]))
        np.add.at(total, self.of, values)
        return total / self.copies.reshape(-1, *[1] * (values.ndim - 1))


def distinct(vectors: np.ndarray) -> Distinct:
    """Find equal rows.

    Args:
        vectors: [N, D] floating; -0 equals 0.
    """
    plain = np.ascontiguousarray(vectors + 0.0)  # which turns -0 into 0, so that equal numbers have equal bytes
    rows = plain.view(np.dtype((np.void, plain.dtype.itemsize * plain.shape[1]))).reshape(-1)
    _, first, of, count = np.unique(rows, return_index=True, return_inverse=True, return_counts=True)
    return Distinct(plain[first], of.reshape(-1), count)
