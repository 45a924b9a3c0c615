"""Builders of report pages: every title, text and cell is escaped here, so that no other file writes tags.

A piece is `Markup`, which is put into others as it is; any other string is text, and jinja2 escapes it. Only charts, pictures and
the style sheet are drawn elsewhere.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from armillary.engine.evaluate.page.style import CSS

__all__ = [
    "Bold", "Groups", "card", "details", "figure", "grid", "header", "headline", "lines", "now", "number", "page", "picture", "quiet",
    "row", "section", "sky", "stack", "subsection", "table", "verdicts", "write_page",
]  # fmt: skip

TEMPLATE = """
{% macro page(title, css, header, sections, written) -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ css }}</style></head><body>{{ header }}<main>
{%- for one in sections %}{{ one }}{% endfor -%}
</main><footer>Written {{ written }} by armillary. This page needs no network.</footer></body></html>
{% endmacro %}

{% macro header(title, text, command, facts) -%}
<header><div class="brand">Armillary</div><h1>{{ title }}</h1>
{%- if text %}<p class="quiet">{{ text }}</p>{% endif -%}
{%- if command %}<p class="quiet"><code>{{ command }}</code></p>{% endif -%}
{%- if facts %}<dl class="facts">
{%- for name, value in facts.items() %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor -%}
</dl>{% endif %}</header>
{%- endmacro %}

{% macro heading(tag, title, text, parts) -%}
<{{ tag }}>{{ title }}</{{ tag }}>{% if text %}<p class="quiet">{{ text }}</p>{% endif %}
{%- for part in parts %}{{ part }}{% endfor -%}
{%- endmacro %}

{% macro box(kind, parts) -%}
<div class="{{ kind }}">{% for part in parts %}{{ part }}{% endfor %}</div>
{%- endmacro %}

{% macro card(title, parts) -%}
<div class="card">{% if title %}<h3>{{ title }}</h3>{% endif %}{% for part in parts %}{{ part }}{% endfor %}</div>
{%- endmacro %}

{% macro cells(tag, values, classes) -%}
{% for value in values %}<{{ tag }}{% if classes[loop.index0] %} class="{{ classes[loop.index0] }}"{% endif %}>
{{- value }}</{{ tag }}>{% endfor %}
{%- endmacro %}

{% macro table(head, groups, classes) -%}
<div class="scroll"><table>{% if head %}<thead><tr>{{ cells("th", head, classes) }}</tr></thead>{% endif %}<tbody>
{%- for title, rows in groups %}
{%- if title %}<tr class="group"><td colspan="{{ classes | length }}">{{ title }}</td></tr>{% endif %}
{%- for bold, row in rows %}<tr{% if bold %} class="head"{% endif %}>{{ cells("td", row, classes) }}</tr>{% endfor %}
{%- endfor -%}
</tbody></table></div>
{%- endmacro %}

{% macro number(value, error, bold) -%}
{% if bold %}<b>{{ value }}</b>{% else %}{{ value }}{% endif %}{% if error %} <span class="se">± {{ error }}</span>{% endif %}
{%- endmacro %}

{% macro quiet(text) %}<span class="se">{{ text }}</span>{% endmacro %}

{% macro headline(value, error, label, others) -%}
<div class="headline"><div><div class="big">{{ value }}{% if error %}<small> ± {{ error }}</small>{% endif %}</div>
<div class="label">{{ label }}</div></div>
{%- for name, other in others %}<div><div class="second">{{ other }}</div><div class="label">{{ name }}</div></div>
{%- endfor %}</div>
{%- endmacro %}

{% macro verdicts(items) -%}
<ul class="verdict">
{%- for kind, title, text in items %}<li class="{{ kind }}"><b>{{ title }}</b><span>{{ text }}</span></li>{% endfor -%}
</ul>
{%- endmacro %}

{% macro details(title, body) -%}
<details><summary>{{ title }}</summary>{{ body }}</details>
{%- endmacro %}

{% macro picture(source, alt, kind, pixelated) -%}
<img{% if kind %} class="{{ kind }}"{% endif %}{% if pixelated %} style="image-rendering:pixelated"{% endif %} alt="{{ alt }}" src="{{ source }}">
{%- endmacro %}

{% macro lines(items) %}{% for item in items %}{% if not loop.first %}<br>{% endif %}{{ item }}{% endfor %}{% endmacro %}

{% macro figure(body, caption, outlined) -%}
<figure class="{{ 'query' if outlined }}">{{ body }}{% if caption %}<figcaption>{{ lines(caption) }}</figcaption>{% endif %}</figure>
{%- endmacro %}

