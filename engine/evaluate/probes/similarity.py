"""Cosines and distances that depend on the two vectors alone: equal vectors are equally far, on every machine.

A product of matrices adds its terms in an order that depends on the processor, the threads and the place of a row. So
equal vectors get cosines that differ in the last bit, and what is decided by comparing them (ranks, ties, the k-th
neighbour) depends on the order of the samples. Rounding the cosines would only move the fault to the edges of the
rounding. Here the components are rounded before the product, to multiples of 2^-25 of a length of 1. Products of two are
then multiples of 2^-50, and no partial sum exceeds 2 (Cauchy and Schwarz), so float64 holds every one of them exactly, in
any order. What is computed has no rounding error at all; only its inputs were rounded. For D dimensions this moves a
cosine by 2^-25 sqrt(D) at most, and typically by 1e-8, less than a product in float32 does.

Shape legend: N training samples, M queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

__all__ = ["GRID", "Metric", "on_grid", "within_nearest"]

Metric = Literal["cosine", "euclidean"]

GRID = 2.0**25  # steps of a length of 1
PIECE = 2**22  # distances held at a time


def on_grid(vectors: np.ndarray) -> np.ndarray:
    """[N, D] float64 vectors rounded to 2^-25, so that `a @ b.T` of two such arrays is exact.

    Args:
        vectors: [N, D], none longer than 1 by more than rounding.
    """
    return np.rint(np.asarray(vectors, np.float64) * GRID) / GRID


def within_nearest(
    train: np.ndarray, query: np.ndarray, count: int, metric: Metric
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Training samples that are no farther than the `count`-th nearest; more than `count` where that one is tied.

    Args:
        train: [N, D] finite.
        query: [M, D] finite.
        count: 1 to N.
        metric: Euclidean, or 1 - cosine, for which a vector of zeros is at 1/2 from all others.

    Yields:
        A slice of the queries and, by increasing query and sample, the query's place in the slice, the sample and their
        distance.
    """
    train, query = (np.ascontiguousarray(v, np.float64) for v in (train, query))
    if metric == "cosine":
        train, query = _directions(train), _directions(query)
    else:  # a power of two, so that dividing by it rounds nothing
        longest = max(float(_lengths(v).max()) for v in (train, query))
        scale = 2.0 ** np.ceil(np.log2(longest)) if longest > 0 else 1.0
        train, query = train / scale, query / scale
    train, query = on_grid(train), on_grid(query)
    squares = [np.square(v).sum(1) for v in (train, query)]
    step = max(1, PIECE // len(train))
    for start in range(0, len(query), step):
        piece = slice(start, min(start + step, len(query)))
        distance = squares[1][piece, None] + squares[0] - 2 * (query[piece] @ train.T)  # exact: 0 for equal vectors
        distance = distance / 2 if metric == "cosine" else scale * np.sqrt(distance)
        last = np.partition(distance, count - 1, 1)[:, count - 1, None]
        row, sample = np.nonzero(distance <= last)
        yield piece, row, sample, distance[row, sample]


def _lengths(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(vectors).sum(1))


def _directions(vectors: np.ndarray) -> np.ndarray:
    largest = np.abs(vectors).max(1, keepdims=True)
    scaled = vectors / np.where(largest > 0, largest, 1)
    return scaled / np.maximum(_lengths(scaled), 1)[:, None]
