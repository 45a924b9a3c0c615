"""A packed survey back to common formats, so that nobody is locked in: FITS cutouts, HDF5 or Parquet.

Pixels without data are NaN in images (a decoded 0 is a measured flux), 0 with ivar 0 in spectra; unknown components of
vectors are NaN; a modality that an object lacks is NaN throughout (HDF5), null (Parquet) or absent (FITS).

    fits      one file an object, KEY.fits: image with WCS, spectrum as a table (WAVE, FLUX, IVAR), vectors as a table;
              labels.csv and export.json beside them
    hdf5      one file: images [N, C, H, W], flux and ivar [N, L] with wave [L], vectors/NAME [N, n], catalog/COLUMN [N]
    parquet   one file, a row an object: the catalogue's columns, and image, flux, ivar and vectors as lists

Each holds the survey's description, so that `armillary data build` makes the same survey of it: pixels, masks, noise and
steps, units, scale, labels and identifiers (`sources.files.exported`).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from armillary.engine.atomic_file import atomic_path, write_json
from armillary.engine.choices import check_choice
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.kinds import EXPORT
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import Sample
from armillary.engine.exclusive import exclusive_file

__all__ = ["unpack"]

Format = Literal["fits", "hdf5", "parquet"]

ROWS = 256  # written at a time


def unpack(
    folder: Path | str,
    out: Path | str,
    form: Format,
    *,
    split: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the samples of a survey in another format.

    Args:
        folder: The survey.
        out: The file to write (HDF5, Parquet) or the folder (FITS); must not exist.
        form: "fits", "hdf5" or "parquet".
        split: Only of this split.
        progress: Told the samples of each piece that is written.

    Returns:
        Samples written.

    Raises:
        BadSample: A sample is corrupt; nothing is left under `out`.
        FileExistsError: There is something in the way.
        ValueError: There is no such format or split.
    """
    check_choice("format", form, Format)
    source = PackedSurvey(folder, split)
    target = Path(out)
    if target.exists():
        raise FileExistsError(f"{target}: exists already; choose another place or delete it")
    write = {"fits": _write_fits, "hdf5": _write_hdf5, "parquet": _write_parquet}[form]
    with exclusive_file(target), atomic_path(target) as temporary:
        write(source, temporary, progress or (lambda _: None))
    return len(source)


def description(source: PackedSurvey) -> dict[str, Any]:
    """What a survey is, beside its samples, and the types of its labels, as JSON."""
    types = {name: "string" if pa.types.is_string(source.catalog[name].type) else "float64" for name in source.labels}
    return {"survey": replace(source.survey, shards=(), catalog_sha256="").to_json(), "types": types}


def _pieces(source: PackedSurvey) -> Iterator[tuple[int, list[Sample]]]:
    for start in range(0, len(source), ROWS):
        yield start, [source.read(i) for i in range(start, min(start + ROWS, len(source)))]


def _image(sample: Sample) -> np.ndarray | None:
    """The image with NaN where there is no data."""
    if sample.image is None or sample.valid is None:
        return sample.image
    return np.where(sample.valid, sample.image, np.float32(np.nan))


