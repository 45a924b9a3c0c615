import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from armillary.engine.evaluate.probes.similarity import on_grid
from armillary.engine.evaluate.search import retrieval
from armillary.engine.evaluate.search.retrieval import (
    PartnerRanks,
    bootstrap_error,
    closeness,
    found_again,
    gain_ndcg,
    ndcg,
    nearest_other,
    rank_partners,
)
from armillary.engine.evaluate.search.vectors import unit

ANGLES = np.radians([0, 10, 20, 90])


def directions(angle):
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def noisy_pairs(count=60, dimensions=8, noise=1.5, seed=3):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(count, dimensions))
    return [(shared + noise * rng.normal(size=shared.shape)).astype(np.float32) for _ in range(2)]


def plain_ranks(queries, candidates):
    """Rank of each partner, by sorting in float64."""
    a, b = (
        v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True)
        for v in (queries, candidates)
    )
    return np.array([int((row > row[i]).sum()) + 1 for i, row in enumerate(a @ b.T)])


def test_ranks_by_hand():
    # Query 0 at 0 degrees sees candidates at 10, 0, 41, 90: the partner is second. And so on.
    ranks = rank_partners(directions(ANGLES), directions(np.radians([10, 0, 41, 90])))
    np.testing.assert_array_equal(ranks.rank(), [2, 2, 3, 1])
    np.testing.assert_array_equal(ranks.recall(1), [0, 0, 0, 1])
    np.testing.assert_array_equal(ranks.recall(2), [1, 1, 0, 1])
    np.testing.assert_array_equal(ranks.recall(4), [1, 1, 1, 1])
    np.testing.assert_allclose(ranks.reciprocal(), [1 / 2, 1 / 2, 1 / 3, 1])
    np.testing.assert_allclose(ranks.ndcg(2), [1 / np.log2(3), 1 / np.log2(3), 0, 1])


def test_ranks_agree_with_sorting_over_several_pieces():
    queries, candidates = noisy_pairs(1100)
    ranks = rank_partners(queries, candidates)
    np.testing.assert_array_equal(ranks.rank(), plain_ranks(queries, candidates))
    assert 0.02 < ranks.recall(10).mean() < 0.98


def test_length_of_vectors_does_not_matter():
    queries, candidates = noisy_pairs()
    scale = np.random.default_rng(0).uniform(0.1, 1e6, (60, 1)).astype(np.float32)
    np.testing.assert_array_equal(
        rank_partners(queries * scale, candidates / scale).rank(), rank_partners(queries, candidates).rank()
    )


def test_a_collapsed_encoder_scores_as_chance():
    ranks = rank_partners(np.ones((40, 64), np.float32), np.full((40, 64), 0.3, np.float32))
    np.testing.assert_array_equal(ranks.tied, 40)
    np.testing.assert_array_equal(ranks.rank(), 20.5)
    np.testing.assert_allclose(ranks.recall(10), 10 / 40)
    np.testing.assert_allclose(ranks.reciprocal(), (1 / np.arange(1, 41)).sum() / 40)
    np.testing.assert_allclose(ranks.ndcg(10), (1 / np.log2(np.arange(2, 12))).sum() / 40)


def test_a_tie_is_worth_its_mean_over_orders():
    ranks = PartnerRanks(5, np.array([1]), np.array([3]))  # ranks 2, 3 and 4 are equally likely
    assert ranks.rank()[0] == 3
    np.testing.assert_allclose([ranks.recall(k)[0] for k in (1, 2, 3, 4, 5)], [0, 1 / 3, 2 / 3, 1, 1])
    np.testing.assert_allclose(ranks.reciprocal()[0], (1 / 2 + 1 / 3 + 1 / 4) / 3)
    np.testing.assert_allclose(ranks.ndcg(3)[0], (1 / np.log2(3) + 1 / np.log2(4)) / 3)


