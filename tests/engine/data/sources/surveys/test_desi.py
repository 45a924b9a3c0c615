import gzip
import pickle
import shutil

import numpy as np
import pytest
from astropy.io import fits
from desi_files import ARMS, FIRST, redshifts, write

from armillary.engine.data.building.build import build
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.source import BadSample
from armillary.engine.data.sources.surveys.desi import DESI_GRID, DesiCoadds


def expected(truth, row):
    """Arms joined pixel by pixel."""
    flux, ivar = np.zeros(DESI_GRID.count), np.zeros(DESI_GRID.count)
    for arm, (start, pixels) in ARMS.items():
        values, weights, mask = (part[row] for part in truth[arm])
        for i in range(pixels):
            if weights[i] > 0 and mask[i] == 0 and np.isfinite(values[i]):
                flux[start + i] += float(weights[i]) * float(values[i])
                ivar[start + i] += float(weights[i])
    return np.divide(flux, ivar, out=np.zeros_like(flux), where=ivar > 0), ivar


@pytest.fixture
def tree(tmp_path):
    """Part of a production: three files, two of them of other programs with a target in common."""
    root = tmp_path / "healpix"
    one = write(root / "sv3" / "bright" / "99" / "9999" / "coadd-sv3-bright-9999.fits", 4)
    two = write(root / "sv3" / "dark" / "99" / "9999" / "coadd-sv3-dark-9999.fits", 3, first=FIRST + 3, seed=1)
    three = write(
        root / "main" / "dark" / "100" / "10001" / "coadd-main-dark-10001.fits", 3, first=FIRST + 50, seed=2,
        tables={"EBV": None, "SV3_DESI_TARGET": np.arange(3), "COADD_FIBERSTATUS": np.array([0, 8, 0], np.int32)},
        redrock={"TARGETID": FIRST + np.array([52, 50, 51]), "SUBTYPE": None}, compressed=True,
    )  # fmt: skip
    return root, one, two, three


def test_arms_are_joined(tree):
    root, one, two, three = tree
    source = pickle.loads(pickle.dumps(DesiCoadds(root)))
    assert len(source) == 9 and source.bands == ()
    assert source.spectrum.grid.count == 7781 and source.spectrum.grid.angstrom()[-1] == pytest.approx(9824)
    for index, truth, row in ((0, three, 0), (1, three, 2), (2, one, 0), (5, one, 3), (8, two, 2), (3, one, 1)):
        sample = source.read(index)
        flux, ivar = expected(truth, row)
        for found, right in ((sample.spectrum.flux, flux), (sample.spectrum.ivar, ivar)):
            assert found.dtype == np.float32 and found.dtype.isnative
            np.testing.assert_allclose(found, right, rtol=1e-6)
        assert not sample.spectrum.ivar[[100, 101, 102, 200, 300]].any()
        assert sample.image is None and set(sample.labels) == set(source.labels)
    with pytest.raises(IndexError, match="row 9: this source has 9"):
        source.read(9)


def test_overlap_is_weighted_and_other_pixels_are_copied(tree):
    sample = DesiCoadds(tree[0]).read(2)
    flux, ivar, _ = tree[1]["B"]
    red, weight, _ = tree[1]["R"]
    np.testing.assert_array_equal(sample.spectrum.ivar[301:2700], ivar[0, 301:2700])
    np.testing.assert_allclose(sample.spectrum.flux[301:2700], flux[0, 301:2700], rtol=2e-7)
    np.testing.assert_allclose(sample.spectrum.ivar[2700:2751], ivar[0, 2700:] + weight[0, :51], rtol=1e-6)
    middle = (flux[0, 2700] * ivar[0, 2700] + red[0, 0] * weight[0, 0]) / (ivar[0, 2700] + weight[0, 0])
    assert sample.spectrum.flux[2700] == pytest.approx(middle, rel=1e-6)


def test_labels_and_keys(tree):
    source = DesiCoadds(tree[0])
    main, bright, shared = source.read(1), source.read(2), source.read(5)
    assert main.key == str(FIRST + 52) and main.source == "coadd-main-dark-10001.fits:2"
    assert main.labels["targetid"] == str(FIRST + 52)
    assert main.labels["redshift"] == pytest.approx(0.1)  # the first row of its redrock file
    assert main.labels["deltachi2"] == 50 and main.labels["zwarn"] == 4 and main.labels["spectype"] == "GALAXY"
    assert main.labels["subtype"] == "" and np.isnan(main.labels["ebv"]) and main.labels["sv3_desi_target"] == "2"
    assert bright.labels["ebv"] == pytest.approx(0.02) and bright.labels["sv3_desi_target"] == ""
    assert bright.labels["desi_target"] == str(2**60 + 1)
    assert (bright.labels["release"], bright.labels["morphtype"]) == (9010, "DEV")
    assert (bright.ra, bright.dec) == (150, 2)
    assert shared.key == f"{FIRST + 3}-sv3-bright-9999" and shared.labels["targetid"] == str(FIRST + 3)
    assert source.read(6).key == f"{FIRST + 3}-sv3-dark-9999"
    assert len(set(source.describe(0, 9).keys)) == 9


