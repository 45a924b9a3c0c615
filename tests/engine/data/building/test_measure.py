import json

import numpy as np
import pytest

from armillary.engine.data.building.measure import Moments, SurveyMoments, robust_sigma


def test_robust_sigma_sees_the_sky_and_not_the_galaxy():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-32:32, -32:32]
    galaxy = 100 * np.exp(-np.hypot(x, y) / 3)
    image = rng.normal(3, [[[1.0]], [[2.0]]], (2, 64, 64)) + galaxy
    np.testing.assert_allclose(robust_sigma(image), [1, 2], rtol=0.1)
    assert image.std(axis=(1, 2))[0] > 3  # a plain deviation is far off


def test_robust_sigma_uses_valid_pixels_only():
    rng = np.random.default_rng(0)
    image = rng.normal(0, 1, (3, 40, 40))
    valid = np.ones((3, 40, 40), bool)
    image[0, :30] = 0
    valid[0, :30] = False
    valid[1] = False
    sigma = robust_sigma(image, valid)
    assert sigma[0] == pytest.approx(1, rel=0.15) and np.isnan(sigma[1]) and sigma[2] == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("value", [0.0, 7.5])
def test_robust_sigma_of_a_constant_is_zero(value):
    assert robust_sigma(np.full((1, 5, 5), value)) == [0]
    assert robust_sigma(np.full((1, 1, 1), value)) == [0]


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_in_pieces_equal_the_whole(offset):
    x = np.random.default_rng(0).normal(offset, [[1], [3], [0.1]], (3, 1000))
    parts = Moments.empty(3)
    for piece in np.split(x, [1, 10, 10, 700], axis=1):
        parts.merge(Moments.of(piece))
    assert parts.count == 1000
    np.testing.assert_allclose(parts.mean, x.mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(parts.covariance(), np.cov(x, ddof=0), rtol=1e-9, atol=1e-12)


def test_moments_of_nothing():
    empty = Moments.of(np.zeros((2, 0)))
    empty.merge(Moments.empty(2))
    assert empty.count == 0 and (empty.covariance() == 0).all()


def test_survey_statistics_against_numpy_and_through_json():
    rng = np.random.default_rng(0)
    images = rng.normal(1, 2, (5, 2, 6, 7)).astype(np.float32)
    valid = rng.random((5, 2, 6, 7)) > 0.3
    sigma = (0.5, 2.0)
    first, second = SurveyMoments(sigma), SurveyMoments(sigma)
    for k, (image, mask) in enumerate(zip(images, valid, strict=True)):
        (first if k < 2 else second).add(image, mask)
    first.merge(SurveyMoments.from_json(json.loads(json.dumps(second.to_json())), sigma))
    found = first.statistics()
    a = np.arcsinh(images / (3 * np.array(sigma))[:, None, None])
    joint = valid.all(axis=1)
    for c in range(2):
        assert found.mean[c] == pytest.approx(images[:, c][valid[:, c]].mean(dtype=np.float64), rel=1e-6)
        assert found.std[c] == pytest.approx(images[:, c][valid[:, c]].std(dtype=np.float64), rel=1e-6)
        assert found.asinh_mean[c] == pytest.approx(a[:, c][valid[:, c]].mean(), rel=1e-6)
    expected = np.cov(np.stack([a[:, c][joint] for c in range(2)]), ddof=0)
    np.testing.assert_allclose(found.asinh_covariance, expected, rtol=1e-6)
    assert found.samples == 5


def test_masks_that_are_none_or_all_true_measure_alike():
    image = np.random.default_rng(0).normal(size=(3, 5, 5)).astype(np.float32)
    plain, masked = SurveyMoments((1.0,) * 3), SurveyMoments((1.0,) * 3)
    plain.add(image, None)
    masked.add(image, np.ones(image.shape, bool))
    a, b = plain.statistics(), masked.statistics()
    for mine, theirs in ((a.mean, b.mean), (a.std, b.std), (a.asinh_mean, b.asinh_mean)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    np.testing.assert_allclose(a.asinh_covariance, b.asinh_covariance, rtol=1e-12)


def test_bands_without_common_pixels_have_a_diagonal_covariance():
    image = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    valid = np.zeros((2, 4, 4), bool)
    valid[0, :2] = valid[1, 2:] = True
    moments = SurveyMoments((1.0, 1.0))
    moments.add(image, valid)
    covariance = np.array(moments.statistics().asinh_covariance)
    assert (np.diag(covariance) > 0).all() and covariance[0, 1] == covariance[1, 0] == 0
