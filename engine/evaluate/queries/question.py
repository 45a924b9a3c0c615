"""Questions to a method that answers any: what is wanted, given what; and pairs of them, to see what more data bring.

Written as WANT:GIVEN+GIVEN, or WANT:GIVEN,GIVEN+GIVEN for a pair, such as

    redshift:photometry_lsst
    redshift:photometry_lsst,photometry_lsst+photometry_spherex
    stellar_mass:photometry_lsst+sfh[0:18],photometry_lsst+sfh[18:36]

where `name[a:b]` are components a to before b of a vector.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from armillary.models.quantities import Quantity, Questions

__all__ = [
    "PIXELS",
    "SPLITS",
    "Comparison",
    "Query",
    "default_comparisons",
    "default_queries",
    "parse_questions",
    "parts_of",
]

SPLITS = (0.25, 0.50, 0.75, 0.89)
"""Shares of cosmic time at which a history is cut into early and late."""

PIXELS = ("image", "spectrum")
"""Given things that are no quantities."""

PART = re.compile(r"([A-Za-z]\w*)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class Query:
    """What is wanted, given what.

    Attributes:
        want: A quantity.
        given: Quantities, or parts of them as `name[a:b]`.
    """

    want: str
    given: tuple[str, ...]

    def __str__(self) -> str:
        """As probabilities are written."""
        return f"{self.want} | {', '.join(self.given)}"


@dataclass(frozen=True)
class Comparison:
    """The same wanted, given two things.

    Attributes:
        title: What a table calls it.
        first: What its errors are compared with.
        second: What is hoped to be better.
    """

    title: str
    first: Query
    second: Query


def parts_of(given: str, quantities: Sequence[Quantity]) -> tuple[Quantity, slice]:
    """The quantity, and which of its components, that a given thing names.

    Raises:
        ValueError: There is no such quantity, or it has no such components.
    """
    match = PART.fullmatch(given)
    quantity = next((q for q in quantities if match is not None and q.name == match[1]), None)
    if match is None or quantity is None:
        raise ValueError(
            f"{given!r}: must be one of {', '.join(q.name for q in quantities)}, or a part name[first:end]"
        )
    begin, end = int(match[2] or 0), int(match[3] or quantity.size)
    if not begin < end <= quantity.size:
        raise ValueError(f"{given!r}: must name components of {quantity.size}, first to before end")
    return quantity, slice(begin, end)


def parse_questions(texts: Sequence[str], asked: Questions) -> tuple[list[Query], list[Comparison]]:
    """Read questions that were written as above.

    Raises:
        ValueError: One is written otherwise, or names what the method cannot be given or asked.
    """
    queries: list[Query] = []
    comparisons: list[Comparison] = []
    may = {q.name for q in asked.want}
    for text in texts:
        want, colon, rest = text.partition(":")
        sides = [tuple(side.split("+")) for side in rest.split(",")]
        if not colon or len(sides) > 2 or not all(all(side) for side in sides):
            raise ValueError(f"query {text!r}: must be WANT:GIVEN+GIVEN, or WANT:GIVEN,GIVEN for a pair to compare")
        if want not in may:
            raise ValueError(f"query {text!r}: the method can be asked for {', '.join(sorted(may))}, not {want!r}")
        for side in sides:
            for given in side:
                if given not in asked.given:  # images and spectra have no parts
                    parts_of(given, [q for q in asked.want if q.name in asked.given])
            if want in (re.sub(r"\[.*", "", given) for given in side):
                raise ValueError(f"query {text!r}: {want} is wanted and given")
        found = [Query(want, side) for side in sides]
        queries += found
        if len(found) == 2:
            comparisons.append(Comparison(f"{want}: {', '.join(sides[1])} for {', '.join(sides[0])}", *found))
    return list(dict.fromkeys(queries)), comparisons


def default_queries(asked: Questions, judged: Collection[str]) -> list[Query]:
    """Every number that can be judged from each vector, image or spectrum, and from all of them; every vector from each other one."""
    sizes = {q.name: q.size for q in asked.want}
    sources = [name for name in asked.given if name in PIXELS or sizes.get(name, 1) > 1]
    queries = []
    for quantity in asked.want:
        if quantity.name not in judged:
            continue
        others = tuple(name for name in sources if name != quantity.name)
        queries += [Query(quantity.name, (name,)) for name in others]
        if quantity.size == 1 and len(others) > 1:
            queries.append(Query(quantity.name, others))
    return queries


def default_comparisons(asked: Questions) -> list[Comparison]:
    """MOSAIC's two: what SPHEREx adds to LSST for the redshift; the late for the early history for the stellar mass."""
    quantities = {q.name: q for q in asked.want if q.name in asked.given}
    lsst = next((n for n in quantities if "lsst" in n), "")
    spherex = next((n for n in quantities if "spherex" in n), "")
    comparisons = []
    if lsst and spherex and "redshift" in quantities:
        first, second = Query("redshift", (lsst,)), Query("redshift", (lsst, spherex))
        comparisons.append(Comparison("LSST and SPHEREx for LSST alone", first, second))
    if lsst and "stellar_mass" in quantities and (history := quantities.get("sfh")) and history.size >= 8:
        for share in SPLITS:
            cut = round(share * history.size)
            early, late = f"sfh[0:{cut}]", f"sfh[{cut}:{history.size}]"
            comparisons.append(
                Comparison(
                    f"late for early history, cut at {share:.0%} of cosmic time",
                    Query("stellar_mass", (lsst, early)),
                    Query("stellar_mass", (lsst, late)),
                )
            )
    return comparisons
