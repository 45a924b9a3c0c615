"""How well a similarity search finds what it should: ranks of partners, recall, reciprocal rank, nDCG.

Every query is compared with every candidate by the cosine, which `on_grid` makes exact, then rounded to 1e-6. Equal
similarities are tied, and a tie is worth what a random order of the tied would be worth on average. So an encoder that
has collapsed scores as chance does, and no number depends on the order of the samples or on the processor.

Shape legend: M queries, N candidates, D embedding dimensions, k answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from armillary.engine.evaluate.probes.similarity import on_grid
from armillary.engine.evaluate.search.vectors import unit

__all__ = [
    "Gains",
    "PartnerRanks",
    "bootstrap_error",
    "closeness",
    "found_again",
    "gain_ndcg",
    "ndcg",
    "nearest_other",
    "rank_partners",
]

DECIMALS = 6  # of a similarity: float32 components are good to 6e-8 of a length, so closer ones mean nothing
CHUNK = 512  # queries compared with all candidates at a time


@dataclass(frozen=True)
class PartnerRanks:
    """Where each query's partner is among the answers.

    Attributes:
        candidates: N.
        above: [M] candidates more similar to the query than its partner.
        tied: [M] candidates as similar as the partner, itself included.
    """

    candidates: int
    above: np.ndarray
    tied: np.ndarray

    def rank(self) -> np.ndarray:
        """[M] rank of the partner from 1, the mean rank where it is tied. By chance (N + 1) / 2."""
        return self.above + (self.tied + 1) / 2

    def recall(self, k: int) -> np.ndarray:
        """[M] whether the partner is among the first k, a probability where it is tied. By chance k / N.

        Raises:
            ValueError: k is larger than the candidates.
        """
        if not 1 <= k <= self.candidates:
            raise ValueError(f"k: must lie between 1 and the {self.candidates} candidates, got {k}")
        return np.clip((k - self.above) / self.tied, 0, 1)

    def reciprocal(self) -> np.ndarray:
        """[M] one over the partner's rank, averaged over its tie. By chance H(N) / N, with harmonic numbers H."""
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, self.candidates + 1))])
        return (harmonic[self.above + self.tied] - harmonic[self.above]) / self.tied

    def ndcg(self, k: int) -> np.ndarray:
        """[M] nDCG of the first k where the partner alone is relevant: 1 / log2(1 + rank), averaged over its tie."""
        if not 1 <= k <= self.candidates:
            raise ValueError(f"k: must lie between 1 and the {self.candidates} candidates, got {k}")
        total = np.concatenate([[0.0], np.cumsum(_discounts(k))])
        last, first = (np.minimum(r, k) for r in (self.above + self.tied, self.above))
        return (total[last] - total[first]) / self.tied


def rank_partners(queries: np.ndarray, candidates: np.ndarray) -> PartnerRanks:
    """Rank the candidates by cosine for each query, whose partner is the candidate of the same row.

    Args:
        queries: [M, D].
        candidates: [M, D], in the order of their partners.

    Raises:
        ValueError: Shapes differ, a number is not finite, or a vector has no direction.
    """
    if queries.shape != candidates.shape or queries.ndim != 2 or not len(queries):
        raise ValueError(f"pairs: need two equal arrays [M, D], got {queries.shape} and {candidates.shape}")
    above, tied = np.empty(len(queries), np.int64), np.empty(len(queries), np.int64)
    for rows, similarity in _similarities(queries, candidates):
        own = similarity[np.arange(len(rows)), rows][:, None]
        above[rows], tied[rows] = (similarity > own).sum(1), (similarity == own).sum(1)
    return PartnerRanks(len(candidates), above, tied)


def ndcg(gain: np.ndarray, similarity: np.ndarray, k: int) -> np.ndarray:
    """Normalised discounted cumulative gain of the first k answers (Jarvelin & Kekalainen 2002): linear gains, discount
    1 / log2(1 + rank), over that of the best order.

    Args:
        gain: [M, N] relevance of each candidate to each query, not negative.
        similarity: [M, N]; gains are averaged over ties.
        k: Answers, at most N.

    Returns:
        [M] in 0 ... 1; NaN where no candidate is relevant.

    Raises:
        ValueError: Shapes differ, k is out of range, or a gain is negative or not finite.
    """
    if gain.shape != similarity.shape or gain.ndim != 2:
        raise ValueError(f"gains: need one for each similarity [M, N], got {gain.shape} and {similarity.shape}")
    if not 1 <= k <= gain.shape[1]:
        raise ValueError(f"k: must lie between 1 and the {gain.shape[1]} candidates, got {k}")
    if not (np.isfinite(gain).all() and (gain >= 0).all()):
        raise ValueError("gains: must be finite and not negative")
    width = min(k + 1, gain.shape[1])  # one more shows whether the last answer is tied with what is cut off
    place = np.argpartition(-similarity, width - 1, 1)[:, :width]
    place = np.take_along_axis(place, np.argsort(-np.take_along_axis(similarity, place, 1), 1, kind="stable"), 1)
    score = np.take_along_axis(similarity, place, 1)
    answered = np.take_along_axis(gain, place, 1)[:, :k].astype(np.float64)
    for row in np.flatnonzero((score[:, 1:] == score[:, :-1]).any(1)):
        for at in np.unique(score[row, :k]):
            answered[row, score[row, :k] == at] = gain[row, similarity[row] == at].mean()
    best = _ideal(gain, k)
    with np.errstate(invalid="ignore"):
        return np.where(best > 0, answered @ _discounts(k) / best, np.nan)


