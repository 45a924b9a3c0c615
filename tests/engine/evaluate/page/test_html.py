"""Builders of report pages: nesting, and escaping of whatever a name may hold."""

import math

import pytest
from html_page import Page
from markupsafe import Markup

from armillary.engine.evaluate.page import html

NASTY = "</script></td></style><b>\"x\" & 'y' {{ 7*7 }} {% raw %}"


BUILDERS = {
    "page": lambda s: html.page(s, html.header(s), [html.section(s)]),
    "header": lambda s: html.header(s, s, command=s, facts={s: s}),
    "section": lambda s: html.section(s, s, s),
    "subsection": lambda s: html.subsection(s, s),
    "card": lambda s: html.card(s, title=s),
    "grid": lambda s: html.grid([s]),
    "stack": lambda s: html.stack([s]),
    "sky": lambda s: html.sky(s),
    "table": lambda s: html.table([s, s], [(s, [[s, s], html.Bold([s, s])])], classes={1: "dot"}),
    "quiet": lambda s: html.quiet(s),
    "headline": lambda s: html.headline(s, s, s, [(s, s)]),
    "verdicts": lambda s: html.verdicts([("yes", s, s)]),
    "details": lambda s: html.details(s, s),
    "picture": lambda s: html.picture(s, s, sheet=True, pixelated=True),
    "figure": lambda s: html.figure(s, [s, "", s], outlined=True),
    "row": lambda s: html.row([s], 3),
    "lines": lambda s: html.lines(s, s),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_any_text_stays_text(name):
    nasty, plain = (Page(BUILDERS[name](s)) for s in (NASTY, "plain"))
    assert nasty.tags == plain.tags
    times = plain.text.count("plain")
    assert nasty.text.count(NASTY) == times and nasty.attributes.count(NASTY) == plain.attributes.count("plain")
    assert times + plain.attributes.count("plain") > 0


def test_every_builder_is_tried():
    others = {"Bold", "Groups", "number", "now", "write_page"}
    assert set(html.__all__) == set(BUILDERS) | others


def test_pieces_go_into_others_as_they_are():
    inner = html.card(Markup("<svg></svg>"), title="a < b")
    assert inner == '<div class="card"><h3>a &lt; b</h3><svg></svg></div>'
    assert inner in html.section("t", "", html.grid([inner]))
    assert html.section("a", "b", inner) == f'<h2>a</h2><p class="quiet">b</p>{inner}'


def test_table_groups_classes_and_bold_rows():
    found = html.table(["a", "b"], [("one", [["1", 2]]), ("", [html.Bold(["3", "4"])])], classes={1: "dot"})
    assert '<thead><tr><th>a</th><th class="dot">b</th></tr></thead>' in found
    assert '<tr class="group"><td colspan="2">one</td></tr><tr><td>1</td><td class="dot">2</td></tr>' in found
    assert '<tr class="head"><td>3</td><td class="dot">4</td></tr></tbody>' in found
    assert "thead" not in html.table([], [("", [["k", "v"]])], classes={0: "code", 1: "code"})


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((-0.5, 0.01), {}, '\u22120.500 <span class="se">\u00b1 0.010</span>'),
        ((0.5, 0.01, "+.2f"), {}, '+0.50 <span class="se">\u00b1 0.01</span>'),
        ((0.5,), {}, "0.500"),
        ((0.5, 0.1), {"bold": True}, '<b>0.500</b> <span class="se">\u00b1 0.100</span>'),
        ((0.5, 0.1), {"quiet": True}, '<span class="se">0.500</span>'),
        ((math.nan, 0.01), {"bold": True}, '<span class="se">undefined</span>'),
    ],
)
def test_number(arguments, options, text):
    assert html.number(*arguments, **options) == text


def test_a_page_is_written_whole_into_a_new_folder(tmp_path):
    html.write_page(tmp_path / "a" / "b.html", "t", html.header("t"), ["", html.section("s")])
    text = (tmp_path / "a" / "b.html").read_text()
    assert text.startswith("<!doctype html>\n<html") and text.endswith("</html>\n") and "<h2>s</h2>" in text
    assert "var(--ink)" in text and '"Segoe UI"' in text, "the style sheet is put in as it is"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.html"]
