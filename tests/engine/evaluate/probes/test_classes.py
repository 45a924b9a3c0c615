"""Scores of classes, against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from armillary.engine.evaluate.probes.classes import are_classes, class_scores, is_binary


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    true = (rng.random(200) < 0.3).astype(float)
    predicted = np.round(0.4 * true + rng.random(200) * 0.7, 1)  # with ties
    found = class_scores(true, predicted)
    assert found.accuracy == accuracy_score(true, predicted > 0.5)
    assert found.f1 == pytest.approx(f1_score(true, predicted > 0.5))
    assert found.auc == pytest.approx(roc_auc_score(true, predicted))
    assert found.share == true.mean() and found.samples == 200
    assert 0.01 < found.auc_se < 0.08  # some .03 with 60 ones among 200


def test_one_class_has_no_curve():
    found = class_scores(np.zeros(5), np.linspace(0, 0.4, 5))
    assert found.accuracy == 1.0 and found.f1 == 0.0 and np.isnan(found.auc)


def test_classes_that_are_said_outright_have_no_curve():
    found = class_scores(np.array([0.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0, 0.0]))
    assert (found.accuracy, found.share, found.commonest) == (0.75, 0.5, 0.5) and np.isnan(found.auc)


@pytest.mark.parametrize("seed", range(3))
def test_more_classes_are_scored_by_their_codes(seed):
    rng = np.random.default_rng(seed)
    true = rng.choice([0.0, 1.0, 3.0], 200, p=[0.6, 0.3, 0.1])
    predicted = np.where(rng.random(200) < 0.7, true, rng.choice([0.0, 1.0, 2.0, 3.0], 200))
    found = class_scores(true, predicted)
    assert found.accuracy == accuracy_score(true, predicted) and found.commonest == np.mean(true == 0)
    assert found.f1 == pytest.approx(f1_score(true, predicted, labels=[0, 1, 3], average="macro"))
    assert np.isnan(found.auc) and np.isnan(found.share) and 0.01 < found.accuracy_se < 0.06  # .03 by the binomial


@pytest.mark.parametrize(
    "true, predicted",
    [
        ([0, 1, 2], [0, 1, 1.5]),
        ([0.5, 1, 2], [0, 1, 2]),
        ([2, 2], [1, 2]),
        ([-1, 1], [0, 1]),
        ([], []),
        ([0, 200], [0, 1]),
    ],
    ids=["fractions said", "a fraction", "constant", "below 0", "nothing", "too many"],
)
def test_what_are_no_codes_of_classes(true, predicted):
    assert not are_classes(np.array(true, float), np.array(predicted, float))
    assert are_classes(np.array([0.0, 2.0]), np.array([1.0, 2.0]))


def test_other_labels_are_refused():
    assert is_binary(np.array([0.0, 1.0, np.nan])) and not is_binary(np.array([0.0, 0.0]))
    assert not is_binary(np.array([0.0, 0.5, 1.0])) and not is_binary(np.array([np.nan]))
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        class_scores(np.array([0.0, 0.5]), np.zeros(2))
