import numpy as np
import pytest
import torch

from armillary.engine.evaluate.collapse.measures import assess, duplicates
from armillary.models.dinov2 import collapse


def effective_rank(vectors):
    return collapse.effective_rank(torch.from_numpy(vectors))


def test_isotropic_noise_has_full_rank():
    x = np.random.default_rng(0).normal(size=(20_000, 8))
    assert effective_rank(x) == pytest.approx(8, abs=0.02)


@pytest.mark.parametrize("shape", [(500, 20), (20, 500)])
def test_rank_counts_directions(shape):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(shape[1], 3)))[0].T
    coordinates = np.linalg.qr(rng.normal(size=(shape[0], 4)))[0]
    coordinates = np.linalg.qr(coordinates - coordinates.mean(0))[0][:, :3]
    assert effective_rank(100 + coordinates @ basis) == pytest.approx(3, abs=1e-6)


def test_rank_does_not_depend_on_scale_shift_or_rotation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)) * [5, 3, 2, 1, 0.5, 0.1]
    turned = x @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    for other in (1e-6 * x, 1e6 * x, x - 7, turned):
        assert effective_rank(other) == pytest.approx(effective_rank(x), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_equal_embeddings_have_rank_one(count):
    assert effective_rank(np.full((count, 4), 0.1, np.float32)) == 1.0


def test_two_embeddings_span_one_direction():
    assert effective_rank(np.array([[0.0, 1.0, 2.0], [1.0, 5.0, 3.0]])) == pytest.approx(1)


def test_duplicates_count_repeats():
    x = np.array([[1, 2], [1, 2], [3, 4], [1, 2], [5, 6]], np.float32)
    assert duplicates(x) == 2
    assert duplicates(x[:1]) == 0


def test_sound_embeddings():
    c = assess(np.random.default_rng(0).normal(size=(200, 16)), prototypes_in_use=700, prototypes=1024)
    assert not c.collapsed
    assert c.reasons == ()
    assert c.effective_rank > 10


@pytest.mark.parametrize(
    ("dimensions", "use", "reason"),
    [(3, None, "effective rank"), (16, 500, "500 of 1024 prototypes in use"), (16, 512, None)],
)
def test_rules(dimensions, use, reason):
    x = np.zeros((200, 16))
    x[:, :dimensions] = np.random.default_rng(0).normal(size=(200, dimensions))
    c = assess(x, prototypes_in_use=use, prototypes=1024)
    assert c.collapsed == (reason is not None)
    if reason:
        assert reason in c.reasons[0]


def test_a_short_window_limits_the_prototypes_that_can_show():
    x = np.random.default_rng(0).normal(size=(200, 16))
    assert not assess(x, prototypes_in_use=2000, prototypes=65536, window_rows=1024).collapsed
    (reason,) = assess(x, prototypes_in_use=511, prototypes=65536, window_rows=1024).reasons
    assert reason == "511 of 65536 prototypes in use: must be 512 or more"


def test_mostly_duplicates_are_a_collapse():
    x = np.random.default_rng(0).normal(size=(40, 16)).repeat(5, axis=0)
    assert "160 of 200 embeddings repeat" in assess(x).reasons[0]


@pytest.mark.parametrize("bad", [np.zeros((0, 4)), np.zeros(4)])
def test_not_a_matrix(bad):
    with pytest.raises(ValueError, match="non-empty"):
        assess(bad)


def test_non_finite_embeddings():
    with pytest.raises(ValueError, match="1 of 3 hold non-finite"):
        assess(np.array([[1.0, 2], [np.nan, 1], [0, 0]]))
