"""Command `armillary search`: the objects whose embeddings are most similar to that of a query.

armillary search images.parquet --query 39627788403084375
armillary search images.parquet --query cutout.fits --run runs/astroclip --data survey --out answers.html
armillary search images.parquet --query 39627788403084375 --query-embeddings spectra.parquet    # across modalities
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from markupsafe import Markup

from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.evaluate.cli import choose_device
from armillary.engine.evaluate.page import html, pictures
from armillary.engine.evaluate.search.index import Answers, Index
from armillary.engine.evaluate.search.pictures import Tile, draw_objects, spectrum_tile, tile_row
from armillary.engine.evaluate.search.query import Query, query_by_key, query_from_file

__all__ = ["search"]

SHOWN_LABEL = "redshift"
A_ROW = 9  # pictures side by side


def search(
    embeddings: tyro.conf.Positional[Path],
    *,
    query: str,
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 8,
    query_embeddings: Path | None = None,
    run: Path | None = None,
    readout: str | None = None,
    data: Path | None = None,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    index: Literal["exact", "ivfpq", "auto"] = "auto",
    save_index: Path | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> int:
    """Find the objects most similar to one: of the survey, of another modality, or in a file.

    Args:
        embeddings: File of `armillary embed`, or the folder of an index that --save-index wrote.
        query: Key of an object, or a file with one: a FITS cutout, a picture, a spectrum.
        k: Answers.
        query_embeddings: Look the key up in this file instead: another modality of the same aligned encoder.
        run: The run that made the embeddings, to embed a query that is a file.
        readout: Which of the run's embeddings to make of the file; by default the one that fits.
        data: The survey, for redshifts and pictures of the answers.
        out: Also write the answers: a .parquet, or an .html page with pictures (needs --data).
        index: Compare with every vector, or with codes of those in the nearest lists (IVF-PQ); auto is exact up to 4 GiB.
        save_index: Keep the index in this folder; of an IVF-PQ index also the vectors, in half precision.
        device: Where to run the encoder; auto takes a GPU where there is one.
    """
    path = Path(query)
    from_file = path.is_file()
    _check(query, from_file, embeddings, query_embeddings, run, readout, data, out, save_index)
    survey = None if data is None else Survey.load(data)
    found = Index.load(embeddings) if embeddings.is_dir() else _build(embeddings, index, save_index)
    if from_file:
        assert run is not None
        one = query_from_file(found, path, run, readout, choose_device(device))
    elif query_embeddings is not None:
        one = query_by_key(found, query, (query_embeddings,))
    else:
        # Codes do not give vectors back, but the file that was indexed has them.
        codes = not found.has_vectors and embeddings.is_file()
        one = query_by_key(found, query, (embeddings,) if codes else ())
    answers = found.search(one.vector, k, leave_out=None if one.own is None else np.array([one.own]))
    rows = None if data is None else _catalogue_rows(data, [one.name, *answers.key[0]])
    table = _table(one, answers, data, survey, rows)
    _print(table)
    if out is not None and out.suffix == ".parquet":
        out.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, out)
    elif out is not None:
        assert data is not None and survey is not None and rows is not None
        _write_page(out, one, table, data, survey, rows)
    if out is not None:
        print(f"written: {out}")
    return 0


def _check(
    query: str,
    from_file: bool,
    embeddings: Path,
    query_embeddings: Path | None,
    run: Path | None,
    readout: str | None,
    data: Path | None,
    out: Path | None,
    save_index: Path | None,
) -> None:
    """Refuse options that contradict each other before anything is read."""
    if from_file and run is None:
        raise ValueError(f"run: the file {query} has to be embedded; give the run that made {embeddings}")
    if from_file and query_embeddings is not None:
        raise ValueError(f"query_embeddings: are for a query by key, but {query} is a file")
    if not from_file and (run is not None or readout is not None):
        raise ValueError(f"query: there is no file {query!r}, and a key needs neither --run nor --readout")
    if save_index is not None and (embeddings.is_dir() or save_index.exists()):
        problem = f"{embeddings} is an index already" if embeddings.is_dir() else f"{save_index} exists already"
        raise ValueError(f"save_index: {problem}")
    if out is not None and out.suffix not in (".parquet", ".html"):
        raise ValueError(f"out: must end in .parquet or .html, got {out}")
    if out is not None and out.suffix == ".html" and data is None:
        raise ValueError("out: a page shows pictures; give the survey with --data")


def _build(path: Path, kind: Literal["exact", "ivfpq", "auto"], folder: Path | None) -> Index:
    if folder is None:
        return Index.read_files([path], kind=kind)
    kept = folder.with_name(f".{folder.name}.vectors.npy")
    try:
        built = Index.read_files([path], kind=kind, keep=kept)
        built.save(folder)
    finally:
        kept.unlink(missing_ok=True)
    print(f"{folder}: index of {len(built):,} vectors, {built.plan.kind}")
    return Index.load(folder)


def _catalogue_rows(data: Path, keys: Sequence[str]) -> dict[str, int]:
    """Catalogue rows of those of the keys that the survey has."""
    column: Any = pq.read_table(data / "catalog.parquet", columns=["key"])["key"]
    wanted = set(keys)
    return {key: row for row, key in enumerate(column.to_pylist()) if key in wanted}


def _table(
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
    labels: Any = pq.read_table(data / "catalog.parquet", columns=names).take([rows[key] for key in keys])
    for name in names:
        table = table.append_column(name, labels[name])
    return table


def _print(table: pa.Table) -> None:
    label = SHOWN_LABEL if SHOWN_LABEL in table.column_names else None
    width = max(len("key"), *(len(key) for key in table["key"].to_pylist()))
    print(f"query {table['query'][0].as_py()}")
    print(f"{'':4}{'key':{width}}{'similarity':>12}" + (f"{label:>12}" if label else ""))
    for row in table.to_pylist():
        value = f"{row[label]:12.4f}" if label else ""
        print(f"{row['rank']:3} {row['key']:{width}}{row['similarity']:12.4f}{value}")


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
