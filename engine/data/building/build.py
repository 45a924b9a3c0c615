"""Building a packed survey from a source: plan, measure the sky, pack shard by shard, write catalogue and description.

The bytes of shards, indices and catalogue depend on the source and the options only, not on the number of processes or
on how often the build was interrupted. Until it is complete, the folder holds no survey.json but `.build/` with the
build's plan and a record of each finished shard; the same call continues from there.
"""

from __future__ import annotations

import datetime
import errno
import logging
import math
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import armillary
from armillary.engine.atomic_file import atomic_open
from armillary.engine.choices import check_choice
from armillary.engine.data.building.build_state import (
    Journal,
    clear_leftovers,
    finished,
    identify,
    load_journal,
    locked,
)
from armillary.engine.data.building.cluster import Cluster
from armillary.engine.data.building.held_out import tell_border, tell_test_share, training_splits
from armillary.engine.data.building.measure import SurveyMoments
from armillary.engine.data.building.packing import (
    BUILD_FOLDER,
    Packed,
    PackTask,
    catalog_schema,
    pack,
)
from armillary.engine.data.building.settings import measure_settings
from armillary.engine.data.building.shard_assignment import ShardAssignment, lay_out
from armillary.engine.data.building.splits import ByKey, SplitRule
from armillary.engine.data.building.workers import Workers
from armillary.engine.data.format.survey import CATALOG_COLUMNS, Survey
from armillary.engine.data.sources.source import (
    BadSample,
    Source,
    bad_files,
    spectrum_of,
    vectors_of,
)
from armillary.models.file_hash import sha256_of

__all__ = ["build"]

CATALOG_GROUP = 65536  # rows of a Parquet row group
EXAMPLES = 20  # skipped samples named in the provenance
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

LABELS_ONLY = (
    "the source has labels only, neither images nor spectra nor vectors, so there is nothing to pack. Columns of a table "
    "that a model is to read are named as a vector: --option \"vectors={'photometry': ('mag_g', 'mag_r', 'mag_z')}\"; a "
    "table that is to be matched to images or spectra is read by a survey recipe (docs/data.md)"
)

Codec = Literal["bitplane", "float16"]
OnBad = Literal["error", "skip"]

log = logging.getLogger("armillary.data")


