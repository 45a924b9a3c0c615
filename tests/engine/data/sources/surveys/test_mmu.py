import pickle

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import WaveGrid
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.mmu import SDSS_GRID, MultimodalUniverse, place_on_grid

FIRST_ID = 39627640566453260  # float64 cannot tell it from its neighbours
DESI = (3600 + 0.8 * np.arange(7781)).astype(np.float32)
HSC = ("hsc-g", "hsc-r", "hsc-i", "hsc-z", "hsc-y")
DES = ("des-g", "des-r", "des-i", "des-z")


def catalog(count, first=0):
    rng = np.random.default_rng(first)
    return {
        "object_id": FIRST_ID + first + np.arange(count),
        "ra": rng.uniform(0, 360, count),
        "dec": rng.uniform(-90, 90, count),
        "healpix": np.full(count, 583),
        "Z": rng.uniform(0, 1, count),
        "TYPE": np.array([b"DEV", b"SER", b"EXP"])[np.arange(count) % 3],
        "SPECTROFLUX": rng.uniform(0, 9, (count, 5)),  # not one value a row
    }


def images(count, first=0, bands=HSC, size=14, name="image_array"):
    rng = np.random.default_rng(first)
    shape = (count, len(bands), size, size)
    return {
        name: rng.normal(0, 0.1, shape).astype(np.float32),
        "image_band": np.tile(np.array([b.encode() for b in bands]), (count, 1)),
        "image_ivar": rng.uniform(50, 150, shape).astype(np.float32),
        "image_mask": np.ones(shape, bool),
        "image_psf_fwhm": np.ones((count, len(bands)), np.float32),
        "image_scale": np.full((count, len(bands)), 0.168, np.float32),
    }


def spectra(count, first=0, wave=DESI):
    rng = np.random.default_rng(first)
    shape = (count, len(wave))
    return {
        "spectrum_flux": rng.normal(3, 1, shape).astype(np.float32),
        "spectrum_ivar": rng.uniform(0.5, 2, shape).astype(np.float32),
        "spectrum_lambda": np.tile(wave, (count, 1)),
        "spectrum_mask": np.zeros(shape, bool),
        "spectrum_lsf_sigma": np.ones(shape, np.float32),
    }


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in data.items():
            if values is not None:
                file[name] = values


def put_parquet(path, data, of_structs, quoted=True):
    """The same in Parquet: images as a list of structs or as a struct of lists."""
    count = len(data["object_id"])
    columns = {}
    parts = ("band", "flux", "ivar", "mask", "psf_fwhm", "scale")
    if "image_array" in data:
        stored = {part: data["image_array" if part == "flux" else f"image_{part}"] for part in parts}
        stored["band"] = stored["band"].astype(str)
        cube = {"flux": pa.float32(), "ivar": pa.float32(), "mask": pa.bool_()}
        kinds = {p: pa.list_(pa.list_(cube[p])) if p in cube else None for p in parts}
        kinds |= {"band": pa.string(), "psf_fwhm": pa.float32(), "scale": pa.float32()}
        if of_structs:
            kind = pa.list_(pa.struct([(p, kinds[p]) for p in parts]))
            bands = range(stored["band"].shape[1])
            rows = [[{p: stored[p][i, b].tolist() for p in parts} for b in bands] for i in range(count)]
        else:
            kind = pa.struct([(p, pa.list_(kinds[p])) for p in parts])
            rows = [{p: stored[p][i].tolist() for p in parts} for i in range(count)]
        columns["image"] = pa.array(rows, kind)
    if "spectrum_flux" in data:
        of = {"flux": pa.float32(), "ivar": pa.float32(), "lambda": pa.float32(), "mask": pa.bool_()}
        kind = pa.struct([(p, pa.list_(k)) for p, k in of.items()])
        columns["spectrum"] = pa.array([{p: data[f"spectrum_{p}"][i].tolist() for p in of} for i in range(count)], kind)
    for name, values in data.items():
        if values is not None and values.ndim == 1 and name != "object_id":
            columns[name] = pa.array([v.decode() for v in values] if values.dtype.kind == "S" else values)
    columns["object_id"] = pa.array([f"b'{v}'" if quoted else str(v) for v in data["object_id"]])
    columns["_healpix_29"] = pa.array(np.arange(count))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)


