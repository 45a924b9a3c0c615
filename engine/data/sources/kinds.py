"""The kinds of files that can be read, by name: what `--kind` and survey recipes choose from."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from armillary.engine.data.sources.source import Source
from armillary.engine.user_code import load_object

__all__ = ["KINDS", "Kind", "guess_kind", "open_source", "parse_options"]

HDF5 = (".h5", ".hdf5")


class Kind(NamedTuple):
    """One kind of source.

    Attributes:
        reader: "module:class" of the reader, below `armillary.engine.data.sources`; its options are the class's keyword
            arguments.
        what: One line.
        names: Patterns of file names that are taken for this kind without being told; none where names do not say.
        holds: For HDF5 files, names that all must be in the file.
    """

    reader: str
    what: str
    names: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()

    def load(self) -> Callable[..., Source]:
        """Import the reader."""
        module, name = self.reader.split(":")
        return getattr(importlib.import_module(f"armillary.engine.data.sources.{module}"), name)


KINDS = {
    "images": Kind(
        "surveys.images:Pictures",
        "display pictures: a folder or zip of JPEG or PNG",
        ("*.jpg", "*.jpeg", "*.png", "*.zip"),
    ),
    "desi": Kind(
        "surveys.desi:DesiCoadds", "DESI coadded spectra with Redrock's redshifts", ("coadd-*.fits", "coadd-*.fits.gz")
    ),
    "sdss": Kind("surveys.sdss:SdssSpectra", "SDSS and BOSS spectra, one file each", ("spec-*.fits", "spec-*.fits.gz")),
    "fits": Kind(
        "surveys.fits:FitsCutouts",
        "FITS cutouts, one file an object",
        ("*.fits", "*.fit", "*.fits.gz", "*.fits.fz", "*.fz"),
    ),
    "stein": Kind("surveys.stein:SteinSurvey", "Legacy Survey cutouts of Stein et al. (2021)", holds=("images", "ra")),
    "astroclip": Kind(
        "surveys.astroclip:AstroClipPairs", "AstroCLIP's image-spectrum pairs, HDF5 or Parquet", holds=("0/images",)
    ),
    "galaxiesml-spectra": Kind(
        "surveys.galaxiesml:GalaxiesMLSpectra",
        "GalaxiesML-Spectra: HSC images with DESI spectra",
        holds=("spectrum/wave", "image"),
    ),
    "galaxiesml": Kind(
        "surveys.galaxiesml:GalaxiesML", "GalaxiesML: HSC images with redshifts", holds=("specz_redshift", "image")
    ),
    "supermock": Kind(
        "surveys.supermock.supermock:open_supermock",
        "SuperMock's simulated galaxies",
        names=("lightcone_galaxies_skypatch_*.h5", "*_skypatch_*.h5", "supermock_v3_z_*.hdf5"),
        holds=("galaxy_id", "redshift_true"),
    ),
    "mmu": Kind("surveys.mmu:MultimodalUniverse", "Multimodal Universe, HDF5 or Parquet", holds=("object_id",)),
    "table": Kind(
        "files.tables:TableRows", "a catalogue: Parquet, CSV, ECSV, VOTable, FITS or HDF5, with a column map"
    ),
    "provabgs": Kind("surveys.provabgs:Provabgs", "PROVABGS stellar masses and star-formation histories"),
    "gz-decals": Kind("surveys.galaxyzoo:GalaxyZooDecals", "Galaxy Zoo DECaLS votes"),
    "gz2": Kind("surveys.galaxyzoo:GalaxyZoo2", "Galaxy Zoo 2 votes"),
    "bricks": Kind("surveys.bricks:open_bricks", "cutouts from Legacy Survey bricks around the positions of a table"),
    "packed": Kind("packed:PackedSurvey", "a packed survey: a folder with survey.json"),
}
"""Name: kind. Of several that fit a file, the first is meant."""


def guess_kind(path: Path) -> str:
    """The kind of source in a file or folder, from file names and, of HDF5 files, from what the first one holds.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: It holds several kinds, or none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / "survey.json").exists():
        return "packed"
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = Counter(kind for file in files if (kind := _by_name(file.name)))
    tables = [file for file in files if file.suffix.lower() in HDF5]
    if tables and (kind := _by_content(tables[0])):
        found[kind] += len(tables)
    if len(found) == 1:
        return next(iter(found))
    have = ", ".join(f"{number} of kind {name}" for name, number in found.items()) or "no file of a known kind"
    raise ValueError(f"{path}: what to read is not clear ({have}); give the kind (--kind): {', '.join(KINDS)}")


def _by_name(name: str) -> str | None:
    for kind, described in KINDS.items():
        if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in described.names):
            return kind
    return None


def _by_content(path: Path) -> str | None:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            for kind, described in KINDS.items():
                if described.holds and all(name in file for name in described.holds):
                    return kind
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file: {error}") from error
    return None


def open_source(path: Path, kind: str = "auto", **options: Any) -> Source:
    """Open files with the reader for their kind.

    Args:
        path: File or folder.
        kind: One of `KINDS`, "auto" to tell it by file names, or "module:class" of a reader of one's own (or the path of
            its file in place of the module).
        options: The reader's keyword arguments.

    Raises:
        ValueError: There is no such kind, or it has no such option.
    """
    chosen = guess_kind(path) if kind == "auto" else kind
    if chosen not in KINDS and ":" not in chosen:
        raise ValueError(f"kind: must be auto, module:class or one of {', '.join(KINDS)}, got {chosen!r}")
    reader = KINDS[chosen].load() if chosen in KINDS else load_object(chosen)
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
