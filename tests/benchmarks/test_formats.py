"""The benchmark of formats: each stores what it says, an error beyond a tolerance stops it, real files become pieces."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZE = 40


@pytest.fixture(scope="module")
def formats():
    pytest.importorskip("imagecodecs", reason="imagecodecs is in the dev extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import format_kinds
        import format_pieces
        import formats

        yield SimpleNamespace(**(vars(format_kinds) | vars(format_pieces) | vars(formats)))
        for name in ("formats", "format_kinds", "format_pieces", "loader", "common"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def pieces(formats):
    return formats.simulated(3, SIZE)


def names(formats) -> list[str]:
    return [form.name for form in formats.FORMATS]


def write(path: Path, image: np.ndarray) -> None:
    scale = {"CD1_1": -7.28e-5, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": 7.28e-5, "CRVAL1": 10.0, "CRVAL2": 1.0}
    header = fits.Header({"BANDS": "grz", "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", **scale})
    fits.PrimaryHDU(image, header).writeto(path)


def noisy(height: int, width: int, bands: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.01, (bands, height, width)).astype(np.float32)


def test_formats_have_the_error_and_size_that_they_are_compared_by(formats, pieces):
    found = {form.name: formats.checked(form, pieces) for form in formats.FORMATS}
    assert len(found) == len(formats.FORMATS)
    same_step = [name for name in found if name == "packed" or "int16" in name or "same steps" in name]
    assert len(same_step) == 7
    for name in same_step:
        assert 0.06 < found[name]["error"] < 0.0626, name
    assert found["float32"] == {"KiB": 3 * SIZE**2 * 4 / 1024, "error": 0}
    assert found["float32, HDF5 gzip"]["error"] == 0
    assert found["packed"]["KiB"] < found["float16"]["KiB"] < found["float32"]["KiB"]


def test_every_format_reads_back_the_mask_and_odd_shapes(formats):
    images = noisy(19, 33)[None] + np.float32(1)
    valid = np.random.default_rng(1).random(images.shape) < 0.7
    images[~valid] = 0
    odd = formats.Pieces("odd", images, np.full((1, 3), 0.01, np.float32), valid)
    for form in formats.FORMATS:
        assert formats.checked(form, odd)["KiB"] > 0


def test_a_wrong_pixel_stops_the_benchmark(formats, pieces):
    class Wrong(formats.Raw):
        name = "wrong"

        def decode(self, stored, pieces, out):
            super().decode(stored, pieces, out)
            out[1, 2, 3, 4] += 1e-6

    with pytest.raises(SystemExit, match=r"wrong, simulated: 1 pixels are beyond the tolerance, first \(1, 2, 3, 4\)"):
        formats.checked(Wrong(), pieces)


def test_a_pixel_that_was_not_written_stops_the_benchmark(formats, pieces):
    class Forgetful(formats.Raw):
        def decode(self, stored, pieces, out):
            super().decode(stored, pieces, out[:-1])

        def encode(self, pieces):
            return super().encode(pieces)[:-1]

    with pytest.raises(SystemExit, match=f"{3 * SIZE**2} pixels are beyond the tolerance"):
        formats.checked(Forgetful(), pieces)


def test_steps_beyond_int16_are_refused(formats):
    with pytest.raises(ValueError, match="a pixel of 40000 steps is beyond int16"):
        formats.quantised(np.full((3, 2, 2), -4.0, np.float32), np.full((3, 1, 1), 1e-4, np.float32))


def test_repeated_rows_and_columns_are_dropped_and_no_others(formats):
    image = noisy(7, 9)
    image[:, 2:4, :4] = 0
    assert np.array_equal(formats.unrepeated(image), image)
    enlarged = image.repeat([1, 3, 2, 2, 1, 4, 1], axis=1).repeat(2, axis=2)
    assert np.array_equal(formats.unrepeated(enlarged), image)


def test_real_files_are_tiled_and_the_others_named(formats, tmp_path, capsys):
    image = noisy(2 * SIZE + 5, SIZE + 1)
    write(tmp_path / "a.fits", image)
    write(tmp_path / "b.fits", noisy(SIZE, SIZE // 2).repeat(2, axis=2))
    write(tmp_path / "small.fits.gz", noisy(SIZE - 1, SIZE))
    (tmp_path / "broken.fits").write_bytes(b"no image")
    native, enlarged = formats.real(tmp_path, 4, SIZE)
    assert (len(native), len(enlarged)) == (4, 4)
    assert np.array_equal(native.images[:2], [image[:, 2 : 2 + SIZE, :SIZE], image[:, 2 + SIZE : 2 + 2 * SIZE, :SIZE]])
    assert np.array_equal(native.images[2:], native.images[:2]) and native.valid.all()
    assert np.allclose(native.sigma, 0.01, rtol=0.1)
    printed = capsys.readouterr().out
    for name in ("broken.fits", "small.fits.gz", "b.fits"):
        assert f"left out: {tmp_path / name}" in printed
    assert "Legacy Survey: 2 pieces of 3 files, 0.0% of the pixels without data" in printed


def test_tiles_without_data_in_a_band_are_dropped(formats):
    image = noisy(SIZE, 2 * SIZE)
    image[1, :, :SIZE] = 0
    pieces = formats.tiled("half", [(Path("a.fits"), image)], 1, SIZE)
    assert np.array_equal(pieces.images, image[None, :, :, SIZE:])


def test_an_empty_folder_is_a_printed_reason(formats, tmp_path, capsys):
    assert formats.real(tmp_path, 4, SIZE) == []
    assert f"no real cutouts: no FITS file in {tmp_path}" in capsys.readouterr().out


def test_the_script_appends_a_row_for_each_quantity(formats, tmp_path, monkeypatch, capsys):
    path = tmp_path / "formats.csv"
    options = ["--quick", "--images", "2", "--slow-images", "1", "--repeats", "2", "--size", "24", "--csv", str(path)]
    monkeypatch.setattr(sys, "argv", ["formats.py", *options])
    monkeypatch.delenv("ARMILLARY_REAL_DATA", raising=False)
    monkeypatch.setattr(formats.torch, "set_num_threads", lambda count: None)
    formats.main()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows[::4]] == names(formats)
    assert [row["quantity"] for row in rows[:4]] == ["size", "largest error", "encode", "decode"]
    assert {row["ratio_to_packed"] for row in rows[:4]} == {"1", ""}
    assert all(float(row["cpu_ms_per_image"]) > 0 for row in rows if row["unit"] == "images/s")
    assert "no real cutouts: give --cutouts FOLDER or set ARMILLARY_REAL_DATA" in capsys.readouterr().out


def test_the_real_cutouts_pass_the_check(formats, real_data):
    sets = formats.real(real_data / formats.REAL_FOLDER, 1, 152)
    assert {pieces.name.partition(",")[0] for pieces in sets} == {"Legacy Survey"}
    for form in formats.FORMATS:
        assert formats.checked(form, sets[0])["error"] < 1
