import gzip
import pickle

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import WaveGrid
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.resample import pixel_edges, resample
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.desi import DESI_GRID
from armillary.engine.data.sources.surveys.sdss import SDSS_GRID, SdssSpectra

OLD_NAMES = {"Z_ERR": "ZERR", "PLUG_RA": "RA", "PLUG_DEC": "DEC"}
H_ALPHA, OII = 6564.61, 3728.8  # vacuum, angstrom; OII is a doublet, 3727.1 and 3729.9
IDENTITY = 4565525861424406528


def write(path, *, first=35805, pixels=600, seed=0, old=False, pixel=None, row=None, header=None, rows=1):
    """A file in the published layout; `pixel` and `row` replace columns (None leaves one out)."""
    rng = np.random.default_rng(seed)
    coadd = {
        "flux": rng.normal(5, 1, pixels).astype(np.float32),
        "loglam": ((first + np.arange(pixels)) * 1e-4).astype(np.float32),
        "ivar": rng.uniform(0.5, 2, pixels).astype(np.float32),
        "and_mask": np.zeros(pixels, np.int32),
        "or_mask": np.full(pixels, 1 << 24, np.int32),
        "wdisp": np.ones(pixels, np.float32),
        "sky": np.ones(pixels, np.float32),
        "model": np.ones(pixels, np.float32),
    }
    coadd["ivar"][50:53] = 0
    coadd["flux"][50:51] = np.nan
    coadd["and_mask"][60:61], coadd["and_mask"][61:62] = 1 << 22, 1 << 23
    coadd |= pixel or {}
    spec = {
        "PLATE": np.int32(266),
        "MJD": np.int32(51602),
        "FIBERID": np.int32(seed + 1),
        "SPECOBJID": np.uint64(IDENTITY + seed),
        "BESTOBJID": "1237648720142401611",
        "OBJID": np.arange(5, dtype=np.int32),
        "PLUG_RA": 146.5 + seed,
        "PLUG_DEC": -0.5,
        "CLASS": "GALAXY",
        "SUBCLASS": "STARFORMING ",
        "Z": np.float32(0.125),
        "Z_ERR": np.float32(1e-5),
        "ZWARNING": np.int32(4),
        "Z_NOQSO": np.float32(0),
        "CLASS_NOQSO": "",
        "SN_MEDIAN_ALL": np.float32(9.5),
    } | (row or {})
    if old:
        coadd = {name.upper(): values for name, values in coadd.items()}
        spec = {OLD_NAMES.get(name, name): value for name, value in spec.items()}
    primary = fits.PrimaryHDU()
    primary.header.update({"BUNIT": "1E-17 erg/cm^2/s/Ang", "VACUUM": True} | (header or {}))
    tables = [{n: v for n, v in coadd.items() if v is not None}]
    tables += [{n: [v] * rows for n, v in spec.items() if v is not None}]
    hdus = [primary, *(fits.table_to_hdu(Table(t)) for t in tables), fits.BinTableHDU()]
    if not old:
        for hdu, name in zip(hdus[1:], ("COADD", "SPECOBJ", "SPZLINE"), strict=True):
            hdu.name = name
    path.parent.mkdir(parents=True, exist_ok=True)
    fits.HDUList(hdus).writeto(path)
    return coadd


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "spectra"
    one = write(root / "0266" / "spec-0266-51602-0001.fits")
    two = write(root / "0266" / "spec-0266-51602-0002.fits.gz", seed=1, first=36000, pixels=700, old=True)
    return root, one, two


def test_lattice_is_copied(folder):
    source = pickle.loads(pickle.dumps(SdssSpectra(folder[0])))
    assert len(source) == 2 and source.spectrum.grid == SDSS_GRID and source.spectrum.unit.startswith("1e-17 erg")
    for index, (stored, first) in enumerate(((folder[1], 305), (folder[2], 500))):
        stored = {name.lower(): values for name, values in stored.items()}
        sample = source.read(index)
        flux, ivar = np.zeros(4701, np.float32), np.zeros(4701, np.float32)
        flux[first:][: len(stored["flux"])] = stored["flux"]
        ivar[first:][: len(stored["flux"])] = stored["ivar"]
        ivar[first + 60] = 0  # NOSKY; BRIGHTSKY beside it stays
        flux[ivar == 0] = 0
        np.testing.assert_array_equal(sample.spectrum.flux, flux)
        np.testing.assert_array_equal(sample.spectrum.ivar, ivar)
        assert sample.spectrum.flux.dtype == np.float32 and sample.spectrum.flux.dtype.isnative
    with pytest.raises(IndexError, match="file 2: this source has 2"):
        source.read(2)