def test_description_agrees_with_reading(tree):
    source = DesiCoadds(tree[0])
    rows = source.describe(1, 8)
    for i, key in enumerate(rows.keys):
        sample = source.read(i + 1)
        assert (key, rows.columns["ra"][i], rows.columns["dec"][i]) == (sample.key, sample.ra, sample.dec)
        for name, value in sample.labels.items():
            assert isinstance(rows.columns[name], list) == isinstance(value, str)
            np.testing.assert_equal(rows.columns[name][i], value)
    assert source.describe(4, 4).keys == []


def test_cuts(tree):
    assert len(DesiCoadds(tree[0], good_fibers=False)) == 10
    tile = tree[0].parent / "tile" / "coadd-3-80605-thru20210205.fits"
    write(tile, 4, tables={"OBJTYPE": np.array(["TGT", "SKY", "BAD", "TGT"]), "TARGETID": np.array([7, -1, -1, 9])},
          redrock={"TARGETID": np.array([7, 9, 11, 12])})  # fmt: skip
    source = DesiCoadds(tile)
    assert source.describe(0, 2).keys == ["7", "9"] and source.read(1).labels["redshift"] == pytest.approx(0.11)
    assert len(DesiCoadds(tile, targets_only=False, redrock=False)) == 4
    write(tile, 2, tables={"COADD_FIBERSTATUS": np.ones(2, np.int32)})
    with pytest.raises(ValueError, match="none of 2 rows is left after the cuts"):
        DesiCoadds(tile)


def test_redshifts_elsewhere_or_not_at_all(tree, tmp_path):
    elsewhere = tmp_path / "vac"
    elsewhere.mkdir()
    for file in tree[0].rglob("redrock-*.fits"):
        file.rename(elsewhere / file.name)
    with pytest.raises(FileNotFoundError, match=r"no redrock-main-dark-10001\.fits in .*redrock=False"):
        DesiCoadds(tree[0])
    assert DesiCoadds(tree[0], redrock=elsewhere).read(1).labels["redshift"] == pytest.approx(0.1)
    plain = DesiCoadds(tree[0], redrock=False)
    assert "redshift" not in plain.labels and plain.read(1).labels["flux_r"] == 3
    one = next(tree[0].rglob("coadd-main-*.fits"))
    assert DesiCoadds(one, redrock=elsewhere / "redrock-main-dark-10001.fits").read(1).labels["zerr"] == 1e-5


def test_gzipped_file(tree, tmp_path):
    plain = next(tree[0].rglob("coadd-main-*.fits"))
    packed = tmp_path / "coadd-main-dark-10001.fits.gz"
    with open(plain, "rb") as f, gzip.open(packed, "wb") as g:
        shutil.copyfileobj(f, g)
    a, b = (DesiCoadds(p, redrock=False).read(1) for p in (plain, packed))
    np.testing.assert_array_equal(a.spectrum.flux, b.spectrum.flux)
    np.testing.assert_array_equal(a.spectrum.ivar, b.spectrum.ivar)
    assert a.labels == pytest.approx(b.labels, nan_ok=True) and a.key == b.key


def test_inputs_change_with_files_and_cuts(tree):
    first = DesiCoadds(tree[0]).inputs()
    assert first == DesiCoadds(tree[0]).inputs() != DesiCoadds(tree[0], good_fibers=False).inputs()
    assert first != DesiCoadds(sorted(tree[0].rglob("coadd-*.fits"))[:2]).inputs()


