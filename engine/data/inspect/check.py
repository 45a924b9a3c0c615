"""Verifying a packed survey: do survey.json, catalogue, shards, indices and blobs agree, and are they undamaged?"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from armillary.engine.data.building.packing import BUILD_FOLDER, catalog_schema
from armillary.engine.data.format import codec, spectra
from armillary.engine.data.format.catalog import catalog_problem
from armillary.engine.data.format.shards import Member, read_index, read_members
from armillary.engine.data.format.survey import MODALITIES, ShardRecord, Survey
from armillary.engine.data.format.vectors import decode_vectors
from armillary.models.file_hash import sha256_of

__all__ = ["Problem", "check_survey"]

REBUILD = "delete the survey's folder and build it again"
INDEX = "delete it and write it anew: armillary.engine.data.format.shards.write_index"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a survey.

    Attributes:
        file: File in the survey's folder.
        key: The sample concerned; empty where it is the whole file.
        what: What is wrong.
        cure: What to do.
    """

    file: str
    key: str
    what: str
    cure: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.file}{f', key {self.key}' if self.key else ''}: {self.what}; {self.cure}"


def check_survey(
    folder: Path | str,
    *,
    blobs: int | None = None,
    checksums: bool = True,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[Problem]:
    """Verify a survey.

    Args:
        folder: The survey's folder.
        blobs: Blobs of each shard to decode and compare with survey.json, spread evenly; all by default.
        checksums: Compare the SHA-256 of every shard, which reads all of it.
        threads: Shards checked at a time.
        progress: Called with the samples of each shard that is done.

    Returns:
        All problems found, in the order of files; empty for a sound survey.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (root / BUILD_FOLDER / "plan.json").exists() and not (root / "survey.json").exists():
        return [Problem(BUILD_FOLDER, "", "the build of this survey is not finished", "run the same build again")]
    try:
        survey = Survey.load(root)
    except (FileNotFoundError, ValueError) as error:
        return [Problem("survey.json", "", str(error), REBUILD)]
    catalog, problems = _check_catalog(root, survey)
    known = {s.name for s in survey.shards} | {s.name.removesuffix(".tar") + ".idx" for s in survey.shards}
    for path in sorted(root.glob("*.tar")) + sorted(root.glob("*.idx")):
        if path.name not in known:
            problems.append(
                Problem(path.name, "", "not part of the survey (survey.json does not list it)", "delete it")
            )

    def check(number: int) -> list[Problem]:
        found = _check_shard(root, survey, number, catalog, blobs, checksums)
        if progress is not None:
            progress(survey.shards[number].count)
        return found

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for found in pool.map(check, range(len(survey.shards))):
            problems += found
    return problems


def _check_catalog(root: Path, survey: Survey) -> tuple[pa.Table | None, list[Problem]]:
    """The catalogue, or None where it cannot be compared with shards; and its problems."""
    name = "catalog.parquet"
    try:
        catalog = pq.read_table(root / name)
    except FileNotFoundError:
        return None, [Problem(name, "", "missing", REBUILD)]
    except (OSError, pa.ArrowException) as error:
        return None, [Problem(name, "", f"not readable: {error}", REBUILD)]
    types = {f.name: "string" if pa.types.is_string(f.type) else "float64" for f in catalog.schema}
    expected = catalog_schema({label: types.get(label, "float64") for label in survey.labels})
    for field in expected:
        if field.name not in catalog.schema.names:
            return None, [Problem(name, "", f"column {field.name!r} is missing", REBUILD)]
        if catalog.schema.field(field.name).type != field.type:
            what = f"column {field.name!r} is {catalog.schema.field(field.name).type}, not {field.type}"
            return None, [Problem(name, "", what, REBUILD)]
    problems = [
        Problem(name, "", f"column {extra!r} is not among the labels of survey.json", REBUILD)
        for extra in catalog.schema.names
        if extra not in expected.names
    ]
    if len(catalog) != survey.count():
        what = f"{len(catalog)} rows, survey.json counts {survey.count()} samples"
        return None, [*problems, Problem(name, "", what, REBUILD)]
    counts = [s.count for s in survey.shards]
    shard = np.repeat(np.arange(len(counts)), counts)
    index = np.concatenate([np.arange(n) for n in counts]) if counts else np.zeros(0, int)
    wrong = (catalog["shard"].to_numpy() != shard) | (catalog["index"].to_numpy() != index)
    if wrong.any():
        key = catalog["key"][int(np.argmax(wrong))].as_py()
        return None, [*problems, Problem(name, key, "rows are not in the order of shards and places", REBUILD)]
    split = np.repeat([s.split for s in survey.shards], counts)
    other = catalog["split"].to_numpy(zero_copy_only=False) != split
    for row in np.flatnonzero(other)[:1].tolist():
        what = f"{other.sum()} rows are of another split than their shard"
        problems.append(Problem(name, catalog["key"][row].as_py(), what, REBUILD))
    repeated = catalog["key"].value_counts()
    for entry in repeated.filter(pc.greater(repeated.field("counts"), 1))[:1].to_pylist():
        problems.append(Problem(name, entry["values"], f"the key occurs {entry['counts']} times", REBUILD))
    if not problems and (changed := catalog_problem(survey)):
        problems.append(Problem(name, "", changed, "or restore the file"))
    return catalog, problems


def _check_shard(
    root: Path, survey: Survey, number: int, catalog: pa.Table | None, blobs: int | None, checksums: bool
) -> list[Problem]:
    shard = survey.shards[number]
    path = root / shard.name
    if not path.is_file():
        return [Problem(shard.name, "", "missing", f"copy it again, or {REBUILD}")]
    again = f"copy it again from its origin, or {REBUILD}"
    problems = []
    if path.stat().st_size != shard.bytes:
        problems.append(Problem(shard.name, "", f"{path.stat().st_size} bytes, survey.json says {shard.bytes}", again))
    elif checksums and (found := sha256_of(path)) != shard.sha256:
        problems.append(
            Problem(shard.name, "", f"SHA-256 is {found[:12]}..., survey.json says {shard.sha256[:12]}...", again)
        )
    members: list[Member] = []
    try:
        members.extend(read_members(path))
    except ValueError as error:
        problems.append(Problem(shard.name, "", str(error), again))
    else:
        if len(members) != shard.count:
            what = f"{len(members)} samples, survey.json says {shard.count}"
            problems.append(Problem(shard.name, "", what, again))
        problems += _check_index(path.with_suffix(".idx"), members)
        if catalog is not None and len(members) == shard.count:
            problems += _compare_rows(
                shard, members, catalog.slice(sum(s.count for s in survey.shards[:number]), shard.count)
            )
    return problems + _check_blobs(path, survey, members, blobs, again)


def _check_index(index: Path, members: list[Member]) -> list[Problem]:
    if not index.is_file():
        return [Problem(index.name, "", "missing", INDEX)]
    try:
        listed = read_index(index)
    except ValueError as error:
        return [Problem(index.name, "", str(error), INDEX)]
    for mine, theirs in zip(members, listed, strict=False):
        if mine != theirs:
            what = f"says {theirs.key} at byte {theirs.offset}, {theirs.size} long; the tar has {mine.key} at {mine.offset}, {mine.size} long"
            return [Problem(index.name, mine.key, what, INDEX)]
    if len(listed) != len(members):
        return [Problem(index.name, "", f"{len(listed)} entries for {len(members)} samples", INDEX)]
    return []


def _compare_rows(shard: ShardRecord, members: list[Member], rows: pa.Table) -> list[Problem]:
    columns = (rows[c].to_pylist() for c in ("key", "offset", "size"))
    for member, row in zip(members, zip(*columns, strict=True), strict=True):
        if (member.key, member.offset, member.size) != row:
            what = f"the catalogue says {row[0]} at byte {row[1]}, {row[2]} long; the tar has it at {member.offset}, {member.size} long"
            return [Problem(shard.name, member.key, what, REBUILD)]
    return []


def _check_blobs(path: Path, survey: Survey, members: list[Member], blobs: int | None, again: str) -> list[Problem]:
    """Decode some or all blobs: their checksum is inside."""
    if not members or blobs == 0:
        return []
    chosen: Iterable[int] = range(len(members))
    if blobs is not None and blobs < len(members):
        chosen = np.unique(np.linspace(0, len(members) - 1, blobs).astype(int)).tolist()
    problems = []
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        for i in chosen:
            for part in members[i].parts:
                blob = pages[part.offset : part.offset + part.size]
                try:
                    what = _disagreement(survey, part.extension, blob)
                except codec.CorruptBlob as error:
                    problems.append(Problem(path.name, members[i].key, str(error), again))
                    continue
                if what:
                    problems.append(Problem(path.name, members[i].key, what, REBUILD))
    return problems


def _disagreement(survey: Survey, extension: str, blob: bytes) -> str:
    """How a sound blob differs from what survey.json says; empty where it does not."""
    if extension == MODALITIES["vectors"]:
        decode_vectors(blob, survey.vectors)
        return ""
    header = codec.read_header(blob)
    codec.decode(blob)
    found = (header.channels, header.height, header.width)
    if extension == MODALITIES["spectrum"]:
        if survey.spectrum is None:
            return "a spectrum, survey.json knows of none"
        name, expected = survey.spectrum.codec, spectra.shape(survey.spectrum.grid.count)
    else:
        name, expected = survey.codec, (len(survey.bands), survey.height, survey.width)
    if found != expected or header.codec != name:
        return f"a {header.codec} blob of {found}, survey.json says {name} of {expected}"
    if extension == MODALITIES["image"]:
        step = np.array(survey.step, np.float32) if survey.step else np.zeros(len(survey.bands), np.float32)
        if not np.array_equal(np.array(header.step, np.float32), step):
            return f"quantised by {header.step}, survey.json says {survey.step}"
    return ""