def test_images_of_a_healpix_tree(tmp_path):
    first, second = catalog(3) | images(3), catalog(2, 3) | images(2, 3)
    first["image_mask"][1, 2, 4, 5] = False
    first["image_ivar"][1, 0, :2] = 0
    first["image_array"][1, 1, 3, 3] = np.nan
    put(tmp_path / "pdr3" / "healpix=1" / "001-of-001.hdf5", first)
    put(tmp_path / "pdr3" / "healpix=2" / "001-of-001.hdf5", second)
    source = pickle.loads(pickle.dumps(MultimodalUniverse(tmp_path)))
    assert len(source) == 5 and source.bands == HSC and source.unit == "10^(-0.4 (AB - 27))"
    assert source.pixel_scale_arcsec == 0.168 and source.spectrum is None
    np.testing.assert_array_equal(source.read(4).image, second["image_array"][1])
    assert source.read(4).source == "healpix=2/001-of-001.hdf5:1"
    sample = source.read(1)
    bad = {(2, 4, 5), (1, 3, 3)} | {(0, y, x) for y in range(2) for x in range(14)}
    assert {tuple(place) for place in np.argwhere(~sample.valid).tolist()} == bad
    assert sample.key == sample.labels["object_id"] == str(FIRST_ID + 1)
    assert sample.labels["redshift"] == first["Z"][1] and sample.labels["type"] == "SER"
    assert (sample.ra, sample.dec) == (first["ra"][1], first["dec"][1])
    assert set(source.labels) == set(sample.labels) == {"redshift", "object_id", "healpix", "type"}
    inverted = MultimodalUniverse(tmp_path, mask_is_good=False, size=6)
    np.testing.assert_array_equal(np.argwhere(inverted.read(1).valid), [[2, 0, 1]])


def test_one_mask_for_all_bands_as_in_the_legacy_survey(tmp_path):
    data = catalog(2) | images(2, bands=DES, name="image_flux")
    data["image_mask"] = data["image_mask"][:, 0]
    data["image_mask"][1, 4, 5] = False
    data["object_id"] = np.array([b"1126p222-11", b"1126p222-12"])
    put(tmp_path / "a.hdf5", data)
    source = MultimodalUniverse(tmp_path)
    assert source.unit == "nanomaggy" and source.bands == DES
    sample = source.read(1)
    assert sample.key == "1126p222-12" and (~sample.valid).sum() == 4 and not sample.valid[:, 4, 5].any()


def test_desi_spectra(tmp_path):
    data = catalog(3) | spectra(3)
    data["spectrum_mask"][2, 5:9] = True
    data["spectrum_ivar"][2, 50] = 0
    data["spectrum_flux"][2, 51] = np.nan
    put(tmp_path / "edr_sv3" / "healpix=9" / "001-of-001.hdf5", data)
    source = pickle.loads(pickle.dumps(MultimodalUniverse(tmp_path)))
    grid = source.spectrum.grid
    assert (grid.kind, grid.count) == ("linear", 7781) and source.bands == ()
    np.testing.assert_allclose(grid.angstrom(), DESI, atol=1e-3)
    spectrum = source.read(2).spectrum
    assert np.flatnonzero(spectrum.ivar == 0).tolist() == [5, 6, 7, 8, 50, 51]
    seen = spectrum.ivar > 0
    np.testing.assert_array_equal(spectrum.flux[seen], data["spectrum_flux"][2][seen])
    np.testing.assert_array_equal(spectrum.ivar[seen], data["spectrum_ivar"][2][seen])


def test_sdss_spectra_share_a_grid(tmp_path):
    data = catalog(3) | spectra(3, wave=np.zeros(400, np.float32))
    starts, lengths = (3.58, 3.6213, 3.55), (400, 380, 399)
    data["spectrum_lambda"][:] = -1
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        data["spectrum_lambda"][row, :length] = 10 ** (start + 1e-4 * np.arange(length))
        data["spectrum_mask"][row, length:] = True
    put(tmp_path / "a.hdf5", data)
    source = MultimodalUniverse(tmp_path)
    assert source.spectrum.grid == SDSS_GRID
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        spectrum = source.read(row).spectrum
        at = round((start - SDSS_GRID.start) / 1e-4)
        expected = np.zeros(SDSS_GRID.count, np.float32)
        expected[at : at + length] = data["spectrum_flux"][row, :length]
        np.testing.assert_array_equal(spectrum.flux, expected)
        assert (spectrum.ivar > 0).sum() == length


