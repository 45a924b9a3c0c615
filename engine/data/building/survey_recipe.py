"""Survey recipes: which files, how they are matched and cut, how they are split and packed, as one readable record.

    SURVEY = Preparation(
        name="desi-pairs",
        first=Read("stein", Path("/data/stein"), cuts=("mag(flux_z) < 20",)),
        matches=(With(Read("desi", Path("/data/desi")), on=Sky(1.0)),),
        split="healpix:64",
    )

    if __name__ == "__main__":
        main(SURVEY)

Started as `python recipes/<survey>.py --out surveys/<survey>`; every field can be overridden on the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from armillary.engine.command_line import refuse_repeats
from armillary.engine.data.building.build import Codec, OnBad, build
from armillary.engine.data.building.splits import parse_split
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.joined import Joined, Key, Match, Sky
from armillary.engine.data.sources.kinds import KINDS, open_source
from armillary.engine.data.sources.selected import Condition, Selected
from armillary.engine.data.sources.source import Source

__all__ = ["Key", "Preparation", "Read", "Sky", "With", "Work", "main", "prepare"]


@dataclass(frozen=True)
class Read:
    """Files to read.

    Attributes:
        kind: One of `sources.kinds.KINDS`, or "module:class" of a reader of one's own.
        path: File or folder.
        options: Keyword arguments of the reader.
        cuts: Conditions on its rows, see `sources.selected`.
        drop_duplicates_arcsec: Of rows closer than this only the first is kept.
    """

    kind: str
    path: Path
    options: Annotated[Mapping[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    cuts: tuple[str, ...] = ()
    drop_duplicates_arcsec: float | None = None

    def open(self, on_bad: OnBad = "error") -> Source:
        """Open the files and apply the cuts."""
        source = open_source(self.path, self.kind, on_bad=on_bad, **self.options)
        if self.cuts or self.drop_duplicates_arcsec is not None:
            source = Selected(source, self.cuts, drop_duplicates_arcsec=self.drop_duplicates_arcsec)
        return source


@dataclass(frozen=True)
class With:
    """Files to match to what comes before them.

    Attributes:
        read: The files.
        on: By position or by identifier.
        required: Leave out objects without a match.
        name: Prefix for labels that others have too.
    """

    read: Read
    on: Sky | Key
    required: bool = True
    name: str = ""


@dataclass(frozen=True)
class Preparation:
    """A survey recipe.

    Attributes:
        name: Survey name.
        first: Gives keys, positions and splits.
        matches: Joined to it in turn; each may match labels of all before it.
        cuts: Conditions on the joined objects.
        split: `auto`, `key`, `sky`, `healpix[:NSIDE]`, `source` or `COLUMN:LOW:HIGH`.
        test_fraction: Share of the test split, where the rule has one.
        validation_fraction: Share of the split `validation`, likewise; none by default.
        codec: "bitplane" or "float16".
        samples_per_shard: Samples of a tar.
        seed: Keys the shuffle.
    """

    name: str
    first: Read
    matches: tuple[With, ...] = ()
    cuts: tuple[str, ...] = ()
    split: str = "auto"
    test_fraction: float | None = None
    validation_fraction: float | None = None
    codec: Codec = "bitplane"
    samples_per_shard: int = 2048
    seed: int = 0

    def problems(self) -> list[str]:
        """What is wrong with the recipe and its files' places, as `field: rule, got value`; empty if nothing."""
        found = []
        reads = [("first", self.first), *((f"matches.{i}.read", m.read) for i, m in enumerate(self.matches))]
        for where, read in reads:
            if read.kind not in KINDS and ":" not in read.kind:
                found.append(f"{where}.kind: must be module:class or one of {', '.join(KINDS)}, got {read.kind!r}")
            if not read.path.exists():
                found.append(f"{where}.path: must be an existing file or folder, got {read.path}")
        for where, cuts in [(f"{where}.cuts", read.cuts) for where, read in reads] + [("cuts", self.cuts)]:
            for cut in cuts:
                try:
                    Condition.parse(cut)
                except ValueError as error:
                    found.append(f"{where}: {error}")
        try:
            parse_split(self.split, self.test_fraction, self.validation_fraction)
        except ValueError as error:
            found.append(str(error))
        return found

    def open(self, tell: Any = print, on_bad: OnBad = "error") -> Source:
        """Open, match and cut; what was matched is told line by line."""
        source = self.first.open(on_bad)
        for match in self.matches:
            joined = Joined(source, Match(match.read.open(on_bad), match.on, match.required, match.name))
            for line in joined.report():
                tell(line)
            source = joined
        if self.cuts:
            selected = Selected(source, self.cuts)
            for cut, count in selected.removed.items():
                tell(f"{cut}: removed {count:,} objects")
            source = selected
        return source


@dataclass(frozen=True)
class Work:
    """How a survey is built, which does not change what it holds.

    Attributes:
        out: Folder of the survey; made if need be.
        processes: Worker processes.
        dask: Address of a Dask scheduler, whose workers do the work instead.
        on_bad: Stop at an unusable file or sample, or skip and count it.
        progress: Show progress bars.
    """

    out: Path
    processes: int = 2
    dask: str | None = None
    on_bad: OnBad = "error"
    progress: bool = True


def prepare(preparation: Preparation, work: Work) -> Survey:
    """Build the survey that a recipe describes; an interrupted build goes on.

    Raises:
        ValueError: The recipe has problems; all are listed.
    """
    if problems := preparation.problems():
        raise ValueError("; ".join(problems))
    return build(
        preparation.open(on_bad=work.on_bad),
        work.out,
        name=preparation.name,
        codec=preparation.codec,
        samples_per_shard=preparation.samples_per_shard,
        split=parse_split(preparation.split, preparation.test_fraction, preparation.validation_fraction),
        seed=preparation.seed,
        processes=work.processes,
        dask=work.dask,
        progress=work.progress,
        on_bad=work.on_bad,
    )


@dataclass(frozen=True)
class _Command:
    """Command line of a survey recipe."""

    work: Annotated[Work, tyro.conf.arg(name="")]
    survey: Annotated[Preparation, tyro.conf.arg(name="")]


def main(preparation: Preparation) -> None:
    """Build a survey from its recipe's file; ends the process: 0 done, 2 bad input."""
    sys.exit(start(preparation, sys.argv[1:]))


def start(preparation: Preparation, arguments: Sequence[str]) -> int:
    """`main` as a function.

    Args:
        preparation: The recipe.
        arguments: Command line without the program's name.

    Returns:
        Exit code.
    """
    from armillary.engine.data.format.summary import summary  # which imports rich

    try:
        refuse_repeats(arguments)
        default = _Command(Work(out=tyro.MISSING), preparation)
        command = tyro.cli(tyro.conf.AvoidSubcommands[_Command], default=default, args=arguments)
        survey = prepare(command.survey, command.work)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{preparation.name}: {error}", file=sys.stderr)
        return 2
    from rich.console import Console

    Console().print(summary(survey))
    return 0