Gains = Callable[[np.ndarray], np.ndarray]
"""[m] rows of queries -> [m, N] gains of all candidates for them."""


def closeness(label: np.ndarray, tolerance: float, *, redshift: bool) -> Gains:
    """Gains that fall linearly from 1 at an equal label to 0 at a difference of `tolerance`.

    Args:
        label: [N] finite labels of queries and candidates, which are the same objects.
        tolerance: Difference at which nothing is gained; for redshifts of |z - z_query| / (1 + z_query).
        redshift: Divide differences by 1 + the query's label.

    Raises:
        ValueError: `tolerance` is not positive, or a label is not finite.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance: must be positive, got {tolerance}")
    if not np.isfinite(label).all():
        raise ValueError(f"label: {int((~np.isfinite(label)).sum())} of {len(label)} are not finite; drop them first")

    def gains(rows: np.ndarray) -> np.ndarray:
        away = np.abs(label[None, :] - label[rows, None])
        return np.clip(1 - away / ((1 + label[rows, None] if redshift else 1.0) * tolerance), 0, 1)

    return gains


def gain_ndcg(queries: np.ndarray, candidates: np.ndarray, gains: Gains, k: int) -> tuple[np.ndarray, np.ndarray]:
    """nDCG@k of the search for objects like the query; the query's own object, the candidate of its row, is left out.

    Args:
        queries: [M, D].
        candidates: [M, D] of the same objects in the same order.
        gains: Relevance of every candidate.
        k: Answers, at most M - 1.

    Returns:
        [M] nDCG, NaN for queries to which nothing is relevant, and [M] its mean over all orders: chance.

    Raises:
        ValueError: Shapes differ, or k is out of range.
    """
    if queries.shape != candidates.shape:
        raise ValueError(f"pairs: need two equal arrays [M, D], got {queries.shape} and {candidates.shape}")
    if not 1 <= k < len(candidates):
        raise ValueError(f"k: must lie between 1 and the {len(candidates) - 1} other candidates, got {k}")
    found, chance = np.empty(len(queries)), np.empty(len(queries))
    for rows, similarity in _similarities(queries, candidates):
        others = np.arange(len(candidates))[None, :] != rows[:, None]
        shape = len(rows), len(candidates) - 1
        gain, similarity = gains(rows)[others].reshape(shape), similarity[others].reshape(shape)
        found[rows] = ndcg(gain, similarity, k)
        best = _ideal(gain, k)
        with np.errstate(invalid="ignore", divide="ignore"):
            chance[rows] = np.where(best > 0, gain.mean(1) * _discounts(k).sum() / best, np.nan)
    return found, chance


def nearest_other(queries: np.ndarray, candidates: np.ndarray, seed: int) -> np.ndarray:
    """[M] the most similar candidate that is not the query's own object, the candidate of its row; of several that are
    equally similar one is drawn.

    Args:
        queries: [M, D].
        candidates: [M, D] of the same objects in the same order, two or more.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    found = np.empty(len(queries), np.int64)
    for rows, similarity in _similarities(queries, candidates):
        similarity[np.arange(len(rows)), rows] = -np.inf
        best = similarity == similarity.max(1, keepdims=True)
        found[rows] = best.argmax(1)
        for i in np.flatnonzero(best.sum(1) > 1):
            found[rows[i]] = generator.choice(np.flatnonzero(best[i]))
    return found


def found_again(approximate: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """[M] share of the true k neighbours that an approximate index finds among its k.

    Args:
        approximate: [M, k] rows.
        exact: [M, k] rows.

    Raises:
        ValueError: Shapes differ.
    """
    if approximate.shape != exact.shape or exact.ndim != 2:
        raise ValueError(f"neighbours: need two equal arrays [M, k], got {approximate.shape} and {exact.shape}")
    return (approximate[:, :, None] == exact[:, None, :]).any(1).mean(1)


def bootstrap_error(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = lambda v: float(np.mean(v)),
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> float:
    """Standard error of a statistic over queries, drawing queries anew; the candidates stay.

    Args:
        values: [M] a number a query.
        statistic: Their mean by default.
        resamples: Draws.
        seed: Keys them.

    Returns:
        The standard deviation of the draws; NaN for fewer than two queries.
    """
    if resamples < 2:
        raise ValueError(f"resamples: must be at least 2, got {resamples}")
    if len(values) < 2:
        return float("nan")
    generator = np.random.default_rng(seed)
    drawn = [statistic(values[generator.integers(0, len(values), len(values))]) for _ in range(resamples)]
    return float(np.std(drawn))


def _similarities(queries: np.ndarray, candidates: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of queries with their cosines [m, N] with all candidates."""
    left, right = on_grid(unit(queries)), on_grid(unit(candidates))
    for start in range(0, len(left), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(left)))
        yield rows, np.round(left[rows] @ right.T, DECIMALS)


def _discounts(k: int) -> np.ndarray:
    return 1 / np.log2(np.arange(2, k + 2))


def _ideal(gain: np.ndarray, k: int) -> np.ndarray:
    """[M] gain of the best order."""
    best = -np.sort(np.partition(-gain, k - 1, 1)[:, :k], 1)
    return best.astype(np.float64) @ _discounts(k)