@pytest.mark.parametrize("width", [8, 384])
def test_the_order_of_samples_does_not_matter(width):
    queries, candidates = noisy_pairs(dimensions=width)
    candidates[20:] = candidates[np.arange(40) % 8]  # of 40 queries each sees eight groups of six equal candidates
    label = np.random.default_rng(1).uniform(0, 1, 60)
    first = rank_partners(queries, candidates)
    assert (first.tied[20:] == 6).all() and (first.tied[8:20] == 1).all()
    straight = gain_ndcg(queries, candidates, closeness(label, 0.1, redshift=True), 10)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(60)
        second = rank_partners(queries[order], candidates[order])
        np.testing.assert_array_equal(second.above, first.above[order])
        np.testing.assert_array_equal(second.tied, first.tied[order])
        turned = gain_ndcg(queries[order], candidates[order], closeness(label[order], 0.1, redshift=True), 10)
        for a, b in zip(straight, turned, strict=True):
            np.testing.assert_allclose(b, a[order], rtol=1e-12)  # sums of gains


def test_similarities_are_exact_before_they_are_rounded(monkeypatch):
    monkeypatch.setattr(retrieval, "DECIMALS", 16)  # a tie decided in the last bit would show
    queries, candidates = noisy_pairs(dimensions=384)
    candidates[20:] = candidates[np.arange(40) % 8]
    ((_, similarity),) = retrieval._similarities(queries, candidates)
    expected = np.round([[np.sum(q * c) for c in on_grid(unit(candidates))] for q in on_grid(unit(queries))], 16)
    np.testing.assert_array_equal(similarity, expected)


def test_the_most_similar_other_object_is_one_of_the_tied():
    queries, candidates = noisy_pairs()
    candidates[[3, 7, 9]] = queries[5]
    drawn = np.array([nearest_other(queries, candidates, seed)[5] for seed in range(60)])
    assert set(drawn) == {3, 7, 9}  # one is missed with a probability of 3 (2/3)^60
    similarity = unit(queries).astype(np.float64) @ unit(candidates).T
    np.fill_diagonal(similarity, -2)
    others = np.delete(np.arange(60), [3, 5, 7, 9])
    np.testing.assert_array_equal(nearest_other(queries[others], candidates[others], 0), similarity[np.ix_(others, others)].argmax(1))  # fmt: skip
    collapsed = nearest_other(np.ones((300, 4), np.float32), np.ones((300, 4), np.float32), 0)
    assert len(set(collapsed)) > 150 and (collapsed != np.arange(300)).all()  # 190 of 300 are drawn, give or take 6


@pytest.mark.parametrize("k", [1, 4, 10, 11])
@pytest.mark.parametrize("levels", [3, 0], ids=["ties", "no_ties"])
def test_ndcg_agrees_with_scikit_learn(k, levels):
    rng = np.random.default_rng(5)
    gain = rng.integers(0, 4, (30, 11)).astype(np.float64)
    gain[:, 0] += 1  # scikit-learn calls a query without relevant answers 0, here it is undefined
    similarity = rng.integers(0, levels, (30, 11)).astype(np.float64) if levels else rng.normal(size=(30, 11))
    expected = [ndcg_score(g[None], s[None], k=k) for g, s in zip(gain, similarity, strict=True)]
    np.testing.assert_allclose(ndcg(gain, similarity, k), expected, rtol=1e-12)


def test_ndcg_by_hand():
    gain, similarity = np.array([[3.0, 2.0, 0.0, 1.0]]), np.array([[0.1, 0.9, 0.8, 0.7]])
    best = 3 + 2 / np.log2(3) + 1 / np.log2(4)
    np.testing.assert_allclose(ndcg(gain, similarity, 3), (2 + 0 + 1 / np.log2(4)) / best)
    assert ndcg(gain, gain, 4)[0] == 1
    assert np.isnan(ndcg(np.zeros((1, 4)), similarity, 2)[0])


