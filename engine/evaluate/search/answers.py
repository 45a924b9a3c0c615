"""The answers of a search: as a table, on the screen, and as a page with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from armillary.engine.atomic_file import atomic_path
from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.evaluate.page import html, pictures
from armillary.engine.evaluate.search.index import Answers
from armillary.engine.evaluate.search.pictures import Tile, draw_objects, spectrum_tile, tile_row
from armillary.engine.evaluate.search.query import Query
from armillary.engine.exclusive import exclusive_file

__all__ = ["answer_table", "catalogue_rows", "print_answers", "write_answers"]

SHOWN_LABEL = "redshift"
A_ROW = 9  # pictures side by side


def catalogue_rows(data: Path, keys: Sequence[str]) -> dict[str, int]:
    """Catalogue rows of those of the keys that the survey has."""
    column: Any = read_catalog(data, ["key"])["key"]
    wanted = set(keys)
    return {key: row for row, key in enumerate(column.to_pylist()) if key in wanted}


def answer_table(
    one: Query, answers: Answers, data: Path | None, survey: Survey | None, rows: dict[str, int] | None
) -> pa.Table:
    """Query, rank, key and similarity of the answers, with the survey's labels where it is given."""
    keys = answers.key[0].tolist()
    table = pa.table(
        {
            "query": [one.name] * len(keys),
            "rank": pa.array(range(1, len(keys) + 1), pa.int32()),
            "key": keys,
            "similarity": pa.array(answers.similarity[0], pa.float32()),
        }
    )
    if data is None or survey is None or rows is None:
        return table
    if missing := [key for key in keys if key not in rows]:
        raise ValueError(f"data: survey {survey.name!r} has no object {missing[0]!r}; is it the one that was embedded?")
    names = list(survey.labels)
    labels: Any = read_catalog(survey, names).take([rows[key] for key in keys])
    for name in names:
        table = table.append_column(name, labels[name])
    return table


def print_answers(table: pa.Table) -> None:
    """Print one line an answer: rank, key, similarity and, where it is known, the redshift."""
    label = SHOWN_LABEL if SHOWN_LABEL in table.column_names else None
    width = max(len("key"), *(len(key) for key in table["key"].to_pylist()))
    print(f"query {table['query'][0].as_py()}")
    print(f"{'':4}{'key':{width}}{'similarity':>12}" + (f"{label:>12}" if label else ""))
    for row in table.to_pylist():
        value = f"{row[label]:12.4f}" if label else ""
        print(f"{row['rank']:3} {row['key']:{width}}{row['similarity']:12.4f}{value}")


def write_answers(
    out: Path, one: Query, table: pa.Table, data: Path | None, survey: Survey | None, rows: dict[str, int] | None
) -> None:
    """Write the answers as a .parquet, or as an .html page with their pictures, which needs the survey."""
    with exclusive_file(out):
        if out.suffix == ".parquet":
            with atomic_path(out) as temporary:
                pq.write_table(table, temporary)
            return
        assert data is not None and survey is not None and rows is not None
        _write_page(out, one, table, data, survey, rows)


def _write_page(out: Path, one: Query, table: pa.Table, data: Path, survey: Survey, rows: dict[str, int]) -> None:
    """Pictures of the query and its answers; images above spectra where the survey has both."""
    answers = table.to_pylist()
    places = [rows[a["key"]] for a in answers]
    own = rows.get(one.name) if one.sample is None else None
    sections = []
    for modality, heading in (("image", "Images"), ("spectrum", "Spectra")):
        if modality not in survey.modalities:
            continue
        drawn = draw_objects(data, survey, modality, [*places, *([] if own is None else [own])])
        picture = _picture_of(one, modality) if own is None else drawn.get(own, Markup())
        tiles = [Tile(picture, ("query",), True)]
        for answer, row in zip(answers, places, strict=True):
            value = answer.get(SHOWN_LABEL)
            redshift = f"z {value:.3f}" if isinstance(value, float) and np.isfinite(value) else ""
            tiles.append(
                Tile(drawn.get(row, Markup()), (redshift, f"{answer['similarity']:.3f}"), answer["key"] == one.name)
            )
        width = min(len(tiles), A_ROW)
        body = [tile_row(tiles[i : i + width], width) for i in range(0, len(tiles), width)]
        sections.append(html.section(heading, "", html.sky(*body)))
    listing = html.table(table.column_names[1:], [("", [[_text(v) for v in list(a.values())[1:]] for a in answers])])
    sections.append(html.section("Answers", "", html.card(listing)))
    title = f"Most similar to {one.name}"
    text = f"The {len(answers)} objects of {survey.name} with the largest cosine similarity of embeddings, best first."
    html.write_page(out, title, html.header(title, text), sections)


def _picture_of(one: Query, modality: str) -> Markup:
    """Picture of a query that came from a file; empty where it has none of that modality."""
    if one.sample is None or one.survey is None:
        return Markup()
    if modality == "image" and one.sample.image is not None:
        drawn = galaxy_picture(one.sample.image, one.sample.valid, one.survey)
        return html.picture(pictures.data_uri(drawn))
    if modality == "spectrum" and one.sample.spectrum is not None and one.survey.spectrum is not None:
        return spectrum_tile(one.survey.spectrum.grid.angstrom(), one.sample.spectrum)
    return Markup()


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