def build(
    source: Source,
    folder: Path | str,
    *,
    name: str,
    codec: Codec = "bitplane",
    step_fraction: float | None = None,
    sky_sigma: Sequence[float] | None = None,
    samples_per_shard: int = 2048,
    test_fraction: float | None = None,
    split: SplitRule | None = None,
    seed: int = 0,
    processes: int = 1,
    dask: str | None = None,
    progress: bool = True,
    on_bad: OnBad = "error",
) -> Survey:
    """Pack a source into a survey folder, or continue an interrupted build of it.

    Statistics are those of the split "train"; where there is none, of all splits whose names do not say that they are held
    out (`HELD_OUT`), and of all samples where there is only such. A finished survey of the
    same source and options is returned as it is.

    Args:
        source: The samples.
        folder: The survey's folder; made if need be.
        name: Survey name.
        codec: "bitplane" (quantised, about 5 times smaller than float32) or "float16".
        step_fraction: Quantisation step as a fraction of the sky noise. By default 1/8, or the source's own lossless
            step (one count for 8-bit pictures).
        sky_sigma: Sky noise per band in the flux unit; by default that of the survey or export that the source is, else
            measured (median over 256 samples of `measure.robust_sigma`, and at least 1 for the unit "count").
        samples_per_shard: Samples of a full shard.
        test_fraction: Share of the test split, 0.1 by default, chosen by a hash of the key.
        split: Another rule; excludes `test_fraction`.
        seed: Keys the global shuffle.
        processes: Worker processes; they are spawned, so a script needs `if __name__ == "__main__":` for more than 1.
        dask: Address of a Dask scheduler whose workers do the work instead; see `cluster`.
        progress: Show a progress bar.
        on_bad: What to do with unusable samples (unreadable, of another size, non-finite pixels that are not masked,
            no valid pixel): stop with an error, or leave them out, log and count them.

    Returns:
        The survey, as written to survey.json.

    Raises:
        BadSample: A sample is unusable and `on_bad` is "error".
        FileExistsError: The folder holds something else.
        OSError: The folder cannot be written; what is finished is kept.
        RuntimeError: A worker process died, another build is running in the folder, or the script that was started has
            no `if __name__ == "__main__":` around its call with several processes.
        ValueError: An option is wrong, the source is empty, or keys repeat.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard: must be at least 1, got {samples_per_shard}")
    if not name.isprintable():
        raise ValueError(f"name: must be one line of text, got {name!r}")
    check_choice("codec", codec, Codec)
    check_choice("on_bad", on_bad, OnBad)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: must be in 0 .. 2^64 - 1, got {seed}")
    if step_fraction is not None and not (codec == "bitplane" and 0 < step_fraction < math.inf):
        raise ValueError(f"step_fraction: must be positive, and has no effect with float16; got {step_fraction}")
    if split is not None and test_fraction is not None:
        raise ValueError("test_fraction: has no effect beside a split rule; leave it out or put it in the rule")
    if sky_sigma is not None and (len(sky_sigma) != len(source.bands) or not all(0 < s < math.inf for s in sky_sigma)):
        raise ValueError(f"sky_sigma: must be {len(source.bands)} positive numbers, got {tuple(sky_sigma)}")
    if not (source.bands or spectrum_of(source) is not None or vectors_of(source)):
        raise ValueError(LABELS_ONLY)
    rule = split or ByKey(0.1 if test_fraction is None else test_fraction)
    options: dict[str, Any] = {"name": name, "codec": codec, "step_fraction": step_fraction, "split": repr(rule)}
    options |= {"sky_sigma": sky_sigma, "samples_per_shard": samples_per_shard, "seed": seed}
    out = Path(folder)
    pool = Workers(source, processes, out / BUILD_FOLDER) if dask is None else Cluster(source, dask)
    with locked(out):
        with pool as workers, _bar(progress) as bar:
            try:
                survey = _build(source, out, workers, bar, options, rule, on_bad)
            except BadSample as error:
                raise BadSample(
                    f"{error}. Repair or remove it, or continue without unusable samples: on_bad='skip' (--on-bad skip)"
                ) from error
            except OSError as error:
                ours = error.filename is not None and Path(error.filename).is_relative_to(out)
                if error.errno in NO_ROOM or (error.errno is not None and ours):
                    raise OSError(
                        error.errno,
                        f"{error.strerror}; make room and run the same build again: finished shards are kept",
                        error.filename or str(out),
                    ) from error
                raise
        shutil.rmtree(out / BUILD_FOLDER)  # last: workers that start late read their source from it
    return survey


def _build(
    source: Source,
    folder: Path,
    workers: Workers | Cluster,
    bar: Progress,
    options: dict[str, Any],
    rule: SplitRule,
    on_bad: OnBad,
) -> Survey:
    planning = bar.add_task("plan", total=None)
    layout = lay_out(
        source,
        workers,
        rule,
        seed=options["seed"],
        samples_per_shard=options["samples_per_shard"],
        on_bad=on_bad,
    )
    _tell_skipped([*bad_files(source), *layout.bad.values()])
    tell_test_share(layout, rule)
    tell_border(layout)
    identity = identify(source, options, layout)
    if there := finished(folder, identity):
        return there
    journal = load_journal(folder, identity)
    bar.update(planning, total=1, completed=1)
    if journal is None:
        sky = bar.add_task("measure the sky", total=None)
        command, now = shlex.join(sys.argv), datetime.datetime.now(datetime.UTC)
        journal = Journal(
            identity,
            measure_settings(source, workers, layout, options, on_bad),
            now.isoformat(timespec="seconds"),
            command,
        )
        journal.save(folder)
        bar.update(sky, total=1, completed=1)
    done = {plan.name: packed for plan in layout.shards if (packed := Packed.load(folder, plan.name))}
    packing = bar.add_task("pack", total=sum(plan.rows.size for plan in layout.shards))
    missing = [plan for plan in layout.shards if plan.name not in done]
    bar.update(packing, completed=sum(plan.rows.size for plan in layout.shards if plan.name in done))
    if done:
        log.info("%s: continuing, %d of %d shards are finished", folder, len(done), len(layout.shards))
    tasks = (PackTask(folder, plan, journal.settings, on_bad) for plan in missing)
    for plan, packed in zip(missing, workers.map(pack, tasks), strict=True):
        done[plan.name] = packed
        _tell_skipped(packed.skipped)
        bar.update(packing, advance=plan.rows.size)
    clear_leftovers(folder)  # of workers that died
    return _finish(source, folder, layout, journal, [done[plan.name] for plan in layout.shards])


def _tell_skipped(reasons: Sequence[str]) -> None:
    """Log what is left out; all is counted in the provenance."""
    for reason in reasons[:EXAMPLES]:
        log.warning("skipped: %s", reason)
    if len(reasons) > EXAMPLES:
        log.warning("skipped: %d more", len(reasons) - EXAMPLES)


def _finish(source: Source, folder: Path, layout: ShardAssignment, journal: Journal, packed: list[Packed]) -> Survey:
    """Write catalog.parquet, then survey.json."""
    settings = journal.settings
    kept = [p for p in packed if p.record.count]
    skipped = [*bad_files(source), *layout.bad.values(), *(reason for p in packed for reason in p.skipped)]
    if not kept:
        raise ValueError(f"the survey is empty: all {len(skipped)} samples are unusable, first: {skipped[0]}")
    moments = SurveyMoments(settings.sky_sigma, tuple(vector.size for vector in settings.vectors))
    splits = training_splits(p.record.split for p in kept)
    for p in (p for p in kept if p.record.split in splits):
        moments.merge(SurveyMoments.from_json(p.moments, settings.sky_sigma))
    _write_catalog(folder, [p.record.name for p in kept], settings.label_types)
    versions = {"armillary": armillary.__version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in ("numpy", "pyarrow")}
    survey = Survey(
        name=journal.identity["name"],
        bands=tuple(source.bands),
        height=settings.shape[1],
        width=settings.shape[2],
        pixel_scale_arcsec=source.pixel_scale_arcsec,
        unit=source.unit,
        codec=settings.codec,
        sky_sigma=settings.sky_sigma,
        step=settings.step,
        shards=tuple(p.record for p in kept),
        statistics=moments.statistics([vector.name for vector in settings.vectors]),
        labels=dict(source.labels),
        provenance={
            "build": journal.identity,
            "command": journal.command,
            "date": journal.started,
            "versions": versions,
            "skipped": {"count": len(skipped), "examples": skipped[:EXAMPLES]},
        },
        spectrum=None if (spectrum := spectrum_of(source)) is None else replace(spectrum, codec=settings.codec),
        vectors=settings.vectors,
        catalog_sha256=sha256_of(folder / "catalog.parquet"),
    )
    survey.save(folder)
    return survey


def _write_catalog(folder: Path, names: list[str], label_types: dict[str, str]) -> None:
    """Join the shards' records into catalog.parquet, a few at a time."""
    schema = catalog_schema(label_types)
    path = folder / "catalog.parquet"
    place = list(CATALOG_COLUMNS).index("shard")
    try:
        with atomic_open(path) as f, pq.ParquetWriter(f, schema) as writer:
            waiting: list[pa.Table] = []
            for number, name in enumerate(names):
                table = pq.read_table(Packed.path(folder, name)).replace_schema_metadata(None)
                shard = pa.array(np.full(len(table), number, np.int32))
                waiting.append(table.set_column(place, schema.field(place), shard))
                if sum(map(len, waiting)) >= CATALOG_GROUP or number == len(names) - 1:
                    writer.write_table(pa.concat_tables(waiting).combine_chunks())
                    waiting = []
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), disable=not shown)