def test_coadd_across_arms(tmp_path):
    images = {f"{arm}_{kind}": None for arm in "BRZ" for kind in ("WAVELENGTH", "FLUX", "IVAR", "MASK", "RESOLUTION")}
    path = tmp_path / "coadd-x.fits"
    write(path, 2, images=images)
    rng = np.random.default_rng(0)
    flux = rng.normal(0, 1, (2, 7781)).astype(np.float32)
    with fits.open(path, mode="append") as hdus:
        hdus.append(fits.ImageHDU(DESI_GRID.angstrom(), name="BRZ_WAVELENGTH"))
        hdus.append(fits.ImageHDU(flux, name="BRZ_FLUX"))
        hdus.append(fits.ImageHDU(np.ones((2, 7781), np.float32), name="BRZ_IVAR"))
    np.testing.assert_array_equal(DesiCoadds(path).read(1).spectrum.flux, flux[1])


def test_round_trip(tree, tmp_path):
    source = DesiCoadds(tree[0])
    survey = build(source, tmp_path / "packed", name="desi", samples_per_shard=4, progress=False)
    assert survey.spectrum.grid == DESI_GRID and survey.count() == 9
    back = PackedSurvey(tmp_path / "packed")
    originals = {(s := source.read(i)).key: s for i in range(9)}
    for i in range(9):
        sample = back.read(i)
        original = originals[sample.key]
        seen = original.spectrum.ivar > 0
        np.testing.assert_array_equal(sample.spectrum.ivar > 0, seen)
        half_step = np.percentile(original.spectrum.ivar[seen] ** -0.5, 10) / 16
        assert np.abs(sample.spectrum.flux - original.spectrum.flux).max() <= half_step * (1 + 1e-4)
        assert np.abs(np.log2(sample.spectrum.ivar[seen] / original.spectrum.ivar[seen])).max() <= 1 / 64 + 1e-5
        assert sample.labels == pytest.approx(original.labels, nan_ok=True)
        assert (sample.ra, sample.dec) == (original.ra, original.dec)


def test_quasars_of_a_real_file(real_data):
    path = real_data / "desi_spectra" / "quasarnp_test_coadd.fits.gz"
    source = DesiCoadds(path, redrock=False, need_fibermap=False)
    assert len(source) == 25 and source.labels == {}
    with fits.open(path) as hdus:
        stored = {arm: [hdus[f"{arm}_{kind}"].data for kind in ("FLUX", "IVAR")] for arm in ARMS}
        stored = {arm: (*parts, np.zeros(parts[0].shape)) for arm, parts in stored.items()}
    for index in (0, 7, 24):
        sample = source.read(index)
        flux, ivar = expected(stored, index)
        np.testing.assert_allclose(sample.spectrum.flux, flux, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sample.spectrum.ivar, ivar, rtol=1e-6)
        assert sample.key == f"quasarnp_test_coadd-{index:05d}" and np.isnan(sample.ra)
    with pytest.raises(ValueError, match="no HDU FIBERMAP; it has B_FLUX"):
        DesiCoadds(path, redrock=False)


def test_stack_is_no_coadd(real_data):
    with pytest.raises(ValueError, match=r"stack-LRG\.fits\.gz: no HDU B_FLUX; it has FLUX, IVAR, STACKINFO, WAVE"):
        DesiCoadds(real_data / "desi_spectra" / "stack-LRG.fits.gz", redrock=False)


