"""Surveys of several sources, from files in their published layouts: matched, cut, split, packed and checked."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
import desi_files as desi
import provabgs_files as provabgs
import stein_files as stein

from armillary.engine.data.building.survey_recipe import Preparation, Read, Sky, With, Work, prepare, start
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.check import check_survey
from armillary.engine.data.inspect.leakage import find_leaks
from armillary.engine.data.sources.packed import PackedSurvey
from recipes.survey_desi_pairs import SURVEY

ARCSEC = 1 / 3600
PAIRED = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """40 images, spectra of 12 of their galaxies and of 3 others, stellar masses of 8 of these 12."""
    root = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(100, 260, 40), rng.uniform(0, 60, 40)
    flux = np.full((40, 3), 10.0**0.8, np.float32)  # magnitude 20.5
    flux[:30, 2] = 10.0**1.4  # magnitude 19
    kinds = np.resize([b"DEV", b"SER"], 40)
    kinds[4] = b"PSF"
    images, _ = stein.write(root / "stein" / "north.h5", 40, size=16, ra=ra, dec=dec, flux=flux, source_type=kinds)
    place = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 35])  # 4 is a star, 35 too faint
    near = {
        "TARGET_RA": np.append(ra[place] + 0.3 * ARCSEC / np.cos(np.deg2rad(dec[place])), [10.0, 11.0, 12.0]),
        "TARGET_DEC": np.append(dec[place], [0.0, 0.0, 0.0]),
    }
    quality = {"ZWARN": np.zeros(15, np.int64), "SPECTYPE": np.full(15, "GALAXY", "U6")}
    quality["ZWARN"][6] = 4
    quality["SPECTYPE"][7] = "QSO"
    desi.write(root / "desi" / "coadd-sv3-bright-1.fits", 15, tables=near, redrock=quality)
    target = desi.FIRST + np.arange(provabgs.COUNT)
    (root / "provabgs").mkdir()
    provabgs.write(root / "provabgs" / "columns.h5", provabgs.columns(TARGETID=target))
    return root, images


@pytest.fixture
def recipe(files):
    root, _ = files
    matches = tuple(replace(m, read=replace(m.read, path=root / m.read.path.name)) for m in SURVEY.matches)
    return replace(SURVEY, first=replace(SURVEY.first, path=root / "stein"), matches=matches)


def test_the_pairs_recipe(recipe, files, tmp_path, capsys):
    _, images = files
    assert start(recipe, ["--out", str(tmp_path / "s"), "--processes", "1", "--no-progress"]) == 0
    assert "objects matched, median separation 0.3 arcsec" in capsys.readouterr().out
    survey = Survey.load(tmp_path / "s")
    assert survey.modalities == ("image", "spectrum", "vectors") and survey.spectrum.grid.count == 7781
    assert not check_survey(tmp_path / "s") and not find_leaks(tmp_path / "s", identifiers=("targetid",))
    packed = PackedSurvey(tmp_path / "s")
    found = {s.labels["brickid"] - 300000: s for s in map(packed.read, range(len(packed)))}
    assert set(found) == {0, 1, 2, 3, 5, 8, 9, 10}  # 4 a star, 6 a warning, 7 a quasar, 35 faint
    for row, sample in found.items():
        assert np.abs(sample.image - images[int(row)]).max() < 0.01
        assert sample.labels["targetid"] == str(desi.FIRST + int(row))
        assert sample.labels["redshift"] == pytest.approx(0.1 + 0.01 * row)
        mass = sample.labels["log_mstar"]
        assert (8 <= mass <= 12) if sample.vectors else np.isnan(mass)
    assert any(s.vectors for s in found.values()) and not all(s.vectors for s in found.values())
    inputs = survey.provenance["build"]["inputs"]
    assert any("mag(flux_z) < 20" in k for k in inputs) and any("matching" in k for k in inputs)


def test_a_killed_build_of_it_goes_on_to_the_same_bytes(recipe, tmp_path):
    small = replace(recipe, samples_per_shard=2)
    prepare(small, Work(tmp_path / "whole", processes=1, progress=False))
    from armillary.engine.data.building import build as module

    done = []
    real = module.pack

    def killed(source, task):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task)
        return real(source, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pack", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(small, Work(tmp_path / "killed", processes=1, progress=False))
    prepare(small, Work(tmp_path / "killed", processes=1, progress=False))
    for path in (tmp_path / "whole").iterdir():
        if path.name != "survey.json":  # which holds the date
            assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name


def test_real_pictures_with_a_real_catalogue(real_data, tmp_path):
    pictures = Preparation(
        name="spirals",
        first=Read(
            "images", real_data / "sdss_spirals" / "images.zip", {"labels": real_data / "sdss_spirals" / "labels.csv"}
        ),
        matches=(
            With(
                Read("table", real_data / "catalogs" / "gz2_stripe82_votes.fits.gz", {"duplicates": "first"}),
                Sky(radius_arcsec=1.0),
                name="gz2",
            ),
        ),
        split="healpix:32",
        test_fraction=0.3,
    )
    survey = prepare(pictures, Work(tmp_path / "s", processes=1, progress=False))
    assert 200 < survey.count() < 400 and survey.count("test") and not check_survey(tmp_path / "s")
    assert not find_leaks(tmp_path / "s", radius_arcsec=10)
    packed = PackedSurvey(tmp_path / "s")
    smooth = [packed.read(i).labels["t01_smooth_or_features_a01_smooth_debiased"] for i in range(len(packed))]
    assert np.nanmedian(smooth) < 0.5  # they were chosen as spirals
