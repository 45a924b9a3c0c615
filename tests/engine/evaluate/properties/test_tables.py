import math

import pytest

from armillary.engine.evaluate.probes.scores import Difference
from armillary.engine.evaluate.properties.results import Comparison
from armillary.engine.evaluate.properties.tables import comparison_section, number, redshift_section, table


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.5,), "0.500"),
        ((-0.5, 0.01), '\u22120.500 <span class="se">\u00b1 0.010</span>'),
        ((0.5, 0.01, "+.2f"), '+0.50 <span class="se">\u00b1 0.01</span>'),
        ((math.nan, 0.01), '<span class="se">undefined</span>'),
    ],
    ids=["plain", "negative", "signed", "undefined"],
)
def test_number(arguments, text):
    assert number(*arguments) == text


def test_only_the_number_is_bold():
    assert number(0.5, 0.1, bold=True) == '<b>0.500</b> <span class="se">\u00b1 0.100</span>'


def test_table_has_a_line_for_a_group_with_a_title():
    page = table(["a", "b"], [("one", [["1", "2"]]), ("", [["3", "4"]])])
    assert '<tr class="group"><td colspan="2">one</td></tr><tr><td>1</td><td>2</td></tr><tr><td>3</td>' in page


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
