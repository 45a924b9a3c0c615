import re

import numpy as np
import pytest

from armillary.engine.evaluate.morphology.figures import MorphologyResult, morphology_chart, morphology_section


def result(features, question, accuracy=0.8):
    return MorphologyResult(features, question, 1500, np.ones(200, bool), accuracy, 0.02, 0.7, 0.03, 0.5, 0.33)


RESULTS = [result(f, q, 0.6 + 0.1 * (f == "b")) for q in ("smooth-or-featured", "bar") for f in ("b", "<c>")]


def test_bars_dashes_and_one_legend():
    chart = morphology_chart(RESULTS, ["a", "b", "<c>"])
    assert set(re.findall(r"var\(--s\d\)", chart)) == {"var(--s2)", "var(--s3)"}  # by place in the study
    texts = re.findall(r"<text[^>]*>(.*?)</text>", chart)
    assert texts.count("most frequent answer") == 1
    assert texts.index("most frequent answer") > texts.index("b")
    assert {"accuracy", "F1 score", "bar"} <= set(texts)


@pytest.mark.parametrize("left_out", [(), ("merging: left out, <no> votes",)], ids=["none", "one"])
def test_table_of_both_scores_with_means(left_out):
    page = morphology_section(RESULTS, ["a", "b", "<c>"], left_out, "MLP 128", 34, 0.5)
    head = re.findall("<th>(.*?)</th>", page)
    assert head == ["Question", "train", "test", "b", "&lt;c&gt;", "most frequent"]
    assert page.count("<td>mean</td><td></td><td></td><td>0.700</td><td>0.600</td><td>0.500</td>") == 1
    assert page.count("<td>mean</td><td></td><td></td><td>0.700</td><td>0.700</td><td>0.330</td>") == 1
    assert "<td>bar</td><td>1,500</td><td>200</td>" in page
    assert ("&lt;no&gt; votes" in page) == bool(left_out)
    assert "50% or more were asked" in page
