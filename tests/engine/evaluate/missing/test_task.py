"""The task `missing` on a toy survey: the grid, the measures, the comparison, the page; and the task `lines` on the same runs."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from pair_study import DENSITY, LINES, POINT, pair_encoder, pair_study, pair_survey

from armillary.engine.evaluate.lines.measure import decoded, observed
from armillary.engine.evaluate.lines.task import lines
from armillary.engine.evaluate.missing.grid import SHARES, Shown, predict
from armillary.engine.evaluate.missing.task import missing
from armillary.engine.evaluate.runs.tasks import TASKS
from armillary.engine.evaluate.study.options import Options

pytestmark = pytest.mark.whole_task

OPTIONS = Options(resamples=50)
IMAGE, BOTH = Shown(0.0, False), Shown(0.0, True)


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    return pair_survey(tmp_path_factory.mktemp("pairs") / "survey")


@pytest.fixture(scope="module")
def encoders(survey):
    return [pair_encoder(survey, DENSITY, "improved", steps=60), pair_encoder(survey, POINT, "published")]


@pytest.fixture(scope="module")
def study(survey):
    perfect, useless = (lambda z: np.nan_to_num(z)[:, None]), (lambda z: np.full((len(z), 1), 0.2))
    return pair_study(survey, ("oracle", perfect), ("constant", useless))


@pytest.fixture(scope="module")
def outcome(study, encoders):
    return missing(study, encoders, OPTIONS)


def value(outcome, features, model, metric, stratum="all"):
    found = [
        m for m in outcome.measures
        if (m.features, m.model, m.metric, m.stratum) == (features, model, metric, stratum)
    ]  # fmt: skip
    assert len(found) == 1, (features, model, metric)
    return found[0]


def test_the_grid_holds_galaxies_with_image_spectrum_and_redshift(study, encoders):
    found = predict(encoders[0], study, 10_000)
    rows = np.arange(90)[np.array(study.catalogue["split"].to_pylist()) == "test"]
    number = np.array([int(k[1:]) for k in study.catalogue["key"].to_pylist()])
    assert set(found.rows) == {r for r in rows if number[r] % 11 and number[r] % 13}
    assert set(found.median) == {Shown(s, spectrum) for s in SHARES for spectrum in (False, True)} == set(found.crps)
    point = predict(encoders[1], study, 10_000)
    assert point.pit == {} == point.crps and set(point.median) == set(found.median)
    part = found.at(found.rows[[3, 5]])
    np.testing.assert_array_equal(part.median[IMAGE], found.median[IMAGE][[3, 5]])
    # With nothing hidden the grid says what `encode` says.
    method = encoders[0].method
    shown = torch.zeros(1, 4, dtype=torch.bool)
    assert method.cut.patches(method.inputs) == shown.shape[1]


def test_every_measure_is_there_once_and_rivals_are_judged_on_the_same_galaxies(outcome):
    counts = {m.samples for m in outcome.measures if m.stratum == "all"}
    assert len(counts) == 1
    for name in ("improved", "published"):
        for shown in ("image", "image, 25% hidden", "image, 75% hidden + spectrum"):
            for metric in ("nmad", "nmad_about_zero", "bias", "outliers", "catastrophic", "rms", "loss"):
                assert math.isfinite(value(outcome, name, shown, metric).value)
    assert value(outcome, "improved", "image", "crps").value > 0
    assert 0 <= value(outcome, "improved", "image", "pit_ks").value <= 1
    assert not [m for m in outcome.measures if m.features == "published" and m.metric in ("crps", "pit_ks")]
    assert value(outcome, "oracle", "", "nmad").value < 1e-6
    assert {m.stratum for m in outcome.measures if m.features == "oracle"} >= {"all", "0.2 < z <= 0.4"}


def test_verdicts_say_who_wins(outcome):
    said = {text.split(":")[0]: kind for kind, _, text in outcome.verdict}
    assert said["improved from images alone loses to oracle"] == "no"
    assert said["improved from images alone beats constant"] == "yes"


def test_without_supervised_networks_that_is_said(survey, encoders):
    alone = missing(pair_study(survey), encoders[:1], OPTIONS)
    assert any("no network that was trained on the redshift stands beside" in text for text in alone.lines)


def test_the_page_has_charts_and_pictures(outcome):
    page = "".join(outcome.sections)
    charts = [ET.fromstring(part) for part in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(charts) == 3 + 2 * 5  # masking, redshifts, calibration; five galaxies for each method
    assert page.count("data:image/png") == 1 + 2 * 5 * 5  # one is the cloud of points within a chart
    assert "Filled in by improved" in page and "draws, each at a redshift drawn from p(z)" in page
    assert "The method says one redshift and one spectrum." in page
    assert "oracle" in page and "0.2 &lt; z" in page


def test_no_galaxy_to_judge_is_said(study, encoders, monkeypatch):
    monkeypatch.setattr("armillary.engine.evaluate.missing.grid.pairs", lambda *_: iter(()))
    with pytest.raises(ValueError, match="split 'test': has no galaxy with an image, a spectrum and a known redshift"):
        missing(study, encoders, OPTIONS)


def test_tasks_say_when_they_cannot_be_done(study, encoders):
    methods = [e.method for e in encoders]
    for name in ("missing", "lines"):
        assert TASKS[name].impossible(study.survey, methods, OPTIONS) == ""
        assert "needs a run that fills in" in TASKS[name].impossible(study.survey, [], OPTIONS)
    assert "a run on images alone" in TASKS["baselines"].impossible(study.survey, methods, OPTIONS)


def test_observed_lines_are_the_true_ones(study, encoders):
    truth = observed(encoders[0], study, "test", 10_000, 200)
    assert len(truth.rows) > 20
    for name, at in (("Halpha", 6564.614), ("[N II]", 6585.27), ("Hbeta", 4862.683), ("[O III]", 5008.24)):
        pull = (truth.flux[name] - LINES[at]) / truth.error[name]
        known = pull[np.isfinite(pull)]
        assert abs(known.mean()) < 5 / len(known) ** 0.5 and 0.5 < known.std() < 1.6, name
    assert np.nanmedian(truth.ratio("[N II]", "Halpha")) == pytest.approx(math.log10(20 / 60), abs=0.05)


def test_a_mean_over_draws_is_blurred_and_draws_are_not(study, encoders):
    truth = observed(encoders[0], study, "test", 10_000, 200)
    ways = decoded(encoders[0], study, truth, IMAGE, 10_000)
    assert list(ways) == ["z given", "samples", "mean over draws"]
    width = {name: float(np.nanmedian(one.fwhm)) for name, one in ways.items()}
    assert width["mean over draws"] > 2 * max(width["z given"], width["samples"])
    assert ways["samples"].fwhm.shape == (len(truth.rows), 16) and ways["z given"].fwhm.shape[1] == 1
    assert list(decoded(encoders[1], study, truth, BOTH, 10_000)) == ["as decoded"]


def test_lines_are_told_beside_one_number_for_all(study, encoders):
    found = lines(study, encoders, OPTIONS)
    widths = {(m.features, m.model): m.value for m in found.measures if m.metric == "fwhm"}
    assert widths["improved", "image, mean over draws"] > widths["improved", "image, samples"]
    targets = {m.target for m in found.measures if m.features == "one number for all"}
    assert targets == {"Halpha", "Hbeta", "[N II] / Hα", "[O III] / Hβ"}
    # All toy galaxies have the same ratio, so one number is right.
    best = [m for m in found.measures if m.features == "one number for all" and m.metric == "log_half_width"]
    assert all(m.value < 0.1 for m in best)
    page = "".join(found.sections)
    assert len([ET.fromstring(p) for p in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]) == 2
    assert "Line ratios" in page and any("width of Hα by improved" in line for line in found.lines)