def test_labels_of_old_and_new_names(folder):
    source = SdssSpectra(folder[0])
    for index in range(2):
        sample = source.read(index)
        assert sample.key == f"0266-51602-{index + 1:04d}" and (sample.ra, sample.dec) == (146.5 + index, -0.5)
        assert set(sample.labels) == set(source.labels)
        labels = sample.labels
        assert labels["redshift"] == 0.125 and labels["zerr"] == pytest.approx(1e-5) and labels["zwarning"] == 4
        assert (labels["class"], labels["subclass"]) == ("GALAXY", "STARFORMING")
        assert labels["specobjid"] == str(IDENTITY + index) and labels["objid"] == "1237648720142401611"
        assert np.isnan(labels["z_noqso"])
        assert (labels["plate"], labels["mjd"], labels["fiberid"]) == (266, 51602, index + 1)


def test_description_agrees_with_reading(folder):
    source = SdssSpectra(folder[0])
    rows = source.describe(0, 2)
    for i, key in enumerate(rows.keys):
        sample = source.read(i)
        assert (key, rows.columns["ra"][i], rows.columns["dec"][i]) == (sample.key, sample.ra, sample.dec)
        for name, value in sample.labels.items():
            assert isinstance(rows.columns[name], list) == isinstance(value, str)
            np.testing.assert_equal(rows.columns[name][i], value)
    assert source.describe(1, 1).keys == []


def test_optional_columns_and_other_names(tmp_path):
    row = dict.fromkeys(("SUBCLASS", "SPECOBJID", "BESTOBJID", "PLATE", "SN_MEDIAN_ALL", "CLASS_NOQSO"))
    write(tmp_path / "spec-015143-59205-4544940698.fits", row=row, pixel={"and_mask": None})
    sample = SdssSpectra(tmp_path).read(0)
    assert sample.key == "015143-59205-4544940698"
    assert (sample.labels["subclass"], sample.labels["specobjid"], sample.labels["objid"]) == ("", "", "")
    assert np.isnan(sample.labels["plate"]) and sample.labels["z_noqso"] == 0
    assert sample.spectrum.ivar[305 + 60] > 0


def test_mask_bits(tmp_path):
    write(tmp_path / "spec-0266-51602-0001.fits")
    place = slice(305 + 60, 305 + 62)
    assert (SdssSpectra(tmp_path, mask_bits=()).read(0).spectrum.ivar[place] > 0).all()
    assert not SdssSpectra(tmp_path, mask_bits=(22, 23)).read(0).spectrum.ivar[place].any()


def test_pixels_left_out_of_the_lattice(tmp_path):
    loglam = np.delete((35805 + np.arange(603)) * 1e-4, [200, 201, 202]).astype(np.float32)
    stored = write(tmp_path / "spec-0266-51602-0001.fits", pixel={"loglam": loglam})
    spectrum = SdssSpectra(tmp_path).read(0).spectrum
    assert not spectrum.ivar[505:508].any()
    np.testing.assert_array_equal(spectrum.flux[508:908], stored["flux"][200:])


def test_wavelengths_off_the_lattice_are_rebinned(tmp_path):
    loglam = 3.6 + 0.7e-4 * np.arange(600)
    write(tmp_path / "spec-0266-51602-0001.fits", pixel={"loglam": loglam, "flux": np.full(600, 2.0)})
    spectrum = SdssSpectra(tmp_path).read(0).spectrum
    np.testing.assert_allclose(spectrum.flux[spectrum.ivar > 0], 2, rtol=1e-6)
    assert 415 < (spectrum.ivar > 0).sum() <= 421


def test_other_grids(tmp_path):
    write(tmp_path / "spec-0266-51602-0001.fits")
    source = SdssSpectra(tmp_path, grid=("linear", 3600.0, 0.8, 7781))
    assert source.spectrum.grid == DESI_GRID
    found, native = source.read(0).spectrum, SdssSpectra(tmp_path).read(0).spectrum
    flux, ivar = resample(native.flux, native.ivar, SDSS_GRID, DESI_GRID)
    np.testing.assert_allclose(found.flux, flux, rtol=1e-5)
    np.testing.assert_allclose(found.ivar, ivar, rtol=1e-5)
    assert found.ivar[500:900].all() and not found.ivar[-6000:].any()
    assert source.inputs() == SdssSpectra(tmp_path).inputs() != SdssSpectra(tmp_path, mask_bits=()).inputs()