def test_gains_fall_from_the_querys_own_redshift():
    gains = closeness(np.array([0.0, 0.02, 0.5, 0.56]), 0.05, redshift=True)
    np.testing.assert_allclose(gains(np.array([0, 2])), [[1, 0.6, 0, 0], [0, 0, 1, 0.2]], atol=1e-12)
    plain = closeness(np.array([10.0, 10.5, 12.0]), 1.0, redshift=False)
    np.testing.assert_allclose(plain(np.array([0])), [[1, 0.5, 0]])


def test_label_search_leaves_the_query_out():
    queries, candidates = noisy_pairs(30, noise=0.3)
    label = np.random.default_rng(4).uniform(0, 0.5, 30)
    value, chance = gain_ndcg(queries, candidates, closeness(label, 0.05, redshift=True), 5)
    similarity = unit(queries).astype(np.float64) @ unit(candidates).T.astype(np.float64)
    for i in range(30):
        others = np.arange(30) != i
        gain = np.clip(1 - np.abs(label[others] - label[i]) / (1 + label[i]) / 0.05, 0, None)
        if not gain.any():
            assert np.isnan(value[i]) and np.isnan(chance[i])
            continue
        np.testing.assert_allclose(value[i], ndcg_score(gain[None], similarity[i, others][None], k=5), rtol=1e-6)
        orders = np.random.default_rng(i).random((2000, 29))
        drawn = ndcg(np.tile(gain, (2000, 1)), orders, 5)
        assert abs(chance[i] - drawn.mean()) < 5 * drawn.std() / np.sqrt(2000)


def test_neighbours_found_again():
    np.testing.assert_allclose(
        found_again(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1, 9], [7, 8, 9]])), [2 / 3, 0]
    )
    with pytest.raises(ValueError, match="two equal arrays"):
        found_again(np.zeros((2, 3)), np.zeros((2, 4)))


def test_bootstrap_error_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    assert bootstrap_error(values) == pytest.approx(values.std() / 20, rel=0.1)
    assert bootstrap_error(values, seed=1) != bootstrap_error(values)
    assert bootstrap_error(values, lambda v: float(np.median(v))) == pytest.approx(1.2533 / 20, rel=0.3)
    assert np.isnan(bootstrap_error(values[:1]))
    with pytest.raises(ValueError, match="resamples: must be at least 2"):
        bootstrap_error(values, resamples=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, g: rank_partners(a, a[:3]), r"two equal arrays \[M, D\], got \(5, 2\) and \(3, 2\)"),
        (lambda a, g: rank_partners(a, a * np.nan), "5 of 5 are not finite"),
        (lambda a, g: rank_partners(a, a).recall(6), "between 1 and the 5 candidates, got 6"),
        (lambda a, g: rank_partners(a, a).ndcg(0), "between 1 and the 5 candidates, got 0"),
        (lambda a, g: gain_ndcg(a, a[:4], g, 2), "two equal arrays"),
        (lambda a, g: gain_ndcg(a, a, g, 5), "between 1 and the 4 other candidates, got 5"),
        (lambda a, g: ndcg(a, a[:, :1], 1), r"one for each similarity \[M, N\]"),
        (lambda a, g: ndcg(a, a, 3), "between 1 and the 2 candidates, got 3"),
        (lambda a, g: ndcg(a - 2, a, 1), "finite and not negative"),
        (lambda a, g: closeness(a[:, 0], 0, redshift=True), "tolerance: must be positive, got 0"),
        (lambda a, g: closeness(a[:, 0] * np.inf, 1, redshift=True), "5 of 5 are not finite"),
    ],
    ids=[
        "other_shape", "not_finite", "recall_too_deep", "ndcg_too_deep", "gains_other_shape", "no_others_left",
        "a_gain_each", "deeper_than_candidates", "negative_gain", "no_tolerance", "unknown_label",
    ],
)  # fmt: skip
def test_bad_input(call, message):
    a = np.arange(1, 11, dtype=np.float64).reshape(5, 2)
    with pytest.raises(ValueError, match=message):
        call(a, closeness(a[:, 0], 1.0, redshift=False))