def _write_fits(source: PackedSurvey, folder: Path, progress: Callable[[int], None]) -> None:
    from astropy.io import fits

    folder.mkdir()
    survey = source.survey
    write_json(folder / "export.json", description(source))
    with open(folder / "labels.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["file", "split", "ra", "dec", *survey.labels])
        for _, samples in _pieces(source):
            for sample in samples:
                blank = {name: "" if v != v else v for name, v in sample.labels.items()}
                place = ["" if math.isnan(v) else repr(v) for v in (sample.ra, sample.dec)]
                writer.writerow([sample.key, sample.split, *place, *blank.values()])
                hdus: list[Any] = [fits.PrimaryHDU(_image(sample), header=_header(sample, survey))]
                if sample.spectrum is not None and survey.spectrum is not None:
                    columns = [
                        fits.Column("WAVE", "D", "angstrom", array=survey.spectrum.grid.angstrom()),
                        fits.Column("FLUX", "E", array=sample.spectrum.flux),
                        fits.Column("IVAR", "E", array=sample.spectrum.ivar),
                    ]
                    table = fits.BinTableHDU.from_columns(columns, name="SPECTRUM")
                    table.header["FLUXUNIT"] = survey.spectrum.unit
                    if sample.spectrum.step is not None:
                        table.header["FLUXSTEP"] = (sample.spectrum.step, "quantisation of FLUX")
                    hdus.append(table)
                for vector in survey.vectors:
                    if vector.name in sample.vectors:
                        columns = [
                            fits.Column("COMPONENT", f"{max(map(len, vector.components))}A", array=vector.components),
                            fits.Column("VALUE", "E", array=sample.vectors[vector.name]),
                        ]
                        table = fits.BinTableHDU.from_columns(columns, name=vector.name.upper())
                        table.header["VALUNIT"], table.header["VECTOR"] = vector.unit, vector.name
                        hdus.append(table)
                hdus[0].header["NEXTEND"] = (len(hdus) - 1, "HDUs behind this one")
                fits.HDUList(hdus).writeto(folder / f"{sample.key}.fits")
            progress(len(samples))


def _header(sample: Sample, survey: Survey) -> Any:
    """Bands, unit, position and scale of an image; north up, east left, the position in its centre."""
    from astropy.io import fits

    header = fits.Header()
    header["OBJECT"] = sample.key
    if sample.image is None:
        return header
    header["BUNIT"] = survey.unit
    header["ZEROMISS"] = (False, "zeros are data, NaN is none")
    if survey.pixel_scale_arcsec is not None:
        header["PIXSCALE"] = (survey.pixel_scale_arcsec, "arcsec a pixel")
    for i, band in enumerate(survey.bands):
        header[f"BAND{i}"] = band
    if survey.pixel_scale_arcsec is not None and not math.isnan(sample.ra):
        degrees = survey.pixel_scale_arcsec / 3600
        header.update({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": sample.ra, "CRVAL2": sample.dec})
        header.update({"CRPIX1": (survey.width + 1) / 2, "CRPIX2": (survey.height + 1) / 2})
        header.update({"CDELT1": -degrees, "CDELT2": degrees, "CUNIT1": "deg", "CUNIT2": "deg"})
    return header


def _write_hdf5(source: PackedSurvey, path: Path, progress: Callable[[int], None]) -> None:
    survey, count = source.survey, len(source)

    def chunked(file: Any, name: str, shape: tuple[int, ...]) -> Any:
        nan = np.float32(np.nan)
        return file.create_dataset(name, (count, *shape), "f4", chunks=(1, *shape), fillvalue=nan, compression="lzf")

    with h5py.File(path, "w") as file:
        file.attrs.update({"survey": survey.name, "unit": survey.unit, "bands": list(survey.bands)})
        file.attrs[EXPORT] = json.dumps(description(source))
        if survey.bands:
            images = chunked(file, "images", (len(survey.bands), survey.height, survey.width))
        if survey.spectrum is not None:
            wave = survey.spectrum.grid.angstrom()
            file["wave"] = wave
            flux, ivar = chunked(file, "flux", wave.shape), chunked(file, "ivar", wave.shape)
            flux.attrs["unit"] = survey.spectrum.unit
            steps = file.create_dataset("flux_step", (count,), "f8", fillvalue=np.nan)
        vectors = {}
        for vector in survey.vectors:
            vectors[vector.name] = chunked(file, f"vectors/{vector.name}", (vector.size,))
            vectors[vector.name].attrs.update({"components": list(vector.components), "unit": vector.unit})
        for start, samples in _pieces(source):
            for row, sample in enumerate(samples, start):
                if sample.image is not None:
                    images[row] = _image(sample)
                if sample.spectrum is not None:
                    flux[row], ivar[row] = sample.spectrum.flux, sample.spectrum.ivar
                    steps[row] = sample.spectrum.step or np.nan
                for name, values in sample.vectors.items():
                    vectors[name][row] = values
            progress(len(samples))
        for name in ("key", "split", "ra", "dec", "source", *survey.labels):
            column = source.catalog[name]
            if pa.types.is_string(column.type):
                file.create_dataset(f"catalog/{name}", data=column.to_pylist(), dtype=h5py.string_dtype())
            else:
                file[f"catalog/{name}"] = column.to_numpy()
        for name, meaning in survey.labels.items():
            file[f"catalog/{name}"].attrs["meaning"] = meaning


def _write_parquet(source: PackedSurvey, path: Path, progress: Callable[[int], None]) -> None:
    survey = source.survey
    names = ["key", "split", "ra", "dec", "source", *survey.labels]
    fields = [source.catalog.schema.field(name) for name in names]
    arrays: dict[str, Callable[[Sample], np.ndarray | None]] = {}
    meta = {"survey": survey.name, "bands": " ".join(survey.bands), "unit": survey.unit}
    named: dict[str, str] = {}  # column of each array; labels keep their names

    def column(array: str) -> str:
        free = array.removeprefix("vectors/")
        while free in names or free in arrays:
            free += "_array"
        return named.setdefault(array, free)

    if survey.bands:
        arrays[column("image")] = _image
        meta["image_shape"] = f"{len(survey.bands)} {survey.height} {survey.width}"
    if survey.spectrum is not None:
        arrays[column("flux")] = lambda s: None if s.spectrum is None else s.spectrum.flux
        arrays[column("ivar")] = lambda s: None if s.spectrum is None else s.spectrum.ivar
        arrays[column("flux_step")] = lambda s: None if s.spectrum is None else np.array([s.spectrum.step or np.nan])
        meta["wave"] = " ".join(f"{w:.10g}" for w in survey.spectrum.grid.angstrom())
    for vector in survey.vectors:
        arrays[column(f"vectors/{vector.name}")] = (
            lambda s, name=vector.name: s.vectors.get(name)  # type: ignore[misc]
        )
        meta[f"{vector.name}_components"] = " ".join(vector.components)
    fields += [pa.field(name, pa.list_(pa.float32())) for name in arrays]
    meta[EXPORT] = json.dumps(description(source) | {"arrays": named})
    schema = pa.schema(fields, metadata=meta)
    with pq.ParquetWriter(path, schema) as writer:
        for start, samples in _pieces(source):
            columns = [source.catalog[name].slice(start, len(samples)).combine_chunks() for name in names]
            for take in arrays.values():
                values = [None if (v := take(s)) is None else v.ravel() for s in samples]
                columns.append(pa.array(values, pa.list_(pa.float32())))
            writer.write_table(pa.table(columns, schema=schema))
            progress(len(samples))
