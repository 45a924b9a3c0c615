"""Commands of `armillary data` that look at a survey; see `armillary.engine.data.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["check", "export", "leaks", "show", "stats"]


def check(
    survey: tyro.conf.Positional[Path],
    *,
    blobs: int | None = None,
    checksums: bool = True,
    threads: int = 2,
    progress: bool = True,
) -> int:
    """Verify a survey: files, checksums, indices, catalogue and blobs. The exit status is 1 if anything is wrong.

    Args:
        survey: Folder of the survey.
        blobs: Blobs to decode in each shard; all by default.
        checksums: Compare the SHA-256 of every shard.
        threads: Shards checked at a time.
        progress: Show a progress bar.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from armillary.engine.data.format.summary import summary
    from armillary.engine.data.format.survey import Survey
    from armillary.engine.data.inspect.check import check_survey

    if threads < 1 or (blobs is not None and blobs < 0):
        raise ValueError(f"threads, blobs: must be at least 1 and 0, got {threads} and {blobs}")
    with Progress(disable=not progress) as bar:
        task = bar.add_task("check", total=None)
        problems = check_survey(
            survey,
            blobs=blobs,
            checksums=checksums,
            threads=threads,
            progress=lambda samples: bar.update(task, advance=samples),
        )
        bar.update(task, total=1, completed=1)
    console = Console()
    if problems:
        table = Table("file", "key", "problem", "cure", title=f"{survey}: {len(problems)} problems", show_lines=True)
        for problem in problems:
            table.add_row(problem.file, problem.key, problem.what, problem.cure)
        console.print(table)
        return 1
    console.print(summary(Survey.load(survey)))
    console.print(f"{survey}: sound")
    return 0


def leaks(
    survey: tyro.conf.Positional[Path],
    *,
    radius_arcsec: float | None = None,
    identifiers: tuple[str, ...] = (),
) -> int:
    """Look for objects that are in two splits, or have a near neighbour in another. The exit status is 1 if there are any.

    Args:
        survey: Folder of the survey.
        radius_arcsec: Samples closer than this are named; by default those within 2 arcsec, which are taken for one object, and
            those whose cutouts may overlap (within the cutout's diagonal).
        identifiers: Labels whose values name objects.
    """
    from armillary.engine.data.inspect.leakage import find_leaks

    found = find_leaks(survey, radius_arcsec=radius_arcsec, identifiers=identifiers)
    for leak in found:
        print(leak)
    if not found:
        within = "2 arcsec, nor within the size of a cutout" if radius_arcsec is None else f"{radius_arcsec:g} arcsec"
        print(f"{survey}: the splits share nothing within {within}")
    return 1 if found else 0


def show(
    survey: tyro.conf.Positional[Path],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("mosaic.png"),
    *,
    count: int = 25,
    split: str | None = None,
    seed: int = 0,
    labels: list[str] | None = None,
) -> int:
    """Draw a mosaic of random samples and print what the survey holds.

    Args:
        survey: Folder of the survey.
        out: The PNG to write.
        count: Samples in the mosaic.
        split: Only of this split.
        seed: Chooses the samples.
        labels: Labels in the captions; the first three by default.
    """
    from rich.console import Console

    from armillary.engine.data.format.summary import summary
    from armillary.engine.data.format.survey import Survey
    from armillary.engine.data.inspect.show import draw_mosaic

    if seed < 0:
        raise ValueError(f"seed: must be at least 0, got {seed}")
    description = Survey.load(survey)
    draw_mosaic(survey, out, count=count, split=split, seed=seed, labels=labels)
    console = Console()
    console.print(summary(description))
    console.print(f"wrote {out}")
    return 0


def stats(
    survey: tyro.conf.Positional[Path],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("stats.png"),
    *,
    labels: tuple[str, ...] | None = None,
    split: str | None = None,
) -> int:
    """Print what the labels hold, and draw histograms, redshift distribution and sky coverage.

    Args:
        survey: Folder of the survey.
        out: The picture to write: .png, .pdf or .svg.
        labels: Labels to draw; by default the first twelve that vary.
        split: Only of this split.
    """
    from rich.console import Console
    from rich.table import Table

    from armillary.engine.data.format.summary import summary
    from armillary.engine.data.format.survey import Survey
    from armillary.engine.data.inspect.stats import draw_statistics, summarise_labels

    console = Console()
    console.print(summary(Survey.load(survey)))
    table = Table("label", "known", "0 %", "5 %", "50 %", "95 %", "100 %", "meaning")
    held = summarise_labels(survey, split)
    for label in held:
        table.add_row(
            label.name, f"{label.known:,}", *([f"{p:.4g}" for p in label.percentiles] or [""] * 5), label.meaning
        )
    console.print(table)
    for label in held:
        if label.most:
            console.print(
                f"{label.name}: " + ", ".join(f"{text} {count:,}" for text, count in label.most), markup=False
            )
    draw_statistics(survey, out, labels=labels, split=split)
    console.print(f"wrote {out}")
    return 0


def export(
    survey: tyro.conf.Positional[Path],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    *,
    format: Literal["fits", "hdf5", "parquet"],
    split: str | None = None,
    progress: bool = True,
) -> int:
    """Write a survey's samples as FITS files, one HDF5 file or one Parquet file.

    Args:
        survey: Folder of the survey.
        out: The file to write, a folder for FITS; must not exist.
        format: fits (with labels.csv), hdf5 or parquet.
        split: Only of this split.
        progress: Show a progress bar.
    """
    from rich.progress import Progress

    from armillary.engine.data.format.survey import Survey
    from armillary.engine.data.inspect.export import unpack

    total = Survey.load(survey).count(split)
    with Progress(disable=not progress) as bar:
        task = bar.add_task("export", total=total)
        written = unpack(survey, out, format, split=split, progress=lambda n: bar.update(task, advance=n))
    print(f"wrote {written:,} samples to {out}")
    return 0
