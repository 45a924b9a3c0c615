from dataclasses import replace

import h5py
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from armillary.engine.evaluate.posterior.flows import FlowOptions
from armillary.engine.evaluate.posterior.joint_posterior import gaussian_nll
from armillary.engine.evaluate.posterior.task import PROPERTIES, PosteriorOptions, posterior

pytestmark = pytest.mark.whole_task

FLOWS = FlowOptions(members=2, transforms=(1, 1), hidden=(16, 24), epochs=6, patience=4, batch=64, learning_rate=2e-2)
SHORT = replace(FLOWS, epochs=1)
OPTIONS = PosteriorOptions(flows=FLOWS, draws=60, scored=120, corners=1, panels=3)
TRAIN, COUNT = 400, 600


def sky(seed=0):
    """Labels, and embeddings that know them well (a spectrum's) and hardly (an image's)."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((COUNT, 3))
    labels = {
        "redshift": 0.2 * np.exp(0.3 * latent[:, 0]),
        "log_mstar": 10 + latent[:, 1],
        "tage_mw": 5 + latent[:, 2] + 0.1 * rng.standard_normal(COUNT),
    }
    turn = rng.standard_normal((3, 8))
    good, poor = ((latent + s * rng.standard_normal((COUNT, 3))) @ turn for s in (0.15, 1.5))
    return labels, good, poor


@pytest.fixture
def study(make_study):
    labels, good, poor = sky()
    features = {
        "AstroCLIP image": ("image", poor, "clip", ()),
        "AstroCLIP spectrum": ("spectrum", good, "clip", ()),
        "Conv+Att": ("spectrum", good[:, :1], "", ("redshift",)),
    }
    return make_study(labels, features, train=TRAIN)


def values(outcome, **match):
    return [m for m in outcome.measures if all(getattr(m, k) == v for k, v in match.items())]


def test_a_study_of_two_modalities(study, tmp_path):
    outcome = posterior(study, replace(OPTIONS, flows=replace(FLOWS, epochs=10), qp_out=tmp_path / "pz"))
    assert outcome.task == "posterior"
    nll = {m.features: m for m in values(outcome, metric="nll", target="redshift, log_mstar, tage_mw")}
    assert set(nll) == {"AstroCLIP image", "AstroCLIP spectrum", ""}, "predictions are no embeddings"
    # Bounds are four spreads or more away: over 8 seeds 2.9 +- 0.4 and 0.40 +- 0.06, below 0.15 +- 0.05 and 0.28 +- 0.04.
    assert nll["AstroCLIP spectrum"].value < nll["AstroCLIP image"].value - 1.3
    assert nll["AstroCLIP image"].value < nll[""].value - 0.1
    assert nll["AstroCLIP image"].samples == COUNT - TRAIN and nll["AstroCLIP image"].error > 0
    for name in ("AstroCLIP image", "AstroCLIP spectrum"):
        for label in ("redshift", "log_mstar", "tage_mw"):
            found = {m.metric: m for m in values(outcome, features=name, target=label, model="flows")}
            assert set(found) == {"crps", "pit deviation", "pit p-value", "coverage of 68%", "coverage of 95%"}
            assert found["crps"].samples == 120
        (deviation,) = values(outcome, features=name, metric="coverage deviation")
        assert 0 < deviation.value < 0.34
    crps = {m.features: m.value for m in values(outcome, metric="crps", target="log_mstar")}
    assert crps["AstroCLIP spectrum"] < 0.5 * crps["AstroCLIP image"]
    assert all(np.isfinite(m.value) for m in outcome.measures)

    line = next(text for text in outcome.lines if text.startswith("flows on AstroCLIP image: NLL"))
    assert "TARP coverage within" in line and f"{nll['AstroCLIP image'].value:.2f}" in line

    text = "".join(outcome.sections)
    assert all(section.startswith("<h2>") for section in outcome.sections) and len(outcome.sections) == 4
    assert text.count("<svg") >= 1 + 3 + 1 + 1 and "#0102" not in text, "every colour is the page's"
    assert "Conv+Att" not in text

    for name in ("AstroCLIP_image", "AstroCLIP_spectrum"):
        with h5py.File(tmp_path / "pz" / f"{name}.hdf5") as file:
            assert file["data/yvals"].shape[0] == COUNT - TRAIN
            keys = [k.decode() for k in file["ancil/key"][()]]
            true = file["ancil/redshift"][()]
        rows = study.rows("test")
        assert keys == [study.catalogue["key"][int(r)].as_py() for r in rows]
        np.testing.assert_array_equal(true, study.label("redshift", rows))


def test_equal_seeds_give_equal_numbers(study):
    options = replace(OPTIONS, flows=SHORT, targets=("log_mstar", "tage_mw"), corners=0, panels=0)
    one, two = posterior(study, options), posterior(study, options)
    assert [m.value for m in one.measures] == [m.value for m in two.measures]
    assert len(one.sections) == 2, "no corner plots, no p(z)"
    other = posterior(replace(study, seed=5), options)
    assert [m.value for m in one.measures] != [m.value for m in other.measures]


def test_unknown_labels_are_left_out_and_told(make_study):
    labels, good, _ = sky()
    labels["log_mstar"][:30] = np.nan
    labels["redshift"][-15:] = np.nan
    study = make_study(labels, {"one": ("image", good, "", ())}, train=TRAIN)
    outcome = posterior(study, replace(OPTIONS, flows=SHORT, targets=("redshift", "log_mstar")))
    assert "30 of 400 training and 15 of 200 test samples lack one of the labels" in "\n".join(outcome.lines)
    (nll,) = values(outcome, metric="nll", model="flows")
    assert nll.samples == 185
    (alone,) = values(outcome, metric="nll", model="flows of redshift alone")
    assert alone.samples == 185


def test_properties_without_values_are_left_out_by_default(make_study):
    labels, good, _ = sky()
    labels["log_ssfr"] = np.full(COUNT, np.nan)
    labels["ln_z_mw"] = np.full(COUNT, -4.0)
    study = make_study(labels, {"one": ("image", good, "", ())}, train=TRAIN)
    outcome = posterior(study, replace(OPTIONS, flows=SHORT, corners=0, panels=0))
    (nll,) = values(outcome, metric="nll", model="flows")
    assert nll.target == "redshift, log_mstar, tage_mw"
    told = [line for line in outcome.lines if line.startswith("left out: ")]
    assert len(told) == 2 and "must vary" in "".join(told) and "known for none" in "".join(told)


def test_a_single_target(study):
    outcome = posterior(study, replace(OPTIONS, flows=SHORT, targets=("tage_mw",), panels=0))
    assert values(outcome, metric="crps", target="tage_mw")
    assert len(outcome.sections) == 2, "one parameter has no corner plot"


def test_feature_sets_share_their_rows(make_study):
    labels, good, poor = sky()
    poor[TRAIN : TRAIN + 50] = np.nan
    features = {"one": ("image", poor, "", ()), "two": ("spectrum", good, "", ())}
    outcome = posterior(make_study(labels, features, train=TRAIN), replace(OPTIONS, flows=SHORT, panels=0, corners=0))
    assert {m.samples for m in values(outcome, metric="nll")} == {150}


def test_the_gaussian_without_embeddings():
    rng = np.random.default_rng(0)
    theta = rng.multivariate_normal([3, -2], [[4, 1.5], [1.5, 1]], 200000)
    exact = 1 + np.log(2 * np.pi) + 0.5 * np.log(1 - 0.75**2)  # standardised: unit variances, correlation 0.75
    spoiled = theta[:1000].copy()
    spoiled[:10, 0] = np.nan
    assert gaussian_nll(theta, theta) == pytest.approx(exact, abs=0.01)
    assert gaussian_nll(theta, spoiled) == pytest.approx(exact, abs=0.1)
    truth = rng.normal([3, -2], [3, 0.5], (500, 2))  # not distributed as the training labels are
    mean, std = theta.mean(0), theta.std(0)
    gaussian = multivariate_normal(np.zeros(2), np.cov(((theta - mean) / std).T))
    assert gaussian_nll(theta, truth) == pytest.approx(-gaussian.logpdf((truth - mean) / std).mean())


def test_default_properties_are_the_papers():
    assert PROPERTIES == ("redshift", "log_mstar", "ln_z_mw", "tage_mw", "log_ssfr")


@pytest.mark.parametrize(
    "labels, change, message",
    [
        (None, {"targets": ("colour",)}, "label 'colour': must be one of the survey's labels"),
        ({"mag_g": np.arange(COUNT) * 1.0}, {}, "none of redshift, log_mstar"),
        ({"log_mstar": np.arange(COUNT) * 1.0}, {"qp_out": "pz"}, "qp_out: p.z. needs redshifts"),
        ({"log_mstar": np.where(np.arange(COUNT) < 401, 1.0, 2.0)}, {"targets": ("log_mstar",)}, "must vary"),
    ],
    ids=["unknown-target", "no-property", "no-redshift", "constant"],
)
def test_studies_that_cannot_be_done(make_study, tmp_path, labels, change, message):
    usual, good, _ = sky()
    if "qp_out" in change:
        change = {"qp_out": tmp_path / change["qp_out"]}
    study = make_study(labels or usual, {"one": ("image", good, "", ())}, train=TRAIN)
    with pytest.raises(ValueError, match=message):
        posterior(study, replace(OPTIONS, **change))


def test_predictions_alone_are_refused(make_study):
    labels, good, _ = sky()
    study = make_study(labels, {"Conv+Att": ("spectrum", good[:, :1], "", ("redshift",))}, train=TRAIN)
    with pytest.raises(ValueError, match="no embeddings, only predictions"):
        posterior(study, OPTIONS)


def test_files_of_two_feature_sets_must_differ(make_study, tmp_path):
    labels, good, poor = sky()
    features = {"a b": ("image", poor, "", ()), "a-b": ("spectrum", good, "", ())}
    study = make_study(labels, features, train=TRAIN)
    with pytest.raises(ValueError, match="must differ in letters or digits"):
        posterior(study, replace(OPTIONS, flows=SHORT, targets=("log_mstar",), qp_out=tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"draws": 1}, "draws and scored"),
        ({"scored": 1}, "draws and scored"),
        ({"corners": -1}, "corners and panels"),
        ({"targets": ("redshift", "redshift")}, "targets: must differ"),
    ],
    ids=["draws", "scored", "corners", "repeated-target"],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **change)
