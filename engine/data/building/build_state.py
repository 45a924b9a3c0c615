"""The plan of a build in progress, and the rules for continuing it, or finding it done, or refusing the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from armillary.engine.atomic_file import write_json
from armillary.engine.data.building.packing import BUILD_FOLDER, Settings
from armillary.engine.data.building.shard_assignment import ShardAssignment
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.source import Source, inputs, spectrum_of, vectors_of
from armillary.engine.exclusive import exclusive

__all__ = ["Journal", "clear_leftovers", "finished", "identify", "load_journal", "locked"]


@dataclass(frozen=True)
class Journal:
    """The plan of a build, kept in `.build/plan.json`.

    Attributes:
        identity: Everything that determines the survey's bytes.
        settings: What was measured and decided before packing.
        started: Time of the first start, UTC.
        command: Command line of the first start.
    """

    identity: dict[str, Any]
    settings: Settings
    started: str
    command: str

    def save(self, folder: Path) -> None:
        """Write `.build/plan.json` atomically."""
        write_json(folder / BUILD_FOLDER / "plan.json", asdict(self))


def identify(source: Source, options: dict[str, Any], layout: ShardAssignment) -> dict[str, Any]:
    """Everything that determines the survey's bytes, as JSON would give it back."""
    identity = {
        **options,
        "bands": source.bands,
        "unit": source.unit,
        "pixel_scale_arcsec": source.pixel_scale_arcsec,
        "labels": source.labels,
        "spectrum": None if (spectrum := spectrum_of(source)) is None else asdict(spectrum),
        "vectors": [asdict(vector) for vector in vectors_of(source)],
        "samples": len(source),
        "inputs": inputs(source),
        "keys": layout.digest,
    }
    return json.loads(json.dumps(identity))


def _difference(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    parts = [
        f"{k} {theirs.get(k)!r}, now {mine.get(k)!r}" for k in sorted(theirs | mine) if theirs.get(k) != mine.get(k)
    ]
    return "; ".join(parts)


def finished(folder: Path, identity: dict[str, Any]) -> Survey | None:
    """The survey in the folder, if it is this one; None if there is none.

    Raises:
        FileExistsError: There is another one, or pieces of one without a plan.
    """
    if (folder / "survey.json").exists():
        survey = Survey.load(folder)
        theirs = survey.provenance.get("build", {})
        if theirs == identity:
            return survey
        raise FileExistsError(
            f"{folder}: holds another survey ({_difference(theirs, identity)}); choose another folder or delete it"
        )
    if not (folder / BUILD_FOLDER / "plan.json").exists():
        strangers = [p.name for p in folder.iterdir() if p.suffix in (".tar", ".idx", ".parquet")]
        if strangers:
            raise FileExistsError(f"{folder}: holds {sorted(strangers)[0]}, but no survey; choose an empty folder")
    return None


def load_journal(folder: Path, identity: dict[str, Any]) -> Journal | None:
    """The plan of an interrupted build; None if there is none.

    Raises:
        FileExistsError: It is that of another source or of other options.
    """
    path = folder / BUILD_FOLDER / "plan.json"
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text())
        found = Journal(raw["identity"], Settings.from_json(raw["settings"]), raw["started"], raw["command"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileExistsError(
            f"{path}: the plan of an unfinished build is damaged ({error}); delete {path.parent} and the shards"
        ) from error
    if found.identity != identity:
        raise FileExistsError(
            f"{folder}: holds an unfinished build of something else ({_difference(found.identity, identity)}); "
            f"repeat its options, choose another folder, or delete {folder / BUILD_FOLDER} and the shards"
        )
    return found


def clear_leftovers(folder: Path) -> None:
    """Remove half-written files of processes that were killed."""
    for leftover in [*folder.glob(".*.tmp"), *(folder / BUILD_FOLDER).glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, own it, and clear half-written files of a killed build.

    A folder that was made for nothing is removed.

    Raises:
        NotADirectoryError: There is a file in the way.
        InUse: Another process owns it.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder}: not a folder; choose another one for the survey") from error
    try:
        with exclusive(folder):
            (folder / BUILD_FOLDER).mkdir(exist_ok=True)
            try:
                clear_leftovers(folder)
                yield
            finally:
                unplanned = not (folder / BUILD_FOLDER / "plan.json").exists()
                if unplanned and (folder / BUILD_FOLDER).exists():
                    shutil.rmtree(folder / BUILD_FOLDER)
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()
