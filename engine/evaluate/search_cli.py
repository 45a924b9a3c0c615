"""Command `armillary search`: the objects whose embeddings are most similar to that of a query.

armillary search images.parquet --query 39627788403084375
armillary search images.parquet --query cutout.fits --run runs/astroclip --data survey --out answers.html
armillary search images.parquet --query 39627788403084375 --query-embeddings spectra.parquet    # across modalities
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from armillary.engine.exclusive import exclusive_file
from armillary.engine.user_code import Packages, trust

if TYPE_CHECKING:
    from armillary.engine.evaluate.search.index import Index

__all__ = ["search"]


def search(
    embeddings: tyro.conf.Positional[Path],
    *,
    query: str,
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 8,
    query_embeddings: Path | None = None,
    run: Path | None = None,
    readout: str | None = None,
    kind: str = "auto",
    option: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    data: Path | None = None,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    index: Literal["exact", "ivfpq", "auto"] = "auto",
    save_index: Path | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    package: Packages = (),
) -> int:
    """Find the objects most similar to one: of the survey, of another modality, or in a file.

    Args:
        embeddings: File or folder of `armillary embed`, or the folder of an index that --save-index wrote.
        query: Key of an object, or a file with one: a FITS cutout, a picture, a spectrum.
        k: Answers.
        query_embeddings: Look the key up in this file or folder instead: another modality of the same aligned encoder.
        run: The run that made the embeddings, to embed a query that is a file.
        readout: Which of the run's embeddings to make of the file; by default the one that fits.
        kind: What a query that is a file holds, of those of `armillary data kinds`; by default seen from its name. module:class,
            or file.py:class, for a reader of your own.
        option: Option of the kind's reader, NAME=VALUE; may be repeated.
        data: The survey, for redshifts and pictures of the answers.
        out: Also write the answers: a .parquet, or an .html page with pictures (needs --data).
        index: Compare with every vector, or with codes of those in the nearest lists (IVF-PQ); auto is exact up to 4 GiB.
        save_index: Keep the index in this folder; of an IVF-PQ index also the vectors, in half precision.
        device: Where to run the encoder; auto takes a GPU where there is one.
        package: Name of a package, or path of its folder or of a recipe, with methods of your own; repeatable.
    """
    import numpy as np

    from armillary.engine.data.format.survey import Survey
    from armillary.engine.data.sources.options import parse_options
    from armillary.engine.evaluate.cli import choose_device
    from armillary.engine.evaluate.search.answers import answer_table, catalogue_rows, print_answers, write_answers
    from armillary.engine.evaluate.search.index import Index
    from armillary.engine.evaluate.search.query import query_by_key, query_from_file

    trust(*package)
    path = Path(query)
    from_file = path.is_file()
    for_files = run is not None or readout is not None or kind != "auto" or bool(option)
    _check(query, from_file, for_files, embeddings, query_embeddings, run, data, out, save_index)
    survey = None if data is None else Survey.load(data)
    indexed = _is_index(embeddings)
    found = Index.load(embeddings) if indexed else _build(embeddings, index, save_index)
    if from_file:
        assert run is not None
        one = query_from_file(
            found, path, run, readout, choose_device(device), kind=kind, options=parse_options(option)
        )
    elif query_embeddings is not None:
        one = query_by_key(found, query, (query_embeddings,))
    else:
        # Codes do not give vectors back, but the file that was indexed has them.
        codes = not found.has_vectors and not indexed
        one = query_by_key(found, query, (embeddings,) if codes else ())
    answers = found.search(one.vector, k, leave_out=None if one.own is None else np.array([one.own]))
    rows = None if data is None else catalogue_rows(data, [one.name, *answers.key[0]])
    table = answer_table(one, answers, data, survey, rows)
    print_answers(table)
    if out is not None:
        write_answers(out, one, table, data, survey, rows)
        print(f"written: {out}")
    return 0


def _check(
    query: str,
    from_file: bool,
    for_files: bool,
    embeddings: Path,
    query_embeddings: Path | None,
    run: Path | None,
    data: Path | None,
    out: Path | None,
    save_index: Path | None,
) -> None:
    """Refuse options that contradict each other before anything is read."""
    if from_file and run is None:
        raise ValueError(f"run: the file {query} has to be embedded; give the run that made {embeddings}")
    if from_file and query_embeddings is not None:
        raise ValueError(f"query_embeddings: are for a query by key, but {query} is a file")
    if not from_file and for_files:
        raise ValueError(f"query: there is no file {query!r}, and a key takes no --run, --readout, --kind or --option")
    if save_index is not None and (_is_index(embeddings) or save_index.exists()):
        problem = f"{embeddings} is an index already" if _is_index(embeddings) else f"{save_index} exists already"
        raise ValueError(f"save_index: {problem}")
    if out is not None and out.suffix not in (".parquet", ".html"):
        raise ValueError(f"out: must end in .parquet or .html, got {out}")
    if out is not None and out.suffix == ".html" and data is None:
        raise ValueError("out: a page shows pictures; give the survey with --data")


def _is_index(path: Path) -> bool:
    """Whether a folder is an index, and no embeddings in parts."""
    from armillary.engine.data.format.embedding_files import FILL, RECORD

    return path.is_dir() and not (path / RECORD).is_file() and not (path / FILL).is_dir()


def _build(path: Path, kind: Literal["exact", "ivfpq", "auto"], folder: Path | None) -> Index:
    from armillary.engine.evaluate.search.index import Index

    if folder is None:
        return Index.read_files([path], kind=kind)
    kept = folder.with_name(f".{folder.name}.vectors.npy")
    with exclusive_file(folder):
        try:
            built = Index.read_files([path], kind=kind, keep=kept)
            built.save(folder)
        finally:
            kept.unlink(missing_ok=True)
    print(f"{folder}: index of {len(built):,} vectors, {built.plan.kind}")
    return Index.load(folder)