@pytest.mark.parametrize("of_structs", [True, False], ids=["list of structs", "struct of lists"])
def test_parquet_holds_the_same(tmp_path, of_structs):
    pieces = [catalog(3) | images(3) | spectra(3), catalog(2, 3) | images(2, 3) | spectra(2, 3)]
    pieces[0]["image_mask"][1, 2, 4, 5] = False
    pieces[0]["spectrum_mask"][2, 5:9] = True
    for number, piece in enumerate(pieces):
        put(tmp_path / "hdf5" / f"healpix={number}" / "001-of-001.hdf5", piece)
        put_parquet(tmp_path / "hats" / "dataset" / "Norder=1" / "Dir=0" / f"Npix={number}.parquet", piece, of_structs)
    put_parquet(tmp_path / "hats" / "dataset" / "data_thumbnail.parquet", pieces[0], of_structs)
    (tmp_path / "hats" / "dataset" / "_metadata.parquet").write_bytes(b"")
    hdf5 = MultimodalUniverse(tmp_path / "hdf5", size=8)
    parquet = pickle.loads(pickle.dumps(MultimodalUniverse(tmp_path / "hats", size=8)))
    assert len(parquet) == 5 and parquet.labels == hdf5.labels and parquet.spectrum == hdf5.spectrum
    assert (parquet.bands, parquet.unit, parquet.pixel_scale_arcsec) == (HSC, hdf5.unit, 0.168)
    for i in (4, 1, 2, 0, 3):
        one, other = hdf5.read(i), parquet.read(i)
        assert one.key == other.key and one.labels == other.labels and (one.ra, one.dec) == (other.ra, other.dec)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(
            np.ones(1) if one.valid is None else one.valid, 1 if other.valid is None else other.valid
        )
        np.testing.assert_array_equal(one.spectrum.flux, other.spectrum.flux)
        np.testing.assert_array_equal(one.spectrum.ivar, other.spectrum.ivar)
    assert parquet.describe(1, 5).keys == hdf5.describe(1, 5).keys


def test_a_row_may_lack_its_image_or_spectrum(tmp_path):
    put_parquet(tmp_path / "a.parquet", catalog(3) | images(3) | spectra(3), True, quoted=False)
    table = pq.read_table(tmp_path / "a.parquet")
    for column, rows in (("image", (1, 2)), ("spectrum", (2,))):
        values = table[column].to_pylist()
        for row in rows:
            values[row] = None
        place = table.schema.get_field_index(column)
        table = table.set_column(place, column, pa.array(values, table.schema.field(column).type))
    pq.write_table(table, tmp_path / "a.parquet")
    source = MultimodalUniverse(tmp_path)
    assert source.read(0).image is not None and source.read(0).spectrum is not None
    assert source.read(1).image is None and source.read(1).spectrum is not None
    with pytest.raises(BadSample, match=r"a\.parquet: row 2: columns 'image' and 'spectrum': both are missing"):
        source.read(2)


def test_build_and_read_back(tmp_path):
    data = catalog(6) | images(6, bands=DES) | spectra(6)
    data["image_mask"][1, 2, 4, 5] = False
    put(tmp_path / "tree" / "healpix=1" / "001-of-001.hdf5", data)
    source = MultimodalUniverse(tmp_path / "tree")
    survey = build(source, tmp_path / "packed", name="mmu", progress=False)
    assert survey.modalities == ("image", "spectrum") and survey.bands == DES
    packed = PackedSurvey(tmp_path / "packed")
    originals = {source.read(i).key: source.read(i) for i in range(6)}
    for i in range(6):
        sample = packed.read(i)
        original = originals[sample.key]
        np.testing.assert_allclose(sample.image, original.image, atol=max(survey.step) * 0.51)
        assert (sample.valid is None) == (original.valid is None) and sample.labels == original.labels
        np.testing.assert_allclose(sample.spectrum.flux, original.spectrum.flux, atol=0.1)
        np.testing.assert_allclose(sample.spectrum.ivar, original.spectrum.ivar, rtol=0.011)


