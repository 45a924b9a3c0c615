import re
from dataclasses import replace

import numpy as np
import pytest
from html_page import Page
from sklearn.metrics import r2_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from armillary.engine.evaluate.probes.scores import score
from armillary.engine.evaluate.properties.task import PropertyOptions, properties

pytestmark = pytest.mark.whole_task

QUICK = PropertyOptions(neighbours=8, hidden=((16,),), resamples=100, strata=3, tomographic_bins=3)
TRAIN, TEST = 240, 160


def sky(seed=0):
    """Labels, and vectors that hold them under noise."""
    rng = np.random.default_rng(seed)
    count = TRAIN + TEST
    z = rng.uniform(0.02, 0.5, count)
    mass = 10 + rng.normal(size=count)
    mag = 17 + 4 * z + rng.normal(size=count) * 0.3
    hidden = np.stack([6 * z, mass - 10], 1)

    def vectors(noise):
        return (hidden + noise * rng.normal(size=hidden.shape)) @ rng.normal(size=(2, 6))

    return {"redshift": z, "log_mstar": mass, "mag_r": mag}, vectors


@pytest.fixture(scope="module")
def full(make_study):
    labels, vectors = sky()
    labels["log_mstar"][::7] = np.nan
    own = np.stack([labels["redshift"] + 0.01, labels["mag_r"]], 1)
    features = {
        "AstroCLIP image": ("image", vectors(0.1), "shared", ()),
        "unaligned image": ("image", vectors(0.6), "", ()),
        "AstroCLIP spectrum": ("spectrum", vectors(0.05), "shared", ()),
        "unaligned <spectrum>": ("spectrum", vectors(0.05), "", ()),
        "ResNet18": ("image", own, "", ("redshift", "mag_r")),
        "photometry MLP": ("columns", own[:, :1] + 0.2, "", ("redshift",)),
    }
    return make_study(labels, features, train=TRAIN)


@pytest.fixture(scope="module")
def outcome(full):
    return properties(full, QUICK)


def value(outcome, features, target, model, metric, stratum="all"):
    (found,) = [
        m
        for m in outcome.measures
        if (m.features, m.target, m.model, m.metric, m.stratum) == (features, target, model, metric, stratum)
    ]
    return found


def test_every_set_probe_and_label_has_its_r2(outcome):
    r2 = {(m.features, m.model, m.target) for m in outcome.measures if m.metric == "r2" and m.stratum == "all"}
    embeddings = ["AstroCLIP image", "unaligned image", "AstroCLIP spectrum", "unaligned <spectrum>"]
    expected = {(f, m, t) for f in embeddings for m in ("8-NN", "MLP 16") for t in ("redshift", "log_mstar")}
    assert r2 == expected | {("ResNet18", "supervised", "redshift"), ("photometry MLP", "supervised", "redshift")}
    assert all(m.error > 0 for m in outcome.measures if m.metric == "r2" and m.stratum == "all" and m.model == "8-NN")


def test_numbers_are_those_of_scikit_learn_on_the_same_rows(full, outcome):
    train, test = full.rows("train"), full.rows("test")
    mass = full.label("log_mstar")
    known = [rows[np.isfinite(mass[rows])] for rows in (train, test)]
    x = [full.vectors("unaligned image", rows).astype(np.float64) for rows in known]
    scale = StandardScaler().fit(x[0])
    model = KNeighborsRegressor(8, weights="distance").fit(scale.transform(x[0]), mass[known[0]])
    m = value(outcome, "unaligned image", "log_mstar", "8-NN", "r2")
    assert m.value == pytest.approx(r2_score(mass[known[1]], model.predict(scale.transform(x[1]))), abs=1e-4)
    assert m.samples == len(known[1])


def test_supervised_predictions_are_scored_as_they_are(full, outcome):
    z = full.label("redshift", full.rows("test"))
    expected = score(z, full.vectors("ResNet18", full.rows("test"))[:, 0].astype(np.float64), resamples=100)
    for metric in ("r2", "nmad", "bias", "mean_bias", "outliers", "catastrophic"):
        m = value(outcome, "ResNet18", "redshift", "supervised", metric)
        assert m.value == pytest.approx(getattr(expected, metric), abs=1e-6)
    assert value(outcome, "photometry MLP", "redshift", "supervised", "catastrophic").value > 0.5  # all are off by 0.21


