"""The kinds of files that can be read, by name: what `--kind` and survey recipes choose from."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from armillary.engine.data.sources.listing import leaving_out, list_folder
from armillary.engine.data.sources.options import fit_options
from armillary.engine.data.sources.source import Source, bad_files
from armillary.engine.user_code import load_object

__all__ = ["EXPORT", "KINDS", "Kind", "guess_kind", "open_source"]

log = logging.getLogger("armillary.data")

HDF5 = (".h5", ".hdf5")
TABLES = (*HDF5, ".parquet", ".pq", ".csv", ".csv.gz")
EXPORT = "armillary_export"
"""Attribute of an HDF5 file, or key of a Parquet file's metadata, with the description of an exported survey."""
MARKERS = {"survey.json": "packed", "export.json": "export"}
"""Files that tell a folder's kind."""


class Kind(NamedTuple):
    """One kind of source.

    Attributes:
        reader: "module:class" of the reader, below `armillary.engine.data.sources`; its options are the class's keyword
            arguments.
        what: One line.
        names: Patterns of file names that are taken for this kind without being told; none where names do not say.
        holds: For HDF5 files, names that all must be in the file.
        beside: Patterns of names of files that belong to those of this kind, and look like another one.
    """

    reader: str
    what: str
    names: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

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
        "surveys.desi:DesiCoadds",
        "DESI coadded spectra with Redrock's redshifts",
        ("coadd-*.fits", "coadd-*.fits.gz"),
        beside=("redrock-*", "rrdetails-*", "zbest-*", "emline-*", "qso_*"),
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
    "stack": Kind(
        "surveys.stack:ImageStack", "a stack of images of any bands, in HDF5, with columns", holds=("images",)
    ),
    "table": Kind("tables.rows:TableRows", "a catalogue: Parquet, CSV, ECSV, VOTable, FITS or HDF5, with a column map"),
    "provabgs": Kind("surveys.provabgs:Provabgs", "PROVABGS stellar masses and star-formation histories"),
    "gz-decals": Kind("surveys.galaxyzoo:GalaxyZooDecals", "Galaxy Zoo DECaLS votes"),
    "gz2": Kind("surveys.galaxyzoo:GalaxyZoo2", "Galaxy Zoo 2 votes"),
    "bricks": Kind("surveys.bricks:open_bricks", "cutouts from Legacy Survey bricks around the positions of a table"),
    "export": Kind("files.exported:exported", "what `armillary data export` writes: FITS, HDF5 or Parquet"),
    "packed": Kind("packed:PackedSurvey", "a packed survey: a folder with survey.json"),
}
"""Name: kind. Of several that fit a file, the first is meant."""


def guess_kind(path: Path) -> str:
    """The kind of source in a file or folder, from file names and, where those do not say, from what the first one holds.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: It holds several kinds, or none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    for marker, marked in MARKERS.items():
        if (path / marker).exists():
            return marked
    files = [path] if path.is_file() else list_folder(path).files
    named = {file: kind for file in files if (kind := _by_name(file.name))}
    found = Counter(named.values())
    for kind in list(found):  # files that lie beside those of another kind are none of their own
        beside = [f for f, k in named.items() if k != kind and _matches(f.name, KINDS[kind].beside)]
        found -= Counter(named[f] for f in beside)
    tables = [file for file in files if file.name.lower().endswith(TABLES) and file.name != "labels.csv"]
    if tables and (set(found) <= {"fits"} or any(t.suffix.lower() in HDF5 for t in tables)):
        first = next((t for t in tables if t.suffix.lower() in HDF5), tables[0])
        if (held := _by_content(first)) and not (found and held == "table"):
            found[held] += len(tables)
    if set(found) == {"fits"} and (first := next(f for f, k in named.items() if k == "fits")) and _is_fits_table(first):
        return "table"
    if len(found) == 1:
        return next(iter(found))
    have = ", ".join(f"{number} of kind {name}" for name, number in found.items()) or "no file of a known kind"
    raise ValueError(f"{path}: what to read is not clear ({have}); give the kind (--kind): {', '.join(KINDS)}")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)


def _by_name(name: str) -> str | None:
    return next((kind for kind, described in KINDS.items() if _matches(name, described.names)), None)


def _by_content(path: Path) -> str | None:
    """Kind of an HDF5 or Parquet file by what it holds; other tables are tables."""
    if path.suffix.lower() in HDF5:
        import h5py

        try:
            with h5py.File(path, "r") as file:
                if EXPORT in file.attrs:
                    return "export"
                found = next((k for k, d in KINDS.items() if d.holds and all(name in file for name in d.holds)), None)
                other_bands = found == "stein" and getattr(file["images"], "shape", ())[1:2] not in ((), (3,))
                return "stack" if other_bands else found
        except OSError as error:
            raise ValueError(f"{path}: not a readable HDF5 file: {error}") from error
    if path.suffix.lower() in (".parquet", ".pq"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            schema = pq.read_schema(path)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
        if EXPORT.encode() in (schema.metadata or {}):
            return "export"
        if "object_id" in schema.names and {"image", "spectrum"} & set(schema.names):
            return "mmu"
    return "table"


def _is_fits_table(path: Path) -> bool:
    """Whether a FITS file holds a table and no image."""
    from astropy.io import fits

    from armillary.engine.data.sources.hdus import all_hdus

    try:
        with warnings.catch_warnings(action="ignore"), fits.open(path) as hdus:
            kinds = [(hdu.is_image and hdu.header.get("NAXIS", 0) > 0, type(hdu).__name__) for hdu in all_hdus(hdus)]
    except (OSError, ValueError, TypeError, KeyError, EOFError):
        return False  # its reader says what is wrong
    return not any(image for image, _ in kinds) and any(kind == "BinTableHDU" for _, kind in kinds)


def open_source(path: Path, kind: str = "auto", *, on_bad: str = "error", **options: Any) -> Source:
    """Open files with the reader for their kind.

    Args:
        path: File or folder.
        kind: One of `KINDS`, "auto" to tell it by file names, or "module:class" of a reader of one's own (or the path of
            its file in place of the module).
        on_bad: "error", or "skip" to leave out files of a folder that cannot be read or differ from the others, as long as
            they are not more than half; their reasons are logged and are the source's `bad_files`.
        options: The reader's keyword arguments; see `options.fit_options`.

    Raises:
        ValueError: There is no such kind, or it has no such option.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: must be a file or a folder, got a device, pipe or socket")
    chosen = guess_kind(path) if kind == "auto" else kind
    if chosen not in KINDS and ":" not in chosen:
        raise ValueError(f"kind: must be auto, module:class or one of {', '.join(KINDS)}, got {chosen!r}")
    reader = KINDS[chosen].load() if chosen in KINDS else load_object(chosen)
    fitted = fit_options(reader, options, f"sources of kind {chosen}")
    if on_bad == "skip" and "on_bad" in inspect.signature(reader).parameters:
        fitted["on_bad"] = on_bad
    if on_bad != "skip" or not path.is_dir():
        return reader(path, **fitted)
    bad: dict[Path, str] = {}
    files = list_folder(path).files
    while True:
        with leaving_out(bad):
            try:
                source = reader(path, **fitted)
            except ValueError as error:  # begins with the file's name
                file = next((f for f in files if f not in bad and str(error).startswith((f"{f}:", f"{f},"))), None)
                if file is None or 2 * (len(bad) + 1) > len(files):
                    raise
                bad[file] = str(error)
                log.warning("left out: %s", error)
                continue
        if bad:
            vars(source)["bad_files"] = [*bad_files(source), *bad.values()]
        return source