def changed(column, row, value, dtype=None):
    data = images(3) | spectra(3)
    values = data[column] if dtype is None else data[column].astype(dtype)
    values[row] = value
    return {column: values}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"object_id": None}, "column 'object_id' is missing"),
        ({"Z": np.ones(4)}, "column 'Z' has 4 rows, the others have 3"),
        ({"image_band": None}, "column 'image_band' is missing"),
        ({"image_band": images(3, bands=HSC[:4])["image_band"]}, r"column 'image_band' is \(3, 4\), must be rows x 5"),
        ({"image_band": images(3, bands=[f"jwst-f{k}" for k in range(5)])["image_band"]}, "row 0: .* give it: unit"),
        (changed("image_band", (0, 1), b"hsc-g"), "row 0: column 'image_band': .* must be 5 different names"),
        (changed("image_scale", (0, 1), 0.4), "row 0: column 'image_scale': .* one for all bands"),
        ({"image_ivar": np.ones((3, 5, 14, 13), np.float32)}, "column 'image_ivar' is .* must be rows x 5 x 14 x 14"),
        ({"image_array": np.ones((3, 5, 14, 14), int)}, "column 'image_array' is of type int64, must be floating"),
        ({"spectrum_lambda": None}, "column 'spectrum_lambda' is missing"),
        ({"spectrum_ivar": np.ones((3, 9), np.float32)}, r"column 'spectrum_ivar' is \(3, 9\), must be rows x 7781"),
        (changed("spectrum_lambda", (0, 8), np.nan), "row 0: column 'spectrum_lambda': .* finite, increasing"),
        (changed("spectrum_lambda", (0, 8), 3600), "row 0: column 'spectrum_lambda': .* finite, increasing"),
    ],
    ids=[
        "no identifiers",
        "long column",
        "no bands",
        "four bands",
        "unknown bands",
        "a band twice",
        "two scales",
        "ivar of another size",
        "whole numbers",
        "no wavelengths",
        "short ivar",
        "NaN wavelength",
        "falling wavelength",
    ],
)
def test_wrong_layouts(tmp_path, changes, match):
    put(tmp_path / "a.hdf5", catalog(3) | images(3) | spectra(3) | changes)
    with pytest.raises(ValueError, match=rf"a\.hdf5: {match}"):
        MultimodalUniverse(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (changed("image_band", (1, 4), b"hsc-n"), "column 'image_band': .* the survey has hsc-g hsc-r"),
        (changed("spectrum_lambda", (1, 7), np.nan), "column 'spectrum_lambda': pixel 7 is at nan angstrom"),
        (changed("spectrum_lambda", (1, 7), 3600), "column 'spectrum_lambda': pixel 7 is at 3600 angstrom"),
        (changed("spectrum_lambda", 1, DESI + 0.3), r"column 'spectrum_lambda': pixel 0 at 3600\.300 .* is not on the"),
        (changed("spectrum_lambda", 1, DESI + 8), r"column 'spectrum_lambda': pixel 7771 at .* is not on the survey's"),
        (changed("spectrum_ivar", 1, 0), "column 'spectrum_ivar': no pixel carries data"),
        ({"dec": np.array([0, 91, 0])}, r"column 'dec': 91.0 is outside \[-90, 90\]"),
    ],
    ids=["another band", "NaN wavelength", "falling", "between pixels", "beyond the grid", "no data", "declination"],
)
def test_unusable_rows(tmp_path, changes, match):
    put(tmp_path / "a.hdf5", catalog(3) | images(3) | spectra(3) | changes)
    source = MultimodalUniverse(tmp_path)
    source.read(0)
    with pytest.raises(BadSample, match=rf"a\.hdf5: row 1: {match}"):
        source.read(1)
    source.read(2)


def test_wrong_files(tmp_path):
    put(tmp_path / "a.hdf5", catalog(3) | images(3))
    put(tmp_path / "b.hdf5", catalog(3, 3) | images(3) | {"Z": None})
    with pytest.raises(ValueError, match=r"b\.hdf5: column 'Z' is missing or differs from that of .*a\.hdf5"):
        MultimodalUniverse(tmp_path)
    put(tmp_path / "b.hdf5", catalog(3, 3) | images(3, size=15))
    with pytest.raises(ValueError, match=r"b\.hdf5: column 'image' is missing or differs"):
        MultimodalUniverse(tmp_path)
    (tmp_path / "b.hdf5").write_bytes((tmp_path / "a.hdf5").read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"b\.hdf5: not a readable HDF5 file: .*truncated"):
        MultimodalUniverse(tmp_path)
    put(tmp_path / "b.hdf5", catalog(3))
    with pytest.raises(ValueError, match=r"b\.hdf5: neither images nor spectra in it"):
        MultimodalUniverse(tmp_path / "b.hdf5")
    put(tmp_path / "b.hdf5", catalog(0) | images(0))
    with pytest.raises(ValueError, match=r"b\.hdf5: column 'object_id' has no rows"):
        MultimodalUniverse(tmp_path / "b.hdf5")
    with pytest.raises(ValueError, match="size: must be within 1 and 14"):
        MultimodalUniverse(tmp_path / "a.hdf5", size=15)
    put_parquet(tmp_path / "c.parquet", catalog(2) | images(2), True)
    with pytest.raises(ValueError, match=r"c\.parquet: a folder must hold either"):
        MultimodalUniverse(tmp_path)


