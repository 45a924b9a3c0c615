"""The kinds of files that can be read, by name: what `--kind` and survey recipes choose from."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from armillary.engine.data.surveys.sample import Source

__all__ = ["KINDS", "Kind", "guess_kind", "open_source", "parse_options"]

HDF5 = (".h5", ".hdf5")


class Kind(NamedTuple):
    """One kind of source.

    Attributes:
        reader: "module:class" of the reader, below `armillary.engine.data.surveys`; its options are the class's keyword arguments.
        what: One line.
        endings: File names that are taken for this kind without being told; empty where names do not say.
    """

    reader: str
    what: str
    endings: tuple[str, ...] = ()

    def load(self) -> Callable[..., Source]:
        """Import the reader."""
        module, name = self.reader.split(":")
        return getattr(importlib.import_module(f"armillary.engine.data.surveys.{module}"), name)


KINDS = {
    "images": Kind(
        "images:Pictures", "display pictures: a folder or zip of JPEG or PNG", (".jpg", ".jpeg", ".png", ".zip")
    ),
    "fits": Kind("fits:FitsCutouts", "FITS cutouts, one file an object", (".fits", ".fits.gz", ".fits.fz", ".fit")),
    "stein": Kind("stein:SteinSurvey", "Legacy Survey cutouts of Stein et al. (2021), HDF5", HDF5),
    "packed": Kind("packed:PackedSurvey", "a packed survey: a folder with survey.json"),
}
"""Name: kind."""


def guess_kind(path: Path) -> str:
    """The kind of source in a file or folder, from its file names.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: It holds several kinds, or none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / "survey.json").exists():
        return "packed"
    names = [path.name] if path.is_file() else [p.name for p in path.rglob("*") if p.is_file()]
    named = {name: kind.endings for name, kind in KINDS.items() if kind.endings}
    found = {name: sum(n.lower().endswith(ends) for n in names) for name, ends in named.items()}
    present = [name for name, number in found.items() if number]
    if len(present) == 1:
        return present[0]
    have = ", ".join(f"{number} of kind {name}" for name, number in found.items())
    raise ValueError(f"{path}: what to read is not clear ({have}); give the kind (--kind): {', '.join(KINDS)}")


def open_source(path: Path, kind: str = "auto", **options: Any) -> Source:
    """Open files with the reader for their kind.

    Args:
        path: File or folder.
        kind: One of `KINDS`, or "auto" to tell it by file names.
        options: The reader's keyword arguments.

    Raises:
        ValueError: There is no such kind, or it has no such option.
    """
    chosen = guess_kind(path) if kind == "auto" else kind
    if chosen not in KINDS:
        raise ValueError(f"kind: must be auto or one of {', '.join(KINDS)}, got {chosen!r}")
    reader = KINDS[chosen].load()
    takes = [p.name for p in inspect.signature(reader).parameters.values()][1:]
    for option in options:
        if option not in takes:
            known = ", ".join(takes) or "none"
            raise ValueError(
                f"{option}: sources of kind {chosen} have no such option (they have: {known}); leave it out"
            )
    return reader(path, **options)


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options written as NAME=VALUE: numbers, tuples, True and None as in Python, everything else text.

    Raises:
        ValueError: One has another form, or is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"option {text!r}: must be NAME=VALUE, such as radius=2.5")
        if name in options:
            raise ValueError(f"option {name!r}: given twice")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options
