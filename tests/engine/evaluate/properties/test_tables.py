from armillary.engine.evaluate.probes.scores import Difference
from armillary.engine.evaluate.properties.results import Comparison
from armillary.engine.evaluate.properties.tables import comparison_section, redshift_section


def test_differences_that_are_clear_are_bold_whatever_their_sign():
    def comparison(label, *difference):
        return Comparison("image", "a&b", "c", False, "64-NN", label, Difference(*difference), 50)

    some = [
        comparison("redshift", 0.1, 0.01, 0.08, 0.12),
        comparison("mass", -0.1, 0.01, -0.12, -0.08),
        comparison("age", 0.1, 0.1, -0.1, 0.3),
    ]
    page = comparison_section(some, "redshift", ["redshift", "mass", "age", "sfr"])
    assert page.count("<li ") == 1  # the headline label
    assert '<li class="yes"><b>better</b>' in page
    assert "<td>a&amp;b \u2212 c</td><td><b>+0.100</b>" in page
    assert "<b>\u22120.100</b>" in page
    assert '<td>+0.100 <span class="se">\u00b1 0.100</span></td><td>\u2013</td></tr>' in page


def test_nothing_to_tell_is_nothing_written():
    assert comparison_section([], "redshift", ["redshift"]) == ""
    assert redshift_section([]) == ""
