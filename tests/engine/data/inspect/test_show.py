import sys

import h5py
import numpy as np
import pytest
import tyro
from PIL import Image

from armillary.engine.data import cli
from armillary.engine.data.format.survey import Statistics, Survey
from armillary.engine.data.inspect import cli as inspect_cli
from armillary.engine.data.inspect.colour import lupton_rgb
from armillary.engine.data.inspect.show import draw_mosaic, read_samples
from armillary.engine.data.sources import kinds


def described(unit, bands, sigma):
    numbers = (1.0,) * len(bands)
    statistics = Statistics(numbers, numbers, numbers, (numbers,) * len(bands), 1)
    return Survey("s", bands, 4, 4, None, unit, "float16", sigma, (), (), statistics)


def test_counts_are_shown_as_they_are():
    survey = described("count", ("red", "green", "blue"), (1.0, 1.0, 1.0))
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(lupton_rgb(image, None, survey), np.moveaxis(image, 0, -1))
    deep = image * 257
    np.testing.assert_allclose(lupton_rgb(deep, None, survey), np.moveaxis(image, 0, -1), atol=1)
    grey = lupton_rgb(image[:1], None, described("count", ("grey",), (1.0,)))
    assert (grey == grey[..., :1]).all() and grey[0, 0, 0] == image[0, 0, 0]


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_fluxes_get_a_stretch_that_grows_and_never_wraps(bands):
    survey = described("nanomaggy", tuple("ugriz"[:bands]), (0.01,) * bands)
    levels = np.array([-1e3, -0.01, 0, 0.01, 0.1, 1, 10, 1e6], np.float32)
    out = lupton_rgb(np.broadcast_to(levels, (bands, 2, 8)).copy(), None, survey)
    brightest = out[0].max(axis=1).astype(int)
    assert out.shape == (2, 8, 3) and (np.diff(brightest) >= 0).all()
    assert brightest[0] == 0 and brightest[-1] == 255
    assert 0 < brightest[2] < 60  # the sky is dark, not black


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and a survey of them built by the command."""
    root = tmp_path_factory.mktemp("data")
    (root / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(root / "in" / f"p{i}.png")
    (root / "in" / "labels.csv").write_text("file,ra,dec,z,type\np0,1,2,0.1,Sa\np1,1,2,,Sb\n")
    assert command(cli.build, root / "in", "-o", root / "out", "--processes", 1, "--test-fraction", 0.3) == 0
    return root


def command(function, *words):
    return tyro.cli(function, args=[str(w) for w in words])


def test_mosaic(folder, tmp_path):
    draw_mosaic(folder / "out", tmp_path / "a.png", count=5, labels=["z", "type"])
    draw_mosaic(folder / "out", tmp_path / "b.png", count=5, labels=["z", "type"])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * (162 + 4) + 4, 2 * (162 + 4 + 3 * 12) + 4)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_samples_are_random_rows_of_the_split(folder):
    survey = Survey.load(folder / "out")
    samples = read_samples(folder / "out", survey, 100, "train", 0)
    assert len(samples) == survey.count("train") and {s.split for s in samples} == {"train"}
    few = {tuple(s.key for s in read_samples(folder / "out", survey, 3, None, seed)) for seed in range(4)}
    assert len(few) > 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"count": 0}, "count: must be at least 1"),
        ({"split": "half"}, "split: no samples in 'half'; the survey has train, test"),
        ({"labels": ["mass"]}, "labels: no 'mass'; the survey has z, type"),
    ],
)
def test_mosaics_that_cannot_be(folder, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        draw_mosaic(folder / "out", tmp_path / "a.png", **options)


def test_commands_end_to_end(folder, tmp_path, capsys):
    assert command(inspect_cli.check, folder / "out", "--no-progress") == 0
    assert "sound" in capsys.readouterr().out
    assert command(inspect_cli.show, folder / "out", "--out", tmp_path / "m.png", "--split", "test", "--count", 2) == 0
    out = capsys.readouterr().out
    assert "red green blue, 9 x 9 pixels" in out and (tmp_path / "m.png").exists()


def test_check_reports_and_fails(folder, tmp_path, capsys):
    for file in (folder / "out").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "train-000000.idx").unlink()
    assert command(inspect_cli.check, tmp_path, "--blobs", 1) == 1
    out = capsys.readouterr().out
    words = " ".join(out.split())  # the title is broken into lines where the path is long
    assert "1 problems" in words and "train-000000" in words and "missing" in words


def test_kinds_are_guessed_from_names_and_content(tmp_path):
    names = {
        "a.JPG": "images",
        "b.zip": "images",
        "c.fits.gz": "fits",
        "coadd-main-1.fits": "desi",
        "spec-1-2-3.fits": "sdss",
    }
    for name, kind in names.items():
        (tmp_path / name).write_text("")
        assert kinds.guess_kind(tmp_path / name) == kind
    inside = {
        "stein": ("images", "ra"),
        "stack": ("images", "dec"),
        "astroclip": ("0/images",),
        "supermock": ("galaxy_id", "redshift_true"),
    }
    inside |= {"galaxiesml": ("specz_redshift", "image"), "galaxiesml-spectra": ("spectrum/wave", "image")}
    for kind, data_sets in inside.items():
        with h5py.File(tmp_path / f"{kind}.hdf5", "w") as file:
            for name in data_sets:
                file[name] = [0.0]
        assert kinds.guess_kind(tmp_path / f"{kind}.hdf5") == kind
    with pytest.raises(ValueError, match=r"what to read is not clear \(2 of kind images, 1 of kind fits"):
        kinds.guess_kind(tmp_path)
    (tmp_path / "none.h5").write_text("")
    with pytest.raises(ValueError, match="none.h5: not a readable HDF5 file"):
        kinds.guess_kind(tmp_path / "none.h5")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        kinds.guess_kind(tmp_path / "none")


def test_options_of_another_kind_are_refused(folder):
    with pytest.raises(ValueError, match="rows: sources of kind images have no such option"):
        kinds.open_source(folder / "in", rows=(0, 1))
    with pytest.raises(ValueError, match="labels: sources of kind stein have no such option"):
        kinds.open_source(folder / "in", "stein", labels=folder / "in" / "labels.csv")
    assert kinds.open_source(folder / "in", size=5, bands=("i", "r", "g")).bands == ("i", "r", "g")


def test_build_command_takes_every_option(folder, tmp_path):
    words = ["--kind", "images", "--name", "n", "--labels", folder / "in" / "labels.csv", "--size", 8]
    words += ["--pixel-scale-arcsec", 0.2, "--codec", "float16", "--samples-per-shard", 4, "--seed", 3]
    words += ["--on-bad", "skip", "--no-progress", "--processes", 1, "--sky-sigma", 1, 2, 3, "--bands", "i", "r", "g"]
    words += ["--cut", "type != Sc", "--cut", "type != Sb"]
    assert command(cli.build, folder / "in", "--out", tmp_path / "o", *words) == 0
    survey = Survey.load(tmp_path / "o")
    inputs = survey.provenance["build"]["inputs"]
    assert inputs["cut: type != Sc"] == "removed 0 rows" and inputs["cut: type != Sb"] == "removed 1 rows"
    assert (survey.name, survey.height, survey.bands, survey.sky_sigma) == ("n", 8, ("i", "r", "g"), (1.0, 2.0, 3.0))
    assert survey.provenance["command"].startswith(sys.argv[0].split()[0])


def test_unknown_split_is_refused_before_anything_is_made(folder, tmp_path):
    with pytest.raises(ValueError, match="split: must be auto, key, random:SEED, sky, healpix"):
        command(cli.build, folder / "in", "--out", tmp_path / "o", "--split", "half")
    assert not (tmp_path / "o").exists()