def test_tomographic_bias_is_the_largest_of_the_bins(outcome):
    worst = value(outcome, "AstroCLIP image", "redshift", "8-NN", "tomographic_bias")
    bins = [
        m
        for m in outcome.measures
        if (m.features, m.model, m.metric) == ("AstroCLIP image", "8-NN", "mean_bias") and "predicted" in m.stratum
    ]
    assert len(bins) == 3
    assert worst.value == max(abs(m.value) for m in bins)
    assert sum(m.samples for m in bins) == TEST
    assert all(m.stratum.startswith("predicted redshift 0.") for m in bins)


def test_alignment_is_told_whether_it_helps_or_not(outcome):
    text = "\n".join(outcome.lines)
    assert re.search(r"aligned image embeddings beat unaligned ones: redshift R2 \+0\.\d+ ± 0\.\d+", text)
    assert "aligned spectrum embeddings do NOT beat unaligned ones" in text
    assert "aligned image embeddings do NOT beat ResNet18, which was trained on labels" in text
    assert "aligned image embeddings beat photometry MLP, which was trained on labels" in text
    assert "spectrum embeddings beat photometry" not in text  # magnitudes are a rival of images
    gain = value(outcome, "AstroCLIP image > unaligned image", "redshift", "8-NN", "r2_difference")
    first, second = (value(outcome, f"{w} image", "redshift", "8-NN", "r2").value for w in ("AstroCLIP", "unaligned"))
    assert gain.value == pytest.approx(first - second)
    low = value(outcome, "AstroCLIP image > unaligned image", "redshift", "8-NN", "r2_difference_low")
    assert 0 < low.value < gain.value


def test_strata_of_magnitude_and_redshift(full, outcome):
    strata = [m for m in outcome.measures if m.stratum.startswith(("mag_r", "redshift")) and m.metric == "nmad"]
    assert len({m.stratum for m in strata}) == 6
    assert len(strata) == 6 * 6
    assert {m.target for m in strata} == {"redshift"}
    assert sum(m.samples for m in strata if m.features == "ResNet18" and m.stratum.startswith("mag_r")) == TEST


def test_sections_are_sound_html_with_escaped_names(outcome):
    assert [re.match(r"<h2>(.*?)</h2>", s)[1] for s in outcome.sections] == [
        "How well are galaxy properties predicted?",
        "What does alignment bring?",
        "Errors of the redshift",
        "Predicted against true redshift",
        "Bias in tomographic bins",
        "Quality by mag_r and true redshift",
    ]
    for section in outcome.sections:
        Page(section)
        assert "<spectrum>" not in section
    assert outcome.sections[3].count("<svg") == 6
    # Image embeddings differ by far more than chance, the spectra's by nothing.
    rows = re.findall(r"<tr>(<td>(?:AstroCLIP|unaligned|ResNet).*?)</tr>", outcome.sections[0])
    assert any("<b>" in r for r in rows if "ResNet18" in r)
    assert not any("<b>" in r for r in rows if "unaligned image" in r)


def test_labels_by_name_and_the_first_as_headline(make_study):
    labels, vectors = sky()
    features = {"a": ("image", vectors(0.1), "", ()), "r": ("image", labels["redshift"][:, None], "", ("redshift",))}
    study = make_study(labels, features, train=TRAIN)
    outcome = properties(study, PropertyOptions(("log_mstar", "mag_r"), 8, ((4,),), strata=2, resamples=20))
    assert {m.target for m in outcome.measures} == {"log_mstar", "mag_r"}
    assert {m.metric for m in outcome.measures} == {"r2", "nmad", "mean_bias"}  # of strata
    assert outcome.lines[0].startswith("log_mstar from a (8-NN): R2 ")
    assert "r: left out, it predicts none of log_mstar, mag_r" in outcome.lines
    assert len(outcome.sections) == 3  # no redshifts, nothing aligned


def test_too_few_for_strata_is_told(make_study):
    labels, vectors = sky()
    rows = slice(0, TRAIN + 30)
    study = make_study(
        {k: v[rows] for k, v in labels.items()}, {"a": ("image", vectors(0.1)[rows], "", ())}, train=TRAIN
    )
    outcome = properties(study, QUICK)
    assert (
        "redshift is split neither by magnitude nor by its value: there are too few test samples" in outcome.lines[-1]
    )


def test_a_magnitude_that_is_never_known_is_not_used(make_study):
    labels, vectors = sky()
    labels["mag_r"][:] = np.nan
    study = make_study(labels, {"a": ("image", vectors(0.1), "", ())}, train=TRAIN)
    assert "Quality by true redshift" in properties(study, QUICK).sections[-1]
    with pytest.raises(ValueError, match="label 'mag_r': is known for none"):
        properties(study, PropertyOptions(neighbours=8, magnitude="mag_r", resamples=10))