def test_round_trip(folder, tmp_path):
    source = SdssSpectra(folder[0])
    build(source, tmp_path / "packed", name="sdss", progress=False)
    check_round_trip(source, PackedSurvey(tmp_path / "packed"))


def check_round_trip(source, back):
    """Equal to within what `spectra` states: half of sigma_10 / 8 in flux, half of 1/32 in log2(ivar)."""
    assert len(source) == len(back) and back.survey.spectrum.grid == source.spectrum.grid
    originals = {(s := source.read(i)).key: s for i in range(len(source))}
    for i in range(len(back)):
        sample = back.read(i)
        original = originals[sample.key]
        seen = original.spectrum.ivar > 0
        np.testing.assert_array_equal(sample.spectrum.ivar > 0, seen)
        half_step = np.percentile(original.spectrum.ivar[seen].astype(float) ** -0.5, 10) / 16
        rounding = np.abs(original.spectrum.flux).max() * 1e-6
        assert np.abs(sample.spectrum.flux - original.spectrum.flux).max() <= half_step + rounding
        assert np.abs(np.log2(sample.spectrum.ivar[seen] / original.spectrum.ivar[seen])).max() <= 1 / 64 + 1e-5
        assert sample.labels == pytest.approx(original.labels, nan_ok=True)
        assert (sample.ra, sample.dec) == (original.ra, original.dec)


def line(wave, flux, expected):
    """Centroid (angstrom) and flux (1e-17 erg/s/cm2) of an emission line above the median around it."""
    width = np.diff(pixel_edges(wave))
    core = np.abs(wave - expected) < 8
    excess = (flux - np.median(flux[np.abs(wave - expected) < 40]))[core] * width[core]
    return (excess * wave[core]).sum() / excess.sum(), excess.sum()


@pytest.mark.parametrize("grid", [SDSS_GRID, DESI_GRID], ids=["log", "linear"])
@pytest.mark.parametrize(
    ("key", "rest"),
    [("0266-51602-0107", H_ALPHA), ("0266-51602-0107", OII), ("0266-51602-0001", H_ALPHA)],
    ids=["H-alpha", "[OII]", "H-alpha nearby"],
)
def test_lines_of_real_galaxies_are_where_their_redshift_says(real_data, key, rest, grid):
    path = real_data / "sdss_spectra" / f"spec-{key}.fits.gz"
    sample = SdssSpectra(path, grid=grid).read(0)
    expected = rest * (1 + sample.labels["redshift"])
    centre, flux = line(grid.angstrom(), sample.spectrum.flux, expected)
    assert abs(centre / expected - 1) * 299792 < 50  # km/s: the lines are 150 wide and a pixel of SDSS is 69
    with fits.open(path) as hdus:
        stored = hdus["COADD"].data
        native = line(10.0 ** stored["loglam"].astype(float), stored["flux"].astype(float), expected)
    assert centre == pytest.approx(native[0], abs=0.2) and flux == pytest.approx(native[1], rel=0.05)


def test_all_real_spectra_agree_with_their_files(real_data):
    source = SdssSpectra(real_data / "sdss_spectra")
    rows = source.describe(0, len(source))
    assert len(source) == 22 and not rows.bad and len(set(rows.keys)) == 22
    assert rows.columns["class"].count("GALAXY") == 9 and rows.columns["class"].count("STAR") == 1
    assert all(text.isdigit() for text in rows.columns["specobjid"] + rows.columns["objid"])
    for index, path in enumerate(source.files):
        sample = source.read(index)
        with fits.open(path) as hdus:
            coadd = hdus[1].data
            place = np.rint(coadd["loglam"].astype(float) * 1e4).astype(int) - 35500
            good = (coadd["ivar"] > 0) & (coadd["and_mask"] & (1 << 22 | 1 << 24) == 0)
            np.testing.assert_array_equal(sample.spectrum.flux[place[good]], coadd["flux"][good])
            np.testing.assert_array_equal(sample.spectrum.ivar[place], np.where(good, coadd["ivar"], 0))
            assert (sample.spectrum.ivar > 0).sum() == good.sum()
            if index % 7 == 0:  # astropy takes its time with 240 columns
                row = hdus[2].data
                assert sample.labels["redshift"] == row["Z"][0] and sample.labels["class"] == row["CLASS"][0].strip()
                assert (sample.ra, sample.dec) == (row["PLUG_RA"][0], row["PLUG_DEC"][0])