{% macro row(figures, width) -%}
<div class="row neighbours" style="--n:{{ width }}">{% for one in figures %}{{ one }}{% endfor %}</div>
{%- endmacro %}
"""

_MACROS = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE).module

Groups = Sequence[tuple[str, Iterable[Sequence[object]]]]


class Bold(list[object]):
    """A row of a table that stands out."""


def _render(macro: str, *values: object) -> Markup:
    return Markup(getattr(_MACROS, macro)(*values))


def page(title: str, head: Markup, sections: Iterable[str]) -> str:
    """A whole page; `head` from `header`, `sections` from `section`, empty ones are skipped."""
    return str(_render("page", title, Markup(CSS), head, [s for s in sections if s], now()))


def write_page(path: Path, title: str, head: Markup, sections: Iterable[str]) -> None:
    """Write a `page` under a temporary name, then rename it; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page(title, head, sections), encoding="utf-8")
    temporary.replace(path)


def header(title: str, text: str = "", *, command: str = "", facts: Mapping[str, object] | None = None) -> Markup:
    """Head of a page: its title, a sentence, the command behind it, and facts by name."""
    return _render("header", title, text, command, facts or {})


def section(title: str, text: str = "", *parts: str) -> Markup:
    """A heading, a quiet paragraph, and pieces below it."""
    return _render("heading", "h2", title, text, parts)


def subsection(title: str, *parts: str) -> Markup:
    """A small heading, and pieces below it."""
    return _render("heading", "h3", title, "", parts)


def card(*parts: str, title: str = "") -> Markup:
    """A box on the page with an optional title."""
    return _render("card", title, parts)


def grid(cards: Iterable[str]) -> Markup:
    """Cards side by side."""
    return _render("box", "grid", list(cards))


def stack(cards: Iterable[str]) -> Markup:
    """Cards below each other."""
    return _render("box", "stack", list(cards))


def sky(*parts: str) -> Markup:
    """A black box for pictures."""
    return _render("box", "sky", parts)


def table(head: Sequence[object], groups: Groups, *, classes: Mapping[int, str] | None = None) -> Markup:
    """A table that scrolls in a narrow window; `card` gives it a frame.

    Args:
        head: Titles of the columns; without any there is no line of titles, and `classes` names every column.
        groups: Title and rows of each group; a group without title has no line of its own. A row of `Bold` stands out.
        classes: CSS class by number of the column: "left", "dot", "code".
    """
    kinds = [(classes or {}).get(i, "") for i in range(len(head) or len(classes or {}))]
    return _render("table", head, [(title, [(isinstance(r, Bold), r) for r in rows]) for title, rows in groups], kinds)


def number(
    value: float, error: float = np.nan, form: str = ".3f", *, bold: bool = False, quiet: bool = False
) -> Markup:
    """A number with its error; NaN is "undefined", and a NaN error is left out.

    Args:
        value: The number.
        error: Its standard error.
        form: Format of both; a sign is for the number alone.
        bold: Whether it stands out.
        quiet: Whether it is grey instead.
    """
    text = f"{value:{form}}".replace("-", "\u2212") if np.isfinite(value) else "undefined"
    if quiet or not np.isfinite(value):
        return _render("quiet", text)
    return _render("number", text, f"{error:{form.lstrip('+')}}" if np.isfinite(error) else "", bold)


def quiet(text: str) -> Markup:
    """Grey text."""
    return _render("quiet", text)


def headline(value: str, error: str, label: str, others: Iterable[tuple[str, str]]) -> Markup:
    """One large number with its error and what it is; others beside it, by name."""
    return _render("headline", value, error, label, list(others))


def verdicts(items: Iterable[tuple[str, str, str]]) -> Markup:
    """Lines of kind ("yes", "no", "note"), title and text."""
    return _render("verdicts", list(items))


def details(title: str, body: str) -> Markup:
    """A piece that is folded away under its title."""
    return _render("details", title, body)


def picture(source: str, alt: str = "", *, sheet: bool = False, pixelated: bool = False) -> Markup:
    """An image from a data URI; a sheet fills its box, a pixelated one keeps the edges of pixels."""
    return _render("picture", source, alt, "sheet" if sheet else "", pixelated)


def figure(body: str, caption: Iterable[str] = (), *, outlined: bool = False) -> Markup:
    """A picture or chart of a `row` with lines of caption; empty lines are left out."""
    return _render("figure", body, [line for line in caption if line], outlined)


def row(figures: Iterable[str], width: int) -> Markup:
    """Figures side by side in `width` places; lies in a `sky`."""
    return _render("row", list(figures), width)


def lines(*items: str) -> Markup:
    """Texts below each other."""
    return _render("lines", items)


def now() -> str:
    """The time of writing."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