def wave(arm, change):
    values = 3600 + 0.8 * (ARMS[arm][0] + np.arange(ARMS[arm][1]))
    change(values)
    return values


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": {"R_IVAR": None}}, "no HDU R_IVAR; it has B_FLUX"),
        ({"images": {"Z_WAVELENGTH": None}}, "no HDU Z_WAVELENGTH"),
        ({"images": {"FIBERMAP": None}}, "no HDU FIBERMAP"),
        ({"tables": {"TARGET_RA": None}}, "column 'TARGET_RA' of HDU FIBERMAP: missing"),
        ({"tables": {"TARGETID": np.arange(3) + 0.5}}, "column 'TARGETID' of HDU FIBERMAP: holds float64, not whole"),
        ({"tables": {"FLUX_R": np.array(["a", "b", "c"])}}, "column 'FLUX_R' of HDU FIBERMAP: holds '1A', not numbers"),
        ({"tables": {"EBV": np.ones((3, 2))}}, "column 'EBV' of HDU FIBERMAP: holds '2D', and must hold one value a row"),
        ({"tables": {"TARGETID": np.array([5, 6, 5])}}, "column 'TARGETID' of HDU FIBERMAP: 5 at rows 0 and 2"),
        ({"tables": {"COADD_FIBERSTATUS": None}}, "column 'COADD_FIBERSTATUS' of HDU FIBERMAP: missing"),
        ({"redrock": {"TARGETID": np.array([5, 5, 6])}}, "column 'TARGETID' of HDU REDSHIFTS: 5 at rows 0 and 1"),
        ({"redrock": {"ZWARN": None}}, "column 'ZWARN' of HDU REDSHIFTS: missing"),
        ({"redrock": {"Z": np.array(["x", "y", "z"])}}, "column 'Z' of HDU REDSHIFTS: holds '1A', not numbers"),
        ({"images": {"R_FLUX": np.zeros((2, 2326), np.float32)}}, r"R_FLUX is \(2, 2326\), and must be 3 rows of 2326 pixels"),
        ({"images": {"B_MASK": np.zeros((3, 9), np.int32)}}, r"B_MASK is \(3, 9\), and must be 3 rows of 2751 pixels"),
        ({"images": {"B_FLUX": np.zeros(2751, np.float32)}}, r"B_FLUX is \(2751,\), not rows x pixels"),
        ({"images": {"B_FLUX": {"BUNIT": "erg/(s cm2 Angstrom)"}}}, r"B_FLUX: its unit 'erg.*' is 1e\+17 times"),
        ({"images": {"Z_FLUX": {"BUNIT": "nanomaggies"}}}, "Z_FLUX: its unit is 'nanomaggies', and must be 1e-17 erg"),
        ({"images": {"B_WAVELENGTH": {"BUNIT": "nm"}}}, "B_WAVELENGTH: its unit is 'nm', and must be Angstrom"),
        ({"images": {"R_WAVELENGTH": wave("R", lambda w: w.__setitem__(9, np.nan))}}, "R_WAVELENGTH: must be a vector of"),
        ({"images": {"R_WAVELENGTH": wave("R", lambda w: w.__setitem__(9, 1e4))}}, "R_WAVELENGTH: must increase, and does not at pixel 10"),
        ({"images": {"Z_WAVELENGTH": wave("Z", lambda w: w.__iadd__(0.3))}}, "Z_WAVELENGTH: 7520.3 is no pixel of the grid"),
        ({"images": {"B_WAVELENGTH": wave("B", lambda w: w.__isub__(8))}}, "B_WAVELENGTH: 3592 is no pixel of the grid"),
    ],
    ids=["no ivar", "no wavelength", "no fibermap", "no ra", "target float", "flux text", "vector column",
         "target twice", "no status", "redrock twice", "redrock column", "redrock text", "arms differ", "mask shape",
         "one spectrum", "unit scale", "unit kind", "wave unit", "nan wave", "unordered wave", "off grid", "below grid"],
)  # fmt: skip
def test_wrong_layouts(tmp_path, changes, match):
    write(tmp_path / "coadd-a.fits", 3, **changes)
    with pytest.raises(ValueError, match=rf"(coadd|redrock)-a\.fits: {match}"):
        DesiCoadds(tmp_path)


def test_different_numbers_of_rows(tmp_path):
    write(tmp_path / "coadd-a.fits", 3)
    write(tmp_path / "coadd-b.fits", 2, first=5)
    with fits.open(tmp_path / "coadd-a.fits") as hdus, fits.open(tmp_path / "coadd-b.fits") as other:
        hdus["FIBERMAP"] = fits.BinTableHDU(other["FIBERMAP"].data, name="FIBERMAP")
        hdus.writeto(tmp_path / "coadd-c.fits")
    with pytest.raises(ValueError, match=r"coadd-c\.fits: FIBERMAP has 2 rows, the spectra 3"):
        DesiCoadds(tmp_path / "coadd-c.fits", redrock=False)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.6, 0.97])
@pytest.mark.parametrize("suffix", [".fits", ".fits.gz"])
def test_truncated_file(tmp_path, share, suffix):
    write(tmp_path / "coadd-a.fits", 3)
    data = (tmp_path / "coadd-a.fits").read_bytes()
    data = gzip.compress(data) if suffix == ".fits.gz" else data
    (tmp_path / f"coadd-t{suffix}").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"coadd-t\.fits.*: (not readable|no HDU)"):
        DesiCoadds(tmp_path / f"coadd-t{suffix}", redrock=False)


def test_missing_and_empty(tmp_path):
    with pytest.raises(ValueError, match="no coadd files in it"):
        DesiCoadds(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"coadd-no\.fits: no such coadd file"):
        DesiCoadds(tmp_path / "coadd-no.fits")
    (tmp_path / "coadd-a.fits").write_text("text")
    with pytest.raises(ValueError, match=r"coadd-a\.fits: not readable as FITS"):
        DesiCoadds(tmp_path, redrock=False)
    (tmp_path / "coadd-a.fits").write_bytes(b"")
    with pytest.raises(ValueError, match=r"coadd-a\.fits: not readable as FITS"):
        DesiCoadds(tmp_path, redrock=False)
    with pytest.raises(FileNotFoundError, match="no file of redshifts in"):
        (tmp_path / "other.fits").write_bytes(b"")
        DesiCoadds(tmp_path / "other.fits")