def test_wrong_parquet(tmp_path):
    put_parquet(tmp_path / "hats" / "data_thumbnail.parquet", catalog(2) | images(2), True)
    with pytest.raises(ValueError, match=r"hats: no HDF5 or Parquet files in it"):
        MultimodalUniverse(tmp_path / "hats")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"ra": [1.0]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'object_id' is missing; there is ra"):
        MultimodalUniverse(path)
    pq.write_table(pa.table({"object_id": ["1"], "spectrum": [{"flux": [1.0], "lambda": [1.0]}]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'spectrum\.ivar' is missing"):
        MultimodalUniverse(path)
    pq.write_table(pa.table({"object_id": ["1"], "image": [[1.0]]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'image\.band' is missing; 'image' is of type list"):
        MultimodalUniverse(path)
    ragged = [{"band": "hsc-g", "flux": [[1.0, 2.0], [3.0]]}]
    pq.write_table(pa.table({"object_id": ["1"], "image": [ragged]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: row 0: column 'image\.flux': lists of lengths \[2, 1\]"):
        MultimodalUniverse(path)
    put_parquet(path, catalog(3) | images(3), True)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
        MultimodalUniverse(path)


def test_real_sdss_spectra(real_data, tmp_path):
    """Spectra of both spectrographs in the layout of the SDSS files: cut, masked and padded as they are there."""
    tables = [fits.getdata(path, 1) for path in sorted((real_data / "sdss_spectra").glob("spec-*.fits*"))]
    tables = [{name.lower(): table[name] for name in table.names} for table in tables]
    count, longest = len(tables), max(len(table["flux"]) for table in tables)
    data = catalog(count) | {f"spectrum_{part}": np.zeros((count, longest), np.float32) for part in ("flux", "ivar")}
    data |= {
        "spectrum_lambda": np.full((count, longest), -1, np.float32),
        "spectrum_mask": np.ones((count, longest), bool),
    }
    for row, table in enumerate(tables):
        length = len(table["flux"])
        data["spectrum_flux"][row, :length] = table["flux"]
        data["spectrum_ivar"][row, :length] = table["ivar"]
        data["spectrum_lambda"][row, :length] = 10.0 ** table["loglam"]
        data["spectrum_mask"][row, :length] = (table["and_mask"] != 0) | (table["ivar"] <= 1e-6)
    put(tmp_path / "sdss" / "healpix=583" / "001-of-001.hdf5", data)
    source = MultimodalUniverse(tmp_path)
    assert count > 20 and source.spectrum.grid == SDSS_GRID
    wave = SDSS_GRID.angstrom()
    for row in range(count):
        spectrum = source.read(row).spectrum
        good = ~data["spectrum_mask"][row]
        seen = spectrum.ivar > 0
        np.testing.assert_array_equal(spectrum.flux[seen], data["spectrum_flux"][row][good])
        np.testing.assert_allclose(wave[seen], data["spectrum_lambda"][row][good], rtol=1e-6)
    survey = build(source, tmp_path / "packed", name="sdss", progress=False)
    assert survey.count() == count and survey.modalities == ("spectrum",)


def test_irregular_grid():
    table = np.cumsum(np.linspace(1, 3, 50)) + 4000
    grid = WaveGrid.of(table)
    assert grid.kind == "table"
    flux, ivar = place_on_grid(np.arange(5.0), np.ones(5), table[10:15], grid)
    assert flux[10:15].tolist() == [0, 1, 2, 3, 4] and ivar.sum() == 5
    for wave in (table[10:15] + 0.5, table[45:50] + 9, table[:5] - 1):
        with pytest.raises(ValueError, match="is not on the survey's grid of 50 pixels"):
            place_on_grid(np.arange(5.0), np.ones(5), wave, grid)
