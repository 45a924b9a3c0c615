"""Surveys of magnitudes with redshifts, from tables in the published columns."""

import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from recipes import survey_cfhtls, survey_dc2

COUNT = 8


def cfhtls(folder):
    bands = survey_cfhtls.BANDS
    columns = {"redshift": np.linspace(0.1, 3, COUNT), "source": ["DEEP2/3", "3D-HST"] * (COUNT // 2)}
    for k, band in enumerate(bands):
        columns[band] = 20.0 + k + np.arange(COUNT)
        columns[f"{band}err"] = np.full(COUNT, 0.01 * (k + 1))
    columns["i2"][1], columns["u"][2], columns["y"][3] = -99.0, 99.0, -99.0
    Table(columns).write(folder / "combined_catalog.fits")
    return folder / "combined_catalog.fits", bands, {(1, "i2"), (2, "u"), (3, "y")}


def dc2(folder):
    with h5py.File(folder / "dc2.hdf5", "w") as file:
        group = file.create_group("photometry")
        group["id"] = 8062500000 + np.arange(COUNT)
        group["redshift"] = np.linspace(0.1, 3, COUNT)
        for k, band in enumerate(survey_dc2.BANDS):
            magnitudes = 20.0 + k + np.arange(COUNT)
            magnitudes[4] = 99.0 if band == "u" else magnitudes[4]
            group[f"mag_{band}_lsst"] = magnitudes
            group[f"mag_err_{band}_lsst"] = np.full(COUNT, 0.01 * (k + 1))
    return folder / "dc2.hdf5", survey_dc2.BANDS, {(4, "u")}


@pytest.mark.parametrize(("recipe", "write"), [(survey_cfhtls, cfhtls), (survey_dc2, dc2)], ids=["cfhtls", "dc2"])
def test_magnitudes_are_vectors_and_what_was_not_seen_is_unknown(recipe, write, tmp_path):
    path, bands, unknown = write(tmp_path)
    source = replace(recipe.SURVEY, first=replace(recipe.SURVEY.first, path=path)).open()
    assert [(r.name, r.components, r.unit) for r in source.vectors] == [
        ("magnitudes", bands, "AB mag"),
        ("magnitudes_err", bands, "AB mag"),
    ]
    assert set(source.labels) == {"redshift"} and len(source) == COUNT
    for i in range(COUNT):
        sample = source.read(i)
        expected = [np.nan if (i, band) in unknown else 20.0 + k + i for k, band in enumerate(bands)]
        np.testing.assert_allclose(sample.vectors["magnitudes"], expected)
        np.testing.assert_allclose(sample.vectors["magnitudes_err"], 0.01 * (1 + np.arange(len(bands))), rtol=1e-6)
        assert sample.labels["redshift"] == pytest.approx(0.1 + 2.9 * i / (COUNT - 1))


@pytest.mark.parametrize(
    ("recipe", "file", "count", "most"),
    [
        (survey_cfhtls, "catalogs/combined_catalog.fits.gz", 15_878, 3.32),
        (survey_dc2, "simulated/test_dc2_training_9816.hdf5", 10_225, 2.99),
    ],
    ids=["cfhtls", "dc2"],
)
def test_the_published_tables(recipe, file, count, most, real_data):
    path = real_data / file
    if not path.is_file():
        pytest.skip(f"no {path.name} in ARMILLARY_REAL_DATA")
    source = replace(recipe.SURVEY, first=replace(recipe.SURVEY.first, path=path)).open()
    assert len(source) == count
    redshift = source.describe(0, count).columns["redshift"]
    assert redshift.min() > 0 and redshift.max() == pytest.approx(most, abs=0.01)
    magnitudes = np.stack([source.read(i).vectors["magnitudes"] for i in range(0, count, 100)])
    assert np.nanmin(magnitudes) > 14 and np.nanmax(magnitudes) < 45