@pytest.mark.parametrize("grid", [SDSS_GRID, DESI_GRID], ids=["log", "linear"])
def test_round_trip_of_real_spectra(real_data, tmp_path, grid):
    files = sorted((real_data / "sdss_spectra").glob("spec-*"))
    source = SdssSpectra(files if grid is SDSS_GRID else files[::4], grid=grid)
    build(source, tmp_path / "packed", name="sdss", progress=False)
    check_round_trip(source, PackedSurvey(tmp_path / "packed"))


def test_flux_of_real_spectra_is_conserved(real_data):
    native, fine = (SdssSpectra(real_data / "sdss_spectra", grid=g) for g in (SDSS_GRID, DESI_GRID))
    for index in (1, 8, 21):
        totals = []
        for source, grid in ((native, SDSS_GRID), (fine, DESI_GRID)):
            wave = grid.angstrom()
            spectrum = source.read(index).spectrum
            width = np.diff(pixel_edges(wave, log=grid.kind == "log10"))
            inside = (wave > 5000) & (wave < 7000)
            totals.append((spectrum.flux * width)[inside].sum())
        assert totals[1] == pytest.approx(totals[0], rel=2e-3)  # the ends are cut at whole pixels


def spoiled(values, place, value):
    values = values.copy()
    values[place] = value
    return values


LOGLAM = ((35805 + np.arange(600)) * 1e-4).astype(np.float32)
PIXELS = [
    ("nan wavelength", {"loglam": spoiled(LOGLAM, 7, np.nan)}, "column 'loglam': pixel 7 is not finite"),
    ("unordered", {"loglam": spoiled(LOGLAM, 7, 3.59)}, "column 'loglam': must increase, and does not at pixel 8"),
    ("angstrom", {"loglam": 10**LOGLAM}, "column 'loglam': .* is no log10 of optical wavelengths"),
    ("negative ivar", {"ivar": spoiled(np.ones(600), 5, -1.0)}, "column 'ivar': pixel 5 is -1"),
    ("no data", {"ivar": np.zeros(600)}, "no pixel carries data on the grid"),
]
LAYOUTS = [
    ("no flux", {"pixel": {"flux": None}}, "column 'flux' of HDU COADD: missing; it has LOGLAM"),
    ("no loglam", {"pixel": {"loglam": None}}, "column 'loglam' of HDU COADD: missing"),
    ("no redshift", {"row": {"Z": None}}, "column 'Z' of HDU SPECOBJ: missing"),
    ("no error", {"row": {"Z_ERR": None}}, r"column 'Z_ERR' of HDU SPECOBJ: missing \(nor ZERR\)"),
    ("no position", {"row": {"PLUG_DEC": None}}, r"column 'PLUG_DEC' of HDU SPECOBJ: missing \(nor DEC\)"),
    ("text redshift", {"row": {"Z": "high"}}, "column 'Z' of HDU SPECOBJ: holds '4A', not numbers"),
    (
        "vector redshift",
        {"row": {"Z": np.ones(3)}},
        "column 'Z' of HDU SPECOBJ: holds '3D', and must hold one value a row",
    ),
    ("ra", {"row": {"PLUG_RA": 361.0}}, r"column 'PLUG_RA': 361.0 is outside \[0, 360\]"),
    ("dec", {"row": {"PLUG_DEC": -90.5}}, r"column 'PLUG_DEC': -90.5 is outside \[-90, 90\]"),
    ("other fibre", {"row": {"FIBERID": np.int32(8)}}, r"say \(266, 51602, 8\), the file's name says otherwise"),
    ("two rows", {"rows": 2}, r"HDU 2 \(SPECOBJ\): it has 2 rows, and must have one"),
    ("unit", {"header": {"BUNIT": "erg/cm^2/s/Hz"}}, "BUNIT: its unit is 'erg/cm.2/s/Hz', and must be 1e-17 erg"),
    ("air", {"header": {"VACUUM": False}}, "its wavelengths are those of air"),
    ("no pixels", {"pixels": 0}, r"HDU 1 \(COADD\): it has 0 rows, and must have one a pixel"),
]


