"""A folder of embeddings that is being written: in parts, by any number of processes, continued where it was killed.

A part is a stretch of a split in stored order, so the parts, and their bytes, do not depend on how many processes there are.

FOLDER/.fill/
  plan.json                what will be in the folder, and what it is made of
  part-000000.json ...     rows, size and SHA-256 of a finished part

A part's file reaches the disk under its name before its entry here does, so a process that is killed at any moment loses the
part that it was at. `.fill` becomes `embeddings.json` when all parts are there. See `engine.data.format.embedding_files`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from armillary.engine.atomic_file import write_json
from armillary.engine.data.format.embedding_files import FILL, FORMAT, RECORD, EmbeddingPart
from armillary.engine.sealed_json import sealed, unsealed
from armillary.models.file_hash import sha256_of

__all__ = ["Part", "Parts"]

KEY_BYTES = 48
"""Of a row on disk beside its vector, generously."""


class Part(NamedTuple):
    """A stretch of a split.

    Attributes:
        number: Place among all parts.
        split: The split.
        places: Places in its stored order.
    """

    number: int
    split: str
    places: range

    @property
    def name(self) -> str:
        """File name."""
        return f"part-{self.number:06d}.parquet"


class Parts:
    """A folder that is to be filled. One process prepares and finishes it, any number of them write.

    Args:
        folder: The folder.
        splits: Samples of each split that is embedded, in order.
        rows: Samples of a part.
        metadata: What the embeddings are made of.

    Attributes:
        all: Every part.
    """

    def __init__(self, folder: Path, splits: Mapping[str, int], rows: int, metadata: Mapping[str, str]) -> None:
        self.folder, self.metadata = folder, dict(metadata)
        self._fill, self._plan_file, self._record = folder / FILL, folder / FILL / "plan.json", folder / RECORD
        self._plan: dict[str, Any] = {
            "format": FORMAT,
            "splits": dict(splits),
            "part_rows": rows,
            "metadata": self.metadata,
        }
        stretches = [
            (split, range(first, min(first + rows, count)))
            for split, count in splits.items()
            for first in range(0, count, rows)
        ]
        self.all = tuple(Part(number, split, places) for number, (split, places) in enumerate(stretches))

    def prepare(self, width: int | None, usage: Callable[[Path], Any] = shutil.disk_usage) -> list[str]:
        """Begin the folder, or continue it; its owner calls this (`engine.exclusive`).

        Of a folder that was finished before, parts that are missing or damaged are to be made again.

        Args:
            width: D, where it is known.
            usage: `shutil.disk_usage`.

        Returns:
            What was found to be wrong and will be made again.

        Raises:
            ValueError: The folder holds something else, or other embeddings.
            OSError: It cannot be written, or the disk is too full.
        """
        begun = self._record.is_file() or self._plan_file.is_file()
        own = (FILL, RECORD, "part-", ".") if begun else (".",)
        if strangers := [p.name for p in self.folder.iterdir() if not p.name.startswith(own)]:
            raise ValueError(f"out: must be a new folder or one of embeddings, got {self.folder} with {strangers[0]}")
        wrong = self._reopen() if self._record.is_file() else []
        if self.finished:
            shutil.rmtree(self._fill, ignore_errors=True)
            return []
        if self._plan_file.is_file():
            self._refuse_other(_read(self._plan_file))
        for dead in self.folder.glob(".part-*.tmp"):  # of processes that were killed
            dead.unlink()
        wrong += [said for part in self.all if (said := self._lost(part))]
        left = sum(len(part.places) for part in self.pending())
        needed, free = left * (4 * (width or 0) + KEY_BYTES), int(usage(self.folder).free)
        if free < needed:
            gib = 2**30
            raise OSError(
                f"out: {needed / gib:.1f} GiB are needed for {left:,} embeddings of {width} dimensions, but {self.folder} "
                f"has {free / gib:.1f} GiB free; make room, or choose another place"
            )
        self._fill.mkdir(exist_ok=True)
        if not self._plan_file.is_file():
            write_json(self._plan_file, self._plan)
        return wrong

    def _reopen(self) -> list[str]:
        """Turn the record of a finished folder back into entries, without those of damaged parts, if there are any."""
        record = _read(self._record)
        self._refuse_other(record)
        parts = {part["name"]: EmbeddingPart(**part) for part in record["parts"]}
        wrong = {name: said for name, part in parts.items() if (said := part.problem(self.folder))}
        if wrong:
            self._fill.mkdir(exist_ok=True)
            for part in self.all:
                if part.name not in wrong:
                    self._enter(part, parts.get(part.name), int(record["dimensions"]))
            write_json(self._plan_file, self._plan)
            self._record.unlink()
        return list(wrong.values())

    def _lost(self, part: Part) -> str | None:
        """Drop the entry of a part whose file is gone or has another size; why."""
        entry = self._entry(part)
        said = None if entry is None or not entry[0].rows else entry[0].problem(self.folder, whole=False)
        if said is not None:
            self._entry_file(part).unlink()
        return said

    def _refuse_other(self, theirs: Mapping[str, Any]) -> None:
        """Refuse a folder of other embeddings than these, by everything that differs."""
        old, new = ({**x, **x["metadata"]} for x in (theirs, self._plan))
        names = dict.fromkeys([*self._plan, *old["metadata"], *self.metadata])
        differ = [name for name in names if name != "metadata" and old.get(name) != new.get(name)]
        if differ:
            listed = "; ".join(f"{k} {old.get(k)!r} there, {new.get(k)!r} here" for k in differ)
            raise ValueError(f"out: {self.folder} holds other embeddings ({listed}); choose another folder")

    @property
    def finished(self) -> bool:
        """Whether all parts are there and recorded."""
        return self.is_finished(self.folder)

    @staticmethod
    def is_finished(folder: Path) -> bool:
        """Whether a folder holds finished embeddings."""
        return (folder / RECORD).is_file()

    def pending(self) -> list[Part]:
        """Parts without an entry."""
        return [] if self.finished else [part for part in self.all if self._entry(part) is None]

    def path(self, part: Part) -> Path:
        """Where a part's file lies."""
        return self.folder / part.name

    def done(self, part: Part, rows: int, dimensions: int) -> None:
        """Enter a part whose file is on the disk under its name; without rows there is none."""
        entry = None
        if rows:
            path = self.path(part)
            entry = EmbeddingPart(part.name, part.split, rows, path.stat().st_size, sha256_of(path))
        self._enter(part, entry, dimensions)

    def _enter(self, part: Part, entry: EmbeddingPart | None, dimensions: int) -> None:
        entry = entry or EmbeddingPart(part.name, part.split, 0, 0, "")
        write_json(self._entry_file(part), {"dimensions": dimensions, "part": asdict(entry)})

    def _entry_file(self, part: Part) -> Path:
        return self._fill / f"part-{part.number:06d}.json"

    def _entry(self, part: Part) -> tuple[EmbeddingPart, int] | None:
        path = self._entry_file(part)
        if not path.is_file():
            return None
        raw = _read(path)
        return EmbeddingPart(**raw["part"]), int(raw["dimensions"])

    def finish(self) -> tuple[int, int]:
        """Write the record, once every part is entered; all of it again is harmless.

        Returns:
            Rows and dimensions.

        Raises:
            ValueError: Nothing was embedded, or parts have different dimensions.
        """
        if self.finished:
            record = _read(self._record)
            return sum(part["rows"] for part in record["parts"]), int(record["dimensions"])
        entries = [entry for part in self.all if (entry := self._entry(part)) is not None]
        assert len(entries) == len(self.all), "every part is entered"
        parts = [part for part, _ in entries if part.rows]
        widths = {width for part, width in entries if part.rows}
        if len(widths) > 1:
            raise ValueError(f"out: parts of {self.folder} have {sorted(widths)} dimensions; delete it and start anew")
        if not parts:
            shutil.rmtree(self._fill)
            raise ValueError("nothing to embed: the split is empty, or its objects lack what the encoder reads")
        record = {**self._plan, "dimensions": widths.pop(), "parts": [asdict(part) for part in parts]}
        write_json(self._record, sealed(record))
        shutil.rmtree(self._fill)
        return sum(part.rows for part in parts), int(record["dimensions"])


def _read(path: Path) -> dict[str, Any]:
    try:
        return unsealed(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: not readable ({error}); delete it, and what it belongs to is made again") from error
