"""Command `armillary query`: quantities of galaxies from a trained method, given any mix of others.

armillary query runs/mosaic                                                     # what can be given and asked for
armillary query runs/mosaic catalogue.fits --given photometry,redshift --want sed,stellar_mass -o answers.parquet
armillary query runs/mosaic lsst.csv --given photometry --want redshift --column photometry=mag_u,mag_g,mag_r,mag_i,mag_z,mag_y
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from armillary.engine.user_code import Packages, trust

__all__ = ["query"]

Pairs = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def query(
    run: tyro.conf.Positional[Path],
    table: tyro.conf.Positional[Path | None] = None,
    *,
    given: str = "",
    want: str = "",
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    draws: int = 200,
    keep_draws: bool = False,
    qp: Path | None = None,
    column: Pairs = (),
    unit: Pairs = (),
    missing: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = (),
    key: Pairs = (),
    hdu: str | None = None,
    split: Pairs = (),
    seed: int = 0,
    batch: int = 256,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    package: Packages = (),
) -> int:
    """Ask a trained method about every row of a table, and write the answers as Parquet.

    Of every wanted quantity the median and the 16 and 84 % quantiles are written; with --keep-draws also joint draws. Without
    a table, what can be given and asked for is listed.

    Args:
        run: Folder of the run, or a file exported from one.
        table: A table (Parquet, CSV, ECSV, VOTable, FITS, HDF5), a folder of tables, or a packed survey.
        given: What is known, separated by commas: quantities; of a survey also image and spectrum.
        want: What is asked for, separated by commas.
        out: File to write; by default the table's name with -answers.parquet, in the working folder.
        draws: Draws from the joint distribution that quantiles are taken from.
        keep_draws: Write the draws as well.
        qp: Folder for the distributions of wanted scalars, such as p(z), as HDF5 files that the qp library reads.
        column: NAME=COLUMN, or NAME=COLUMN,COLUMN,... for a vector: columns that are not called as the quantity; NAME_err=
            for its errors (by default COLUMN_err). Repeatable.
        unit: COLUMN=UNIT where the file states none or a wrong one, such as mag_g=mag(AB). Repeatable.
        missing: Number that means "no value" in the table, nan for none. Repeatable; by default 99, -99, -999, -9999 where they
            lie far off the other values of a column.
        key: Column of the table to write beside the answers, such as an identifier. Repeatable.
        hdu: Number or name of the table in a FITS file, path of the group in an HDF5 file.
        split: Split of a survey; all by default. Repeatable.
        seed: Of the draws.
        batch: Rows at a time.
        device: Where to run; auto takes a GPU where there is one.
        package: Name of a package, or path of its folder or of a recipe, with methods of your own; repeatable.
    """
    from armillary.engine.evaluate.cli import choose_device
    from armillary.engine.query import query as asking
    from armillary.engine.weights.trained_encoder import TrainedEncoder

    trust(*package)
    source = TrainedEncoder.open(run)
    if table is None:
        print("\n".join(asking.describe_questions(asking.open_questions(source))))
        return 0
    done = asking.query(
        source,
        table,
        out or Path(f"{table.name.split('.')[0]}-answers.parquet"),
        given=_names(given),
        want=_names(want),
        draws=draws,
        keep_draws=keep_draws,
        qp=qp,
        columns={name: _names(text) for name, text in _pairs("column", column).items()},
        units=_pairs("unit", unit),
        missing=missing or None,
        keys=key,
        hdu=int(hdu) if hdu is not None and hdu.isdigit() else hdu,
        splits=split,
        seed=seed,
        batch=batch,
        device=choose_device(device),
    )
    for note in done.notes:
        print(note)
    for name, count in done.refused.items():
        print(f"{name}: {count:,} values are outside of what its scaling takes (not positive): unknown")
    if done.answered < done.rows:
        print(f"{done.rows - done.answered:,} rows have nothing known of what is given: their answers are NaN")
    print(f"{done.path}: answers for {done.answered:,} of {done.rows:,} rows")
    if qp is not None:
        print(f"{qp}: distributions, for qp.read")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _pairs(option: str, values: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            raise ValueError(f"{option}: must be NAME=..., got {value!r}")
        if name in found:
            raise ValueError(f"{option}: {name} is given twice")
        found[name] = text
    return found
