"""What `armillary data export` wrote, read back: FITS, HDF5 or Parquet with the survey's description.

Pixels, masks, noise and quantisation steps, spectra, vectors, unit, scale, labels and identifiers are those of the survey that
was exported; a build of it makes the same blobs. NaN is a pixel without data, and 0 a measured flux.
"""

from __future__ import annotations

import csv
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.files.fits_tables import READ_ERRORS, open_fits
from armillary.engine.data.sources.files.nested_parquet import NestedParquet, open_parquet
from armillary.engine.data.sources.kinds import EXPORT
from armillary.engine.data.sources.packed import CatalogSource
from armillary.engine.data.sources.source import BadSample, Sample, listing_mark
from armillary.models.file_hash import sha256_of

__all__ = ["exported"]

BASE = ("key", "split", "ra", "dec", "source")
DAMAGE = (*READ_ERRORS, RuntimeError, pa.ArrowException)


def exported(path: Path | str) -> CatalogSource:
    """Open an export: the folder of FITS files, or the HDF5 or Parquet file.

    Raises:
        FileNotFoundError: There is no such export.
        ValueError: It is none, or damaged.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{path}: no such export")
    if root.is_dir():
        return _ExportedFits(root)
    return _ExportedHdf5(root) if h5py.is_hdf5(root) else _ExportedParquet(root)


class _Exported(CatalogSource):
    """Arrays by name for each row: image, flux, ivar, flux_step, vectors/NAME; one that is absent is all NaN or missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            described = json.loads(self._description())
            survey = Survey.from_json(described["survey"])
            super().__init__(survey, self._rows(described))
        except (*DAMAGE, AttributeError) as error:
            raise ValueError(f"{path}: not a readable export of armillary: {error}") from error

    @abstractmethod
    def _description(self) -> str:
        """The description, JSON."""

    @abstractmethod
    def _rows(self, described: dict[str, Any]) -> pa.Table:
        """The catalogue."""

    @abstractmethod
    def _arrays(self, index: int, key: str) -> dict[str, np.ndarray]:
        """What the row holds, by name."""

    def inputs(self) -> dict[str, str]:
        """The file with its checksum."""
        return {self.path.name: f"sha256:{sha256_of(self.path)}"}

    def read(self, index: int) -> Sample:
        """Read one object.

        Raises:
            BadSample: It is damaged.
            IndexError: There is no such object.
        """
        row = self._row(index)
        try:
            stored = self._arrays(index, row["key"])
            payload: dict[str, Any] = {}
            if (image := _known(stored.get("image"))) is not None:
                pixels = np.asarray(image, np.float32).reshape(len(self.bands), self.survey.height, self.survey.width)
                valid = np.isfinite(pixels)
                payload = {"image": np.where(valid, pixels, np.float32(0)), "valid": None if valid.all() else valid}
            if (flux := _known(stored.get("flux"))) is not None:
                step = float(np.ravel(stored.get("flux_step", np.nan))[0])
                ivar = np.asarray(stored["ivar"], np.float32)
                payload["spectrum"] = Spectrum(np.asarray(flux, np.float32), ivar, step if step == step else None)
            vectors = {v.name: _known(stored.get(f"vectors/{v.name}")) for v in self.vectors}
            payload["vectors"] = {name: np.asarray(v, np.float32) for name, v in vectors.items() if v is not None}
        except DAMAGE as error:
            raise BadSample(f"{self.path}: {row['key']}: not readable: {error}") from error
        return self._sample(row, **payload)


def _known(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None or np.isnan(values).all() else values


class _ExportedFits(_Exported):
    def _description(self) -> str:
        return (self.path / "export.json").read_text()

    def _rows(self, described: dict[str, Any]) -> pa.Table:
        with open(self.path / "labels.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("split",)}
        columns["key"] = [row["file"] for row in rows]
        columns["source"] = [f"{key}.fits" for key in columns["key"]]
        for name, kind in ({"ra": "float64", "dec": "float64"} | described["types"]).items():
            cells = [row[name] for row in rows]
            columns[name] = cells if kind == "string" else [float(cell) if cell else np.nan for cell in cells]
        return pa.table(columns)

    def inputs(self) -> dict[str, str]:
        """The files (names and sizes), the labels with their checksum."""
        sizes = [(key, (self.path / f"{key}.fits").stat().st_size) for key in self.catalog["key"].to_pylist()]
        return {
            f"{len(self)} files": listing_mark(sizes),
            "labels.csv": f"sha256:{sha256_of(self.path / 'labels.csv')}",
        }

    def _arrays(self, index: int, key: str) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        with open_fits(self.path / f"{key}.fits") as hdus:
            if len(hdus) - 1 != hdus[0].header.get("NEXTEND"):
                raise ValueError(f"{key}.fits has {len(hdus) - 1} HDUs behind the first, not NEXTEND; it is truncated")
            if hdus[0].data is not None:
                found["image"] = np.array(hdus[0].data)
            for hdu in hdus[1:]:
                if "VECTOR" in hdu.header:
                    found[f"vectors/{hdu.header['VECTOR']}"] = np.array(hdu.data["VALUE"])
                else:
                    found |= {name.lower(): np.array(hdu.data[name]) for name in ("FLUX", "IVAR")}
                    found["flux_step"] = np.array(hdu.header.get("FLUXSTEP", np.nan))
        return found


class _ExportedHdf5(_Exported):
    def _description(self) -> str:
        with h5py.File(self.path, "r") as file:
            if EXPORT not in file.attrs:
                raise ValueError(f"its attribute {EXPORT!r} is missing")
            return str(file.attrs[EXPORT])

    def _rows(self, described: dict[str, Any]) -> pa.Table:
        with h5py.File(self.path, "r") as file:
            stored = {name: file[f"catalog/{name}"] for name in (*BASE, *described["types"])}
            return pa.table({n: list(v.asstr()[:]) if v.dtype.kind == "O" else v[:] for n, v in stored.items()})

    def _arrays(self, index: int, key: str) -> dict[str, np.ndarray]:
        with h5py.File(self.path, "r") as file:
            names = {"image": "images", "flux": "flux", "ivar": "ivar", "flux_step": "flux_step"}
            names |= {f"vectors/{v.name}": f"vectors/{v.name}" for v in self.vectors}
            return {array: np.asarray(file[name][index]) for array, name in names.items() if name in file}


class _ExportedParquet(_Exported):
    _open: NestedParquet | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open file."""
        return {**self.__dict__, "_open": None}

    def _file(self) -> NestedParquet:
        if self._open is None:
            self._open = open_parquet(self.path)
        return self._open

    def _description(self) -> str:
        metadata = self._file().schema.metadata or {}
        if EXPORT.encode() not in metadata:
            raise ValueError(f"its metadata {EXPORT!r} are missing")
        return metadata[EXPORT.encode()].decode()

    def _rows(self, described: dict[str, Any]) -> pa.Table:
        self._columns: dict[str, str] = described["arrays"]
        return self._file().rows(0, self._file().count, (*BASE, *described["types"])).replace_schema_metadata(None)

    def _arrays(self, index: int, key: str) -> dict[str, np.ndarray]:
        row = self._file().row(index, list(self._columns.values()))
        stored = {array: row[name][0].values for array, name in self._columns.items()}
        return {array: values.to_numpy(zero_copy_only=False) for array, values in stored.items() if values is not None}
