"""Commands of `armillary data`. Each returns its exit status; bad input raises.

The top-level command (`armillary.engine.cli`) mounts these functions with tyro and turns the errors that they raise
(ValueError, OSError, RuntimeError) into a message and exit status 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["build", "graph", "kinds"]


def build(
    source: tyro.conf.Positional[Path],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    *,
    kind: str = "auto",
    name: str | None = None,
    labels: Path | None = None,
    size: int | None = None,
    rows: tuple[int, int] | None = None,
    bands: tuple[str, ...] | None = None,
    pixel_scale_arcsec: float | None = None,
    zero_is_missing: bool | None = None,
    option: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = (),
    cut: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = (),
    drop_duplicates_arcsec: float | None = None,
    codec: Literal["bitplane", "float16"] = "bitplane",
    step_fraction: float | None = None,
    sky_sigma: tuple[float, ...] | None = None,
    samples_per_shard: int = 2048,
    split: str = "auto",
    test_fraction: float | None = None,
    validation_fraction: float | None = None,
    seed: int = 0,
    processes: int = 2,
    dask: str | None = None,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = True,
) -> int:
    """Pack files of one kind into a survey folder; `armillary data kinds` lists the kinds.

    An interrupted build continues when the same command is run again. Surveys of several sources (images with spectra
    and catalogues) are described by a recipe in Python, see docs/data.md.

    Args:
        source: File or folder; of the Hugging Face hub hf://datasets/OWNER/REPO, or a file or folder of it, which is fetched first.
        out: Folder of the survey; made if need be.
        kind: What the source is; by default seen from its file names. module:class, or file.py:class, for a reader of your own.
        name: Survey name; by default that of the folder.
        labels: CSV of labels; by default labels.csv in the folder or beside the archive.
        size: Cut the central SIZE x SIZE pixels out of every image.
        rows: First row and last row + 1, over all HDF5 files.
        bands: Band names, where the files have none.
        pixel_scale_arcsec: Arcseconds a pixel, where the files do not say.
        zero_is_missing: Pixels of exactly 0 carry no data (FITS, Stein et al.; so by default).
        option: Further option of the kind's reader, NAME=VALUE; may be repeated.
        cut: Condition that rows must satisfy, such as 'z < 0.6' or 'mag(flux_z) <= 20'; may be repeated.
        drop_duplicates_arcsec: Of rows closer than this only the first is kept.
        codec: bitplane (quantised) or float16.
        step_fraction: Quantisation step in units of the sky noise; 1/8 by default, one count for 8-bit pictures.
        sky_sigma: Sky noise of each band, where it should not be measured.
        samples_per_shard: Samples of a tar.
        split: key, random:SEED, sky or healpix[:NSIDE] (a share of keys, of samples, or of cells of the sky is the test
            split), auto (sky for samples that have a position, key for the others), source (the column split of the
            labels), or COLUMN:LOW:HIGH (that range is the test split, such as ra:120:150). By position, samples of train
            whose cutouts overlap one of the test split are the split border, which nothing is trained on.
        test_fraction: Share of the test split, where it is one; 0.1 by default.
        validation_fraction: Share of the split `validation`, likewise; none by default.
        seed: Keys the shuffle.
        processes: Worker processes.
        dask: Address of a Dask scheduler, such as tcp://10.0.0.1:8786, whose workers do the work instead.
        on_bad: Stop at an unusable file or sample, or skip and count it.
        progress: Show progress bars.
    """
    from rich.console import Console

    from armillary.engine.data.building.build import build as build_survey
    from armillary.engine.data.building.splits import parse_split
    from armillary.engine.data.format.summary import summary
    from armillary.engine.data.sources.kinds import open_source
    from armillary.engine.data.sources.options import parse_options
    from armillary.engine.data.sources.selected import Selected
    from armillary.engine.hub_files import fetch_dataset

    given = {
        "labels": labels,
        "size": size,
        "rows": rows,
        "bands": bands,
        "pixel_scale_arcsec": pixel_scale_arcsec,
        "zero_is_missing": zero_is_missing,
    }
    options = {name: value for name, value in given.items() if value is not None} | parse_options(sum(option, ()))
    cuts = sum(cut, ())
    opened = open_source(fetch_dataset(source), kind, on_bad=on_bad, **options)
    if cuts or drop_duplicates_arcsec is not None:
        opened = Selected(opened, cuts, drop_duplicates_arcsec=drop_duplicates_arcsec)
    survey = build_survey(
        opened,
        out,
        name=name or out.resolve().name,
        codec=codec,
        step_fraction=step_fraction,
        sky_sigma=sky_sigma,
        samples_per_shard=samples_per_shard,
        split=parse_split(split, test_fraction, validation_fraction),
        seed=seed,
        processes=processes,
        dask=dask,
        progress=progress,
        on_bad=on_bad,
    )
    Console().print(summary(survey))
    return 0


def kinds() -> int:
    """List the kinds of files that can be read."""
    from rich.console import Console
    from rich.table import Table

    from armillary.engine.data.sources.kinds import KINDS

    table = Table("kind", "what", "recognised by")
    for name, kind in KINDS.items():
        inside = f"HDF5 with {', '.join(kind.holds)}" if kind.holds else ""
        table.add_row(name, kind.what, " ".join(kind.names) or inside)
    Console().print(table)
    return 0


def graph(
    survey: tyro.conf.Positional[Path],
    *,
    space: Literal["euclidean", "spherical", "hyperbolic", "comoving"] = "spherical",
    mode: Literal["published", "leak-free", "inductive"] = "published",
    k: int = 5,
    linking_length_mpc: float | None = None,
    redshift: str | None = None,
    buffer_arcmin: float = 0.0,
    symmetrise: bool = True,
    shuffle_seed: int | None = None,
    threads: int = 2,
) -> int:
    """Find neighbours on the sky and write them beside the survey, as SURVEY/graph-NAME.safetensors.

    Args:
        survey: Folder of the survey; every row must have a position.
        space: Whose distance is compared: euclidean is the plane of RA and Dec, spherical great circles, hyperbolic the
            Poincare ball over that plane. comoving links all rows within a length in three dimensions, and tells redshifts.
        mode: published is one graph over all rows; in leak-free only rows of the split train may be seen; in inductive
            rows see rows of their own split.
        k: Neighbours of a row, itself not counted; not for comoving.
        linking_length_mpc: Greatest comoving distance of neighbours.
        redshift: Label with redshifts, for comoving.
        buffer_arcmin: Not with published: leave out rows of train this near to a row of another split.
        symmetrise: Add the way back of every edge whose row may be seen.
        shuffle_seed: Shuffle the neighbours within each split by this seed: the control of the graph without it.
        threads: Threads of the search.
    """
    import time

    from rich.console import Console
    from rich.table import Table

    from armillary.engine.data.building.sky_graph import build_graph
    from armillary.engine.data.sky_graph.graph import GraphOptions

    if threads < 1:
        raise ValueError(f"threads: must be at least 1, got {threads}")
    options = GraphOptions(
        space=space,
        mode=mode,
        k=k,
        linking_length_mpc=linking_length_mpc,
        redshift=redshift,
        buffer_arcmin=buffer_arcmin,
        symmetrise=symmetrise,
        shuffle_seed=shuffle_seed,
    )
    start = time.perf_counter()
    made, path = build_graph(survey, options, threads=threads)
    table = Table("nodes", "edges", "edges a node", "isolated nodes", "left out", "seconds")
    numbers = (made.nodes, made.edges, made.edges / made.nodes, made.isolated, int(made.left_out.sum()))
    table.add_row(
        *(f"{n:.2f}" if isinstance(n, float) else f"{n:,}" for n in numbers), f"{time.perf_counter() - start:.1f}"
    )
    console = Console()
    console.print(table)
    if redshift is not None:
        console.print(f"The edges tell {redshift!r}: do not judge predictions of it by a model that sees this graph.")
    console.print(f"wrote {path}")
    return 0
