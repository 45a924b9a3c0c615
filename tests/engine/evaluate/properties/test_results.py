import numpy as np
import pytest

from armillary.engine.evaluate.probes.probes import KNN, MLP, Ridge
from armillary.engine.evaluate.probes.scores import Difference, paired_difference, r2
from armillary.engine.evaluate.properties.results import OWN, Comparison, Prediction, clear_winners, compare, predict

RNG = np.random.default_rng(0)
TRUE = RNG.normal(size=300)


def prediction(features, noise, *, model="8-NN", modality="image", label="log_mstar", seed=0, held_out=0.5):
    predicted = TRUE + noise * np.random.default_rng(seed).normal(size=300)
    scores = r2(TRUE, predicted), 0.01
    return Prediction(features, modality, model, label, np.arange(300), TRUE, predicted, *scores, held_out=held_out)


def names(winners):
    return [(p.features, p.model) for p in winners]


@pytest.mark.parametrize("held_out", [0.6, 0.4, np.nan], ids=["better", "worse", "unknown"])
def test_the_best_set_wins_with_the_probe_that_held_out_samples_choose(held_out):
    perceptron = prediction("a", 0.3, model="MLP 32", seed=1, held_out=held_out)  # the best on the test split
    some = [prediction("a", 0.5), perceptron, prediction("b", 0.7, seed=2)]
    expected = [("a", "MLP 32" if held_out == 0.6 else "8-NN")]
    assert names(clear_winners(some)) == names(clear_winners(some[::-1])) == expected


def test_held_out_samples_are_of_the_training_split(make_study):
    rng = np.random.default_rng(2)
    z = rng.uniform(0, 1, 200)
    x = np.stack([z + 0.1 * rng.normal(size=200), rng.normal(size=200)], 1)
    shuffled = np.r_[z[:120], rng.permutation(z[120:])]
    probes = {"5-NN": KNN(5), "ridge": Ridge(), "all": KNN(120)}
    one, other = (
        predict(
            make_study({"redshift": label}, {"a": ("image", x, "", ())}, train=120), ["redshift"], probes, resamples=10
        )
        for label in (z, shuffled)
    )
    assert [p.held_out for p in one[:2]] == [p.held_out for p in other[:2]]
    assert all(p.held_out > 0.5 > q.r2 for p, q in zip(one[:2], other, strict=False))
    assert np.isnan(one[2].held_out)  # too few are left to fit it on


def test_nobody_wins_by_chance_or_alone():
    assert clear_winners([prediction("a", 0.5), prediction("b", 0.5, seed=1)]) == []
    assert clear_winners([prediction("a", 0.3), prediction("a", 0.5, model="MLP 32")]) == []


def test_modalities_and_labels_have_winners_of_their_own():
    some = [
        prediction("a", 0.3),
        prediction("b", 0.6, seed=1),
        prediction("c", 0.1, modality="spectrum"),
        prediction("d", 0.4, modality="spectrum", seed=1),
        prediction("b", 0.1, label="tage_mw"),
        prediction("a", 0.6, label="tage_mw", seed=1),
    ]
    assert [(p.features, p.label) for p in clear_winners(some)] == [
        ("a", "log_mstar"),
        ("c", "log_mstar"),
        ("b", "tage_mw"),
    ]


@pytest.fixture(scope="module")
def study(make_study):
    rng = np.random.default_rng(1)
    labels = {"redshift": rng.uniform(0, 1, 200), "tage_mw": rng.normal(size=200)}
    labels["tage_mw"][::9] = np.nan
    x = np.stack([labels["redshift"], np.nan_to_num(labels["tage_mw"]), rng.normal(size=200)], 1)
    partial = x.copy()
    partial[:20] = np.nan
    partial[-10:] = np.nan
    features = {
        "aligned": ("image", x, "shared", ()),
        "plain": ("image", partial, "", ()),
        "other aligned": ("image", x, "else", ()),
        "spectra": ("spectrum", x, "", ()),
        "net": ("columns", x[:, 1:2], "", ("tage_mw",)),
    }
    return make_study(labels, features, train=120)


def test_all_sets_are_judged_on_the_galaxies_that_all_have(study):
    found = predict(study, ["redshift", "tage_mw"], {"5-NN": KNN(5), "ridge": Ridge()}, resamples=10)
    assert [(p.features, p.model, p.label) for p in found][:4] == [
        ("aligned", "5-NN", "redshift"),
        ("aligned", "5-NN", "tage_mw"),
        ("aligned", "ridge", "redshift"),
        ("aligned", "ridge", "tage_mw"),
    ]
    assert [(p.features, p.model) for p in found if p.label == "tage_mw"][-1] == ("net", OWN)
    assert {len(p.true) for p in found if p.label == "redshift"} == {70}
    ages = study.label("tage_mw", study.rows("test"))
    for p in found:
        if p.label == "tage_mw":
            np.testing.assert_array_equal(p.true, ages[np.isfinite(ages)])
            assert p.scores is None
            assert p.bias == ()


def test_perceptrons_predict_the_redshift_alone(study):
    both = predict(study, ["tage_mw", "redshift"], {"MLP": MLP((8,))}, resamples=10)
    alone = predict(study, ["redshift"], {"MLP": MLP((8,))}, resamples=10)
    np.testing.assert_array_equal(both[1].predicted, alone[0].predicted)


def test_rivals_of_aligned_embeddings(study):
    found = predict(study, ["redshift", "tage_mw"], {"5-NN": KNN(5)}, resamples=10)
    pairs = compare(study, found, "5-NN", resamples=50)
    assert [(c.first, c.second, c.label, c.supervised) for c in pairs] == [
        ("aligned", "plain", "redshift", False),
        ("aligned", "plain", "tage_mw", False),
        ("aligned", "net", "tage_mw", True),
        ("other aligned", "plain", "redshift", False),
        ("other aligned", "plain", "tage_mw", False),
        ("other aligned", "net", "tage_mw", True),
    ]
    by = {(p.features, p.label): p for p in found}
    expected = paired_difference(
        by["aligned", "redshift"].true,
        by["aligned", "redshift"].predicted,
        by["plain", "redshift"].predicted,
        resamples=50,
    )
    assert pairs[0].difference == expected


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        (
            Difference(0.08, 0.01, 0.06, 0.1),
            "aligned image embeddings beat unaligned ones: redshift R2 +0.080 ± 0.010, ",
        ),
        (
            Difference(0.01, 0.01, -0.01, 0.03),
            "aligned image embeddings do NOT beat unaligned ones: redshift R2 +0.010",
        ),
        (
            Difference(-0.2, 0.01, -0.22, -0.18),
            "aligned image embeddings do NOT beat unaligned ones: redshift R2 -0.200",
        ),
    ],
    ids=["better", "not-clear", "worse"],
)
def test_a_verdict_needs_the_whole_interval(difference, says):
    c = Comparison("image", "AstroCLIP image", "unaligned image", False, "64-NN", "redshift", difference, 100)
    assert str(c).startswith(says)
    assert str(c).endswith("(AstroCLIP image against unaligned image, 64-NN, 100 test samples)")