@pytest.mark.parametrize(("changes", "match"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS])
def test_wrong_layouts_show_when_described(tmp_path, changes, match):
    write(tmp_path / "spec-0266-51602-0001.fits", **changes)
    write(tmp_path / "spec-0266-51602-0002.fits", seed=1)
    source = SdssSpectra(tmp_path)
    rows = source.describe(0, 2)
    assert list(rows.bad) == [0] and rows.columns["redshift"][1] == 0.125
    with pytest.raises(BadSample, match=rf"spec-0266-51602-0001\.fits: .*{match}") as error:
        source.read(0)
    assert str(error.value) == rows.bad[0]


def test_build_stops_before_packing_or_skips(tmp_path):
    write(tmp_path / "spec-0266-51602-0001.fits", row={"Z": None})
    write(tmp_path / "spec-0266-51602-0002.fits", seed=1)
    source = SdssSpectra(tmp_path)
    with pytest.raises(BadSample, match=r"0001\.fits: column 'Z' of HDU SPECOBJ: missing"):
        build(source, tmp_path / "out", name="x", progress=False)
    survey = build(source, tmp_path / "out", name="x", progress=False, on_bad="skip", test_fraction=0)
    assert survey.count() == 1


@pytest.mark.parametrize(("pixel", "match"), [case[1:] for case in PIXELS], ids=[case[0] for case in PIXELS])
def test_wrong_pixels(tmp_path, pixel, match):
    write(tmp_path / "spec-0266-51602-0001.fits", pixel=pixel)
    with pytest.raises(BadSample, match=rf"spec-0266-51602-0001\.fits: {match}"):
        SdssSpectra(tmp_path).read(0)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.8])
@pytest.mark.parametrize("suffix", [".fits", ".fits.gz"])
def test_truncated_file(tmp_path, share, suffix):
    write(tmp_path / "whole.fits")
    data = (tmp_path / "whole.fits").read_bytes()
    data = gzip.compress(data) if suffix == ".fits.gz" else data
    (tmp_path / f"spec-0266-51602-0001{suffix}").write_bytes(data[: int(share * len(data))])
    source = SdssSpectra(tmp_path)
    assert list(source.describe(0, 1).bad) == [0]
    with pytest.raises(BadSample, match=r"spec-0266-51602-0001\.fits.*: (not readable|. HDUs|HDU .* truncated)"):
        source.read(0)


def test_byte_swapped_pixels_are_not_taken_for_spectra(tmp_path):
    write(tmp_path / "a.fits")
    with fits.open(tmp_path / "a.fits") as hdus:
        raw = hdus[1].data.copy()
        for name in ("flux", "loglam", "ivar"):
            raw[name] = raw[name].astype(">f4").byteswap()
        hdus[1] = fits.BinTableHDU(raw, name="COADD")
        hdus.writeto(tmp_path / "spec-0266-51602-0001.fits")
    with pytest.raises(BadSample, match=r"spec-0266-51602-0001\.fits: column '(loglam|ivar)'"):
        SdssSpectra(tmp_path).read(0)


def test_missing_empty_and_twice(tmp_path):
    with pytest.raises(ValueError, match="no spectrum files in it"):
        SdssSpectra(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"spec-0\.fits: no such spectrum file"):
        SdssSpectra(tmp_path / "spec-0.fits")
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.ones(3)), fits.ImageHDU(np.ones(3))]).writeto(
        tmp_path / "spec-1-2-3.fits"
    )
    with pytest.raises(BadSample, match=r"spec-1-2-3\.fits: HDU .* is no table but ImageHDU"):
        SdssSpectra(tmp_path).read(0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "spec-1-2-3.fits.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"spec-1-2-3\.fits.*: it is the same spectrum as .*; keep one"):
        SdssSpectra(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mask_bits": (32,)}, "mask_bits: must be within 0 and 31"),
        ({"coverage": 0.0}, "coverage: must be above 0"),
        ({"grid": ("log10", 3.5, -1e-4, 100)}, "wavelengths must be positive, finite and increasing"),
    ],
    ids=["bits", "coverage", "grid"],
)
def test_wrong_options(folder, options, match):
    with pytest.raises(ValueError, match=match):
        SdssSpectra(folder[0], **options)


def test_default_grid_holds_both_spectrographs():
    assert SDSS_GRID.angstrom()[0] < 3560 and SDSS_GRID.angstrom()[-1] > 10400
    assert WaveGrid.of(SDSS_GRID.angstrom()).kind == "log10"
