import re

import numpy as np

from armillary.engine.evaluate.probes.bins import quantile_strata, score_strata
from armillary.engine.evaluate.probes.scores import BiasBin, score
from armillary.engine.evaluate.properties.figures import (
    bias_chart,
    bias_section,
    prediction_section,
    strata_chart,
    strata_section,
)
from armillary.engine.evaluate.properties.results import Prediction, Strata

TRUE = np.random.default_rng(0).uniform(0.1, 0.5, 120)


def prediction(name, label="redshift", modality="image", bias=()):
    predicted = TRUE + 0.02 * np.random.default_rng(len(name)).normal(size=120)
    scores = score(TRUE, predicted, resamples=10) if label == "redshift" else None
    return Prediction(name, modality, "64-NN", label, np.arange(120), TRUE, predicted, 0.9, 0.01, scores, bias)


def strata(by, label):
    bins = quantile_strata(by, TRUE, 3)
    scores = score_strata(bins, TRUE, TRUE + 0.01, redshift=label == "redshift", resamples=10)
    return Strata(by, bins, {"a <b>": scores, "c": scores})


def colours(svg):
    return set(re.findall(r"var\(--s\d\)", svg))


def test_a_set_keeps_its_colour_in_every_chart():
    bins = (BiasBin(0.1, 0.2, 0.15, 9, 0.01, 0.002), BiasBin(0.2, 0.3, 0.25, 1, -0.01, float("nan")))
    order = ["first", "second", "third"]
    assert colours(bias_chart([prediction("third", bias=bins)], order)) == {"var(--s3)"}
    assert colours(bias_chart([prediction(n, bias=bins) for n in order[:2]], order)) == {"var(--s1)", "var(--s2)"}


def test_more_sets_than_colours():
    bins = (BiasBin(0.1, 0.2, 0.15, 9, 0.01, 0.002), BiasBin(0.2, 0.3, 0.25, 9, 0.01, 0.002))
    order = [f"set {i}" for i in range(8)]
    chart = bias_chart([prediction(n, bias=bins) for n in order], order)
    assert len(colours(chart)) == 6
    assert chart.count("stroke-dasharray") >= 2  # the seventh and eighth differ by their dashes
    assert all(n in chart for n in order)


def test_bins_of_the_label_itself_show_residuals():
    chart = strata_chart([strata("mag_r", "redshift"), strata("redshift", "redshift")], "redshift", ["a <b>", "c"])
    assert "R\u00b2 of redshift" in chart
    assert "mean \u0394z / (1 + z)" in chart
    assert "true redshift" in chart
    assert chart.count(">c<") == 1, "one legend for all panels"
    only = strata_chart([strata("mag_r", "log_mstar")], "log_mstar", ["a <b>", "c"])
    assert "NMAD of log_mstar error" in only
    assert "mean" not in only


def test_sections_by_what_there_is():
    assert strata_section([], "redshift", []) == ""
    assert bias_section([], []) == ""
    assert "Quality by true redshift<" in strata_section([strata("redshift", "redshift")], "redshift", ["a <b>", "c"])
    bins = (BiasBin(0.1, 0.2, 0.15, 9, 0.01, 0.002),)
    page = bias_section([prediction("a", bias=bins), prediction("s", modality="spectrum", bias=bins)], ["a", "s"])
    assert re.findall("<h3>(.*?)</h3>", page) == ["Images", "Spectra"]
    page = prediction_section([prediction("a <b>", "log_mstar")])
    assert "<h3>a &lt;b&gt;, 64-NN</h3>" in page
    assert "dashes" not in page  # no outliers without redshifts
