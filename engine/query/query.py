"""Ask a trained method: any of its quantities, given any mix of what it knows, for every row of a table or a survey.

    from armillary.engine.query.query import query

    done = query("runs/mosaic", "catalogue.parquet", "answers.parquet", given=["photometry", "redshift"], want=["sed", "stellar_mass"])
    print(done.answered, "of", done.rows)

Answers are joint: draw s of one quantity belongs to draw s of the others. Everything is checked before work starts, rows
are read, answered and written a batch at a time, and the file appears when it is whole.

Shape legend: B rows of a batch, S draws, n components of a quantity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from armillary.engine.atomic_file import atomic_path, require_writable
from armillary.engine.data.sources.tables.catalogue import Catalogue
from armillary.engine.evaluate.posterior.qp_files import DensityRows
from armillary.engine.exclusive import exclusive_file
from armillary.engine.query.answers_file import QUANTILES, AnswersFile
from armillary.engine.query.column_map import some
from armillary.engine.query.inputs import Inputs, Part, SurveyInputs, TableInputs, check_parts, known, part_of
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.kernels.pixels.philox import check_seed
from armillary.models.method import Batch, Method
from armillary.models.quantities import Answer, Distribution, Quantity, Questions

__all__ = ["Queried", "describe_questions", "open_questions", "query"]

MOST_NUMBERS = 1 << 24
"""Draws of one quantity that are held at a time; rows of a batch are fewer where this needs it."""


@dataclass(frozen=True)
class Queried:
    """What became of a query.

    Attributes:
        path: The file of answers.
        rows: Rows of the table.
        answered: Rows with an answer; of the others nothing was known of what was given, and their answers are NaN.
        refused: By quantity, values that its scaling has no entry for, such as the logarithm of a negative flux; they count as
            unknown.
        notes: Which columns were taken for what.
    """

    path: Path
    rows: int
    answered: int
    refused: dict[str, int]
    notes: tuple[str, ...]


def open_questions(run: TrainedEncoder) -> Questions:
    """What a trained method can be asked.

    Raises:
        ValueError: It answers no questions.
    """
    asked = run.method.questions()
    if asked is None:
        raise ValueError(f"run: {run.run.name} is a {type(run.method).__name__}, which answers no questions")
    return asked


def describe_questions(asked: Questions) -> list[str]:
    """Lines that say what can be given and asked for."""
    lines = ["given: " + ", ".join(asked.given), "want:"]
    for q in asked.want:
        lines.append(
            "  " + q.name + (f" [{q.unit}]" if q.unit else "") + (f": {some(q.components)}" if q.size > 1 else "")
        )
    return lines


@torch.no_grad()
def query(
    run: Path | str | TrainedEncoder,
    table: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    given: Sequence[str],
    want: Sequence[str],
    draws: int = 200,
    keep_draws: bool = False,
    qp: Path | str | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    units: Mapping[str, str] | None = None,
    missing: Sequence[float] | None = None,
    keys: Sequence[str] = (),
    hdu: int | str | None = None,
    splits: Sequence[str] = (),
    seed: int = 0,
    batch: int = 256,
    device: torch.device | str = "cpu",
) -> Queried:
    """Answer a question for every row and write the answers as Parquet (see `answers_file`).

    Args:
        run: A run's folder, or an exported file.
        table: A table (Parquet, CSV, ECSV, VOTable, FITS, HDF5), several with the same columns, or a survey's folder.
        out: File to write, ending in .parquet.
        given: What is known: "image", "spectrum" (of a survey), quantities; some components of one as NAME[FIRST:END], where
            the method takes that.
        want: Quantities.
        draws: Draws S that quantiles are taken from.
        keep_draws: Write the draws as well.
        qp: Folder for the distributions of wanted scalars, NAME.hdf5 each, that the qp library reads: a row for each row with
            an answer, with its number and identifiers.
        columns: Columns of a table by name of a quantity, where they are called otherwise; of its errors under NAME_err, of
            its axis under NAME_axis.
        units: Units by column, where the file has none or a wrong one.
        missing: Numbers that mean "no value" in columns of a table; by default 99, -99, -999, -9999 where they lie far off
            the other values of a column (`armillary.engine.data.sources.sentinels`).
        keys: Columns of a table that are written beside the answers; by default the one of a usual name.
        hdu: Table of a FITS file, group of an HDF5 file.
        splits: Splits of a survey; all by default.
        seed: Keys the draws, with the number of the row.
        batch: Rows at a time, at most.
        device: Where to run.

    Raises:
        FileNotFoundError: There is no such run or table.
        ValueError: The method answers no questions, a name is not known to it, the table lacks what is given or holds it in
            another form, or nothing is known in any row.
    """
    out, device = Path(out), torch.device(device)
    source = run if isinstance(run, TrainedEncoder) else TrainedEncoder.open(run)
    asked = open_questions(source)
    given = _checked("given", given, asked.given)
    check_parts(given, source.inputs.quantities)
    answers = {q.name: q for q in asked.want}
    wanted = [answers[name] for name in _checked("want", want, tuple(answers))]
    _check_numbers(out, draws, batch, seed)
    paths = [Path(table)] if isinstance(table, str | Path) else [Path(p) for p in table]
    if out.resolve() in [p.resolve() for p in paths]:
        raise ValueError(f"out: {out} is the table itself; give another name")
    require_writable(out)
    if len(paths) == 1 and (paths[0] / "survey.json").is_file():
        for field, value in (("column", columns), ("unit", units), ("missing", missing), ("key", keys), ("hdu", hdu)):
            if value:
                raise ValueError(f"{field}: is for tables, but {paths[0]} is a survey")
        inputs: Inputs = SurveyInputs(paths[0], source, given, splits, device)
    elif splits:
        raise ValueError(f"split: is for surveys, but {paths[0]} is not one")
    else:
        inputs = TableInputs(
            Catalogue(paths[0] if len(paths) == 1 else paths, hdu),
            source.inputs.quantities,
            given,
            columns=columns or {},
            units=units or {},
            missing=missing,
            keys=keys,
            floors=_error_floors(source),
            device=device,
        )
    quantities = source.inputs.quantities
    if absent := inputs.absent():
        raise ValueError(
            f"given: nothing is known of {' and '.join(absent)} in any row of {some([str(p) for p in paths], 3)}; "
            "leave it out, or name other columns"
        )
    densities = {q.name: DensityRows(q) for q in wanted if q.size == 1 and qp is not None}
    if qp is not None and not densities:
        raise ValueError(f"qp: holds distributions of numbers, but {', '.join(q.name for q in wanted)} are vectors")
    answered_rows: list[dict[str, np.ndarray]] = []
    method = source.method.to(device)
    rows = max(1, min(batch, MOST_NUMBERS // (draws * max(q.size for q in wanted))))
    about = {
        "run": source.run.name,
        "given": list(given),
        "draws": draws,
        "seed": seed,
        "table": [str(p) for p in paths],
    }
    total = answered = 0
    with (
        exclusive_file(out),
        atomic_path(out) as temporary,
        AnswersFile(temporary, inputs.identifiers, given, wanted, draws * keep_draws, about) as file,
    ):
        for part in inputs.parts(rows):
            there = {name: known(part.batch, name, quantities).cpu().numpy() for name in given}
            any_known = np.logical_or.reduce(list(there.values()))
            answer = _answer(method, part, given, wanted, draws, seed, any_known)
            quantiles = {n: {q.name: answer.quantile(q.name, p).numpy() for q in wanted} for n, p in QUANTILES.items()}
            median, drawn = ({n: x.numpy() for n, x in kind.items()} for kind in (answer.median, answer.draws))
            file.write(part.identifiers, there, median, quantiles, drawn)
            if densities and any_known.any():
                for name, held in densities.items():
                    held.add(_density(method, answer, name))
                named = {n: np.array(x.to_pylist())[any_known] for n, x in part.identifiers.items()}
                answered_rows.append(named)
            total += len(part.batch["row"])
            answered += int(any_known.sum())
        refused = {name: count for name, count in inputs.refused.items() if count}
        for name, held in densities.items():
            held.write(Path(qp or "") / f"{name}.hdf5", _stacked(answered_rows))
        file.finish({"rows": total, "answered": answered, "refused": refused})
    return Queried(out, total, answered, refused, tuple(inputs.notes))


def _error_floors(source: TrainedEncoder) -> dict[str, float]:
    """Of the quantities that were trained with errors, the fraction of the value that was added to them."""
    views = getattr(source.run.views, "quantities", ())
    if not views:  # views of another kind, which may have had errors
        return dict.fromkeys((q.name for q in source.inputs.quantities), 0.0)
    return {view.name: view.error_floor for view in views if view.errors}


def _checked(field: str, names: Sequence[str], have: Sequence[str]) -> tuple[str, ...]:
    """Names as the method has them; a dot stands for a line, so that `photometry.lsst` is `photometry_lsst`."""
    rule = "can be given" if field == "given" else "was trained to be answered"
    if not names:
        raise ValueError(f"{field}: name one or more of {some(have, 40)}")
    found = []
    for text in names:
        name, _ = part_of(text) if field == "given" else (text, None)
        own = next((h for h in (name, name.replace(".", "_")) if h in have), None)
        if own is None:
            raise ValueError(f"{field}: {name!r} is nothing that {rule}; there are {some(have, 40)}")
        found.append(own + text.removeprefix(name))
    if len(set(found)) < len(found):
        raise ValueError(f"{field}: {', '.join(names)} names one of them twice")
    return tuple(found)


def _check_numbers(out: Path, draws: int, batch: int, seed: int) -> None:
    if out.suffix != ".parquet":
        raise ValueError(f"out: must end in .parquet, got {out}")
    for field, value in (("draws", draws), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{field}: must be positive, got {value}")
    check_seed(seed)


def _answer(
    method: Method,
    part: Part,
    given: tuple[str, ...],
    wanted: Sequence[Quantity],
    draws: int,
    seed: int,
    chosen: np.ndarray,
) -> Answer:
    """The method's answer for the rows of which something is known, NaN for the others; checked."""
    count = len(chosen)
    found = {q.name: torch.full((count, draws, q.size), torch.nan) for q in wanted}
    median = {q.name: torch.full((count, q.size), torch.nan) for q in wanted}
    if chosen.any():
        at = torch.from_numpy(chosen)
        some_rows = {n: x[at.to(x.device)] for n, x in part.batch.items() if isinstance(x, Tensor) and len(x) == count}
        batch = Batch(**some_rows) if not chosen.all() else part.batch  # type: ignore[typeddict-item]
        answer = method.answer(batch, given, tuple(q.name for q in wanted), draws, seed)
        for q in wanted:
            drawn, middle = answer.draws[q.name].float().cpu(), answer.median[q.name].float().cpu()
            if drawn.shape != (int(at.sum()), draws, q.size) or middle.shape != (int(at.sum()), q.size):
                raise ValueError(
                    f"{type(method).__name__}.answer: {q.name!r} must be [B, {draws}, {q.size}] draws and [B, {q.size}] medians, "
                    f"got {tuple(drawn.shape)} and {tuple(middle.shape)}"
                )
            if not bool(drawn.isfinite().all()) or not bool(middle.isfinite().all()):
                raise ValueError(
                    f"{type(method).__name__}.answer: {q.name!r} is not finite for all rows with known inputs"
                )
            found[q.name][at], median[q.name][at] = drawn, middle
        return Answer(found, median, answer.densities)
    return Answer(found, median)


def _density(method: Method, answer: Answer, name: str) -> Distribution:
    if name not in answer.densities:
        raise ValueError(f"qp: {type(method).__name__} says no distribution of {name} but draws; leave it out")
    return answer.densities[name]


def _stacked(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