def test_same_seed_same_numbers(make_study):
    labels, vectors = sky()
    features = {"a": ("image", vectors(0.1), "shared", ()), "b": ("image", vectors(0.1), "", ())}
    first, again, other = (
        properties(make_study({"redshift": labels["redshift"]}, features, train=TRAIN, seed=seed), QUICK)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal([m.value for m in again.measures], [m.value for m in first.measures])
    assert again.lines == first.lines
    assert other.lines != first.lines  # other errors


def test_constant_or_unknown_labels_are_refused(make_study):
    labels, vectors = sky()
    labels["tage_mw"] = np.full(TRAIN + TEST, 5.0)
    study = make_study(labels, {"a": ("image", vectors(0.1), "", ())}, train=TRAIN)
    with pytest.raises(ValueError, match="label 'tage_mw': must vary, but all 240 known values are 5"):
        properties(study, QUICK)
    with pytest.raises(ValueError, match="label 'mass': must be one of the survey's labels .redshift"):
        properties(study, PropertyOptions(("mass",)))


def test_no_label_of_the_default(make_study):
    labels, vectors = sky()
    study = make_study({"mag_r": labels["mag_r"]}, {"a": ("image", vectors(0.1), "", ())}, train=TRAIN)
    with pytest.raises(ValueError, match="labels: survey 'toy sky' has none of redshift.*but mag_r; name what"):
        properties(study)


def test_fewer_training_samples_than_neighbours(make_study):
    labels, vectors = sky()
    study = make_study(labels, {"a": ("image", vectors(0.1), "", ())}, train=40)
    with pytest.raises(ValueError, match="labelled training samples, got 64 and 40"):
        properties(study)


def test_vectors_that_are_not_finite_are_named(make_study):
    labels, vectors = sky()
    broken = vectors(0.1)
    broken[3, 2] = np.inf
    study = make_study(labels, {"broken": ("image", broken, "", ())}, train=TRAIN)
    with pytest.raises(ValueError, match="broken: 1 of 240 vectors hold non-finite numbers"):
        properties(study, QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbours": 0}, "neighbours: must be 1 or more, got 0"),
        ({"strata": 0}, "strata: must be 1 or more"),
        ({"tomographic_bins": -1}, "tomographic_bins: must be 1 or more, got -1"),
        ({"resamples": 0}, "resamples: must be 1 or more"),
        ({"labels": ("redshift", "redshift")}, "labels: must differ"),
    ],
    ids=["neighbours", "strata", "bins", "resamples", "labels"],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        PropertyOptions(**change)


def test_a_label_of_zeros_and_ones_gets_accuracy_f1_and_auc(make_study):
    labels, vectors = sky(3)
    labels["ring"] = (labels["log_mstar"] > 10.8).astype(float)
    own = np.stack([labels["ring"] * 0.8], 1)
    study = make_study(
        {"ring": labels["ring"]},
        {"a": ("image", vectors(0.1), "", ()), "told": ("image", own, "", ("ring",))},
        train=TRAIN,
    )
    found = properties(study, replace(QUICK, labels=("ring",)))
    for metric in ("accuracy", "f1", "auc"):
        assert value(found, "told", "ring", "supervised", metric).value == 1.0
        assert 0.75 < value(found, "a", "ring", "8-NN", metric).value <= 1.0  # over seeds 0 to 4: .84 to .99
    page = Page("".join(map(str, found.sections)))
    assert "How well are classes told apart?" in page.text and "the commonest answer alone has" in page.text
    assert not any(m.metric == "nmad" for m in found.measures if m.stratum == "all")


def test_what_the_first_set_was_trained_for_is_the_headline(make_study):
    labels, vectors = sky(4)
    labels["type"] = np.digitize(labels["log_mstar"], [9.5, 10.5]).astype(float)
    said = labels["type"].copy()
    said[::10] = 0.0
    sets = {"head": ("image", said[:, None], "", ("type",)), "a": ("image", vectors(0.1), "", ())}
    found = properties(make_study(labels, sets, train=TRAIN), QUICK)
    accuracy = value(found, "head", "type", "supervised", "accuracy").value
    assert accuracy == np.mean((said == labels["type"])[TRAIN:]) and value(found, "a", "redshift", "8-NN", "r2")
    assert found.lines[0].startswith(f"type from head (supervised): accuracy {accuracy:.1%} (95% interval ")
    assert "accuracy" not in {m.metric for m in found.measures if m.features == "a"}  # neighbours say means of codes
    page = Page("".join(map(str, found.sections)))
    assert "type: the commonest answer alone has" in page.text