def test_redrock_without_a_target(tmp_path):
    write(tmp_path / "coadd-a.fits", 3, redrock={"TARGETID": FIRST + np.array([0, 9, 2])})
    source = DesiCoadds(tmp_path)
    match = rf"coadd-a\.fits: row 1: TARGETID {FIRST + 1} has no row in .*redrock-a\.fits"
    assert list(source.describe(0, 3).bad) == [1]
    with pytest.raises(BadSample, match=match):
        source.read(1)
    with pytest.raises(BadSample, match=match):
        build(source, tmp_path / "out", name="x", progress=False)
    assert build(source, tmp_path / "out", name="x", progress=False, on_bad="skip").count() == 2


def test_empty_redrock(tmp_path):
    write(tmp_path / "coadd-a.fits", 2, redrock={n: v[:0] for n, v in redshifts(2).items()})
    assert sorted(DesiCoadds(tmp_path).describe(0, 2).bad) == [0, 1]


@pytest.mark.parametrize(
    ("column", "value", "match"),
    [
        ("TARGET_RA", 400.0, r"row 1: column 'TARGET_RA': 400.0 is outside \[0, 360\]"),
        ("TARGET_RA", -1.0, r"row 1: column 'TARGET_RA': -1.0 is outside"),
        ("TARGET_DEC", 91.0, r"row 1: column 'TARGET_DEC': 91.0 is outside \[-90, 90\]"),
        ("TARGET_RA", np.inf, r"row 1: column 'TARGET_RA': inf is outside"),
    ],
    ids=["ra high", "ra low", "dec", "inf"],
)
def test_impossible_positions(tmp_path, column, value, match):
    write(tmp_path / "coadd-a.fits", 3, tables={column: np.array([1, value, 3])})
    source = DesiCoadds(tmp_path)
    assert list(source.describe(0, 3).bad) == [1]
    with pytest.raises(BadSample, match=rf"coadd-a\.fits: {match}"):
        source.read(1)
    source.read(2)


def test_negative_ivar_and_no_data(tmp_path):
    ivar = np.ones((3, 2326), np.float32)
    ivar[1, 7] = -2
    write(tmp_path / "coadd-a.fits", 3, images={"R_IVAR": ivar})
    source = DesiCoadds(tmp_path)
    with pytest.raises(BadSample, match=r"coadd-a\.fits: row 1: R_IVAR: pixel 7 is -2"):
        source.read(1)
    source.read(0)
    blank = {f"{arm}_IVAR": np.zeros((3, n), np.float32) for arm, (_, n) in ARMS.items()}
    write(tmp_path / "coadd-a.fits", 3, images=blank)
    with pytest.raises(BadSample, match=r"coadd-a\.fits: row 2: no pixel carries data"):
        DesiCoadds(tmp_path).read(2)


def test_byte_swapped_arm_is_not_taken_for_spectra(tmp_path):
    rng = np.random.default_rng(0)
    ivar = rng.uniform(0.5, 2, (3, 2326)).astype(np.float32)
    write(tmp_path / "coadd-a.fits", 3, images={"R_IVAR": ivar.byteswap()})
    with pytest.raises(BadSample, match=r"coadd-a\.fits: row 1: R_IVAR: pixel \d+ is -"):
        DesiCoadds(tmp_path).read(1)


def test_truncated_redrock(tmp_path):
    write(tmp_path / "coadd-a.fits", 3)
    path = tmp_path / "redrock-a.fits"
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(ValueError, match=r"redrock-a\.fits: (not readable|no HDU|HDU .* truncated)"):
        DesiCoadds(tmp_path)


def test_same_name_in_two_tiles(tmp_path):
    for tile in ("100", "200"):
        write(tmp_path / tile / "coadd-0.fits", 2)
    source = DesiCoadds(tmp_path)
    assert source.describe(0, 4).keys[0::2] == [f"{FIRST}-100_0", f"{FIRST}-200_0"]
    shutil.copy(tmp_path / "100" / "coadd-0.fits", tmp_path / "100" / "coadd-0.fits.gz")
    with pytest.raises(ValueError, match=r"100/coadd-0 is there twice"):
        DesiCoadds(tmp_path)
