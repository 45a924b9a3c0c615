import math
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("galsim", reason="the simulation needs GalSim")
filters = pytest.importorskip("speclite.filters", reason="the simulation needs filter curves")

from armillary.engine.data.format.survey import Survey  # noqa: E402
from armillary.engine.data.simulate.cli import simulate  # noqa: E402
from armillary.engine.data.simulate.pairs import SimulatedPairs  # noqa: E402
from armillary.engine.data.simulate.stellar_populations import STELLAR_LABELS, age_of_universe  # noqa: E402
from armillary.engine.data.simulate.survey import SimulatedSurvey  # noqa: E402
from armillary.engine.data.simulate.votes import ASKED, FOLLOWS  # noqa: E402
from armillary.engine.data.sources.packed import PackedSurvey  # noqa: E402
from armillary.engine.data.sources.source import Described, Spectral, spectrum_of  # noqa: E402
from armillary.engine.data.sources.surveys.galaxyzoo import DECALS_QUESTIONS  # noqa: E402

COUNT = 400
NANOMAGGY = 3.631e-29 * 2.99792458e18 / 1e-17
PLAIN_SUMS = [2.405765, 10.026255, 22.170815]
PLAIN_LABELS = {
    "redshift": 0.2964127757209742,
    "magnitude_z": 19.467601364259764,
    "bulge_fraction": 0.8561595315385044,
    "half_light_radius_arcsec": 0.7188555003980776,
    "early_type": 1.0,
    "axis_ratio": 0.6557168889975287,
}


@pytest.fixture(scope="module")
def pairs():
    return SimulatedPairs(COUNT, seed=5)


@pytest.fixture(scope="module")
def labels(pairs):
    return pairs.describe(0, COUNT).columns


def test_only_pairs_have_spectra(pairs):
    assert isinstance(pairs, Spectral)
    assert isinstance(pairs, Described)
    assert pairs.spectrum.grid.count == 7781
    assert pairs.spectrum.unit == "1e-17 erg/s/cm2/angstrom"
    plain = SimulatedSurvey(2, seed=5)
    assert spectrum_of(plain) is None
    assert plain.read(0).spectrum is None


def test_survey_without_spectra_is_as_it_was():
    plain = SimulatedSurvey(40, seed=5)
    sample = plain.read(17)
    assert list(sample.labels) == list(SimulatedSurvey.labels)
    assert sample.labels == pytest.approx(PLAIN_LABELS, rel=1e-9)
    np.testing.assert_allclose(sample.image.sum(axis=(1, 2)), PLAIN_SUMS, rtol=1e-5)
    assert repr(plain).startswith("SimulatedSurvey(count=40, seed=5, size=72, magnitude_limit=19.5, bands=(Band(")


def test_images_without_structure_are_those_of_the_plain_survey(pairs, labels):
    plain = SimulatedSurvey(COUNT, seed=5)
    smooth = labels["arm_fraction"] + labels["bar_fraction"] == 0
    for i in np.flatnonzero(smooth)[:3]:
        np.testing.assert_array_equal(pairs.read(i).image, plain.read(i).image)
    for i in np.flatnonzero(~smooth)[:3]:
        assert not np.array_equal(pairs.read(i).image, plain.read(i).image)
        np.testing.assert_allclose(pairs.noiseless(i).sum(), plain.noiseless(i).sum(), rtol=0.05)
    expected = plain.describe(0, 10).columns
    for name in ("ra", "dec", *SimulatedSurvey.labels):
        np.testing.assert_array_equal(labels[name][:10], expected[name])


def test_reads_do_not_depend_on_order_or_count(pairs):
    forward = [pairs.read(i) for i in (3, 17, 0)]
    larger = pickle.loads(pickle.dumps(SimulatedPairs(COUNT + 20, seed=5)))
    backward = [larger.read(i) for i in (0, 17, 3)][::-1]
    for a, b in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(a.spectrum.flux, b.spectrum.flux)
        np.testing.assert_array_equal(a.spectrum.ivar, b.spectrum.ivar)
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_equal(a.labels, b.labels)
    other = SimulatedPairs(1, seed=6).read(0)
    assert not np.array_equal(other.spectrum.flux, pairs.read(0).spectrum.flux)


def test_description_is_that_of_the_samples(pairs, labels):
    sample = pairs.read(7)
    assert set(sample.labels) == set(pairs.labels)
    np.testing.assert_equal({name: labels[name][7] for name in sample.labels}, sample.labels)


def test_noise_has_the_stated_variance(pairs):
    lost = 0
    for i in range(30):
        spectrum, truth = pairs.read(i).spectrum, pairs.noiseless_spectrum(i)
        seen = spectrum.ivar > 0
        assert spectrum.flux.dtype == spectrum.ivar.dtype == np.float32
        assert (spectrum.flux[~seen] == 0).all()
        assert seen.mean() > 0.99
        pull = (spectrum.flux - truth)[seen] * np.sqrt(spectrum.ivar[seen])
        assert (pull**2).mean() == pytest.approx(1, abs=0.08)  # 5 sigma of 7,781 pixels
        assert abs(pull.mean()) < 0.06
        lost += not seen.all()
    assert 8 <= lost <= 22


def test_signal_to_noise_is_that_of_a_bright_survey(pairs, labels):
    ratio = []
    for i in np.flatnonzero((labels["mag_r"] > 17) & (labels["mag_r"] < 19.5))[:40]:
        spectrum = pairs.read(i).spectrum
        ratio.append(np.median(spectrum.flux * np.sqrt(spectrum.ivar)))
    assert 1 < np.median(ratio) < 5


def test_photometry_of_the_spectrum_agrees_with_the_image(pairs):
    wave, p = pairs.spectrum.grid.angstrom(), pairs.population
    offset = []
    for i in range(60):
        spectrum, fibre = pairs.noiseless_spectrum(i), pairs.fibre_shares(i)
        expected = p.flux_bulge[i] * fibre[0] + p.flux_disk[i] * fibre[1]
        for c, name in enumerate(("decam2014-g", "decam2014-r")):
            curve = filters.load_filter(name)
            response = np.interp(wave, curve.wavelength, curve.response, left=0, right=0)
            flux = (spectrum * response * wave).sum() / (response / wave).sum() / NANOMAGGY
            offset.append(flux / expected[c] - 1)
    assert np.abs(np.median(offset)) < 0.03
    assert np.percentile(np.abs(offset), 90) < 0.06


def test_physical_labels_are_in_range(pairs, labels):
    for name in (*STELLAR_LABELS, "mag_g", "mag_r", "mag_z"):
        assert np.isfinite(labels[name]).all(), name
    assert 8 < labels["log_mstar"].min() < labels["log_mstar"].max() < 12.3
    assert -14 < labels["log_ssfr"].min() < labels["log_ssfr"].max() < -8.3
    assert -7.5 < labels["ln_z_mw"].min() < labels["ln_z_mw"].max() < -2.9
    oldest = np.array([age_of_universe(z) for z in labels["redshift"]])
    assert (labels["tage_mw"] > 1).all()
    assert (labels["tage_mw"] < oldest).all()
    assert np.median(np.abs(labels["mag_z"] - labels["magnitude_z"])) < 0.1


def test_physical_labels_follow_the_known_relations(labels):
    early = labels["early_type"] == 1
    assert np.median(labels["log_ssfr"][early]) < np.median(labels["log_ssfr"][~early]) - 0.5
    assert np.median(labels["tage_mw"][early]) > np.median(labels["tage_mw"][~early]) + 0.5
    assert np.corrcoef(labels["log_mstar"], labels["ln_z_mw"])[0, 1] > 0.6


def test_votes_follow_the_tree(labels):
    for question in ASKED:
        answers = np.stack([labels[f"{question}_{a}"] for a in DECALS_QUESTIONS[question]])
        votes = labels[f"{question}_votes"]
        np.testing.assert_allclose(answers[:, votes > 0].sum(0), 1, atol=1e-12)
        assert np.isnan(answers[:, votes == 0]).all()
        counts = answers[:, votes > 0] * votes[votes > 0]
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
        if question in FOLLOWS:
            parent, answer = FOLLOWS[question]
            led = np.nan_to_num(labels[f"{parent}_{answer}"]) * labels[f"{parent}_votes"]
            np.testing.assert_allclose(votes, led, atol=1e-9)
    first = labels["smooth-or-featured_votes"]
    assert 20 <= first.min() < first.max() <= 80
    assert not any(name.startswith("merging") for name in labels)


def test_votes_tell_of_the_image(labels):
    resolved = (labels["half_light_radius_arcsec"] > 1.3) & (labels["axis_ratio"] > 0.5)
    armed, smooth = resolved & (labels["arm_fraction"] > 0.25), resolved & (labels["early_type"] == 1)
    featured = labels["smooth-or-featured_featured-or-disk"]
    assert featured[armed].mean() > featured[smooth].mean() + 0.3
    round_votes = labels["how-rounded_round"]
    assert (
        np.nanmean(round_votes[labels["axis_ratio"] > 0.9]) > 0.5 > np.nanmean(round_votes[labels["axis_ratio"] < 0.5])
    )


@pytest.mark.parametrize("index", [-1, COUNT])
def test_no_such_galaxy(pairs, index):
    with pytest.raises(IndexError, match=f"this simulated survey has {COUNT}"):
        pairs.noiseless_spectrum(index)
    with pytest.raises(IndexError, match=f"this simulated survey has {COUNT}"):
        pairs.read(index)


def test_bad_count():
    with pytest.raises(ValueError, match="count: must be at least 1, got 0"):
        SimulatedPairs(0)


def test_packed_pairs_hold_images_and_spectra(tmp_path, capsys):
    folder = tmp_path / "pairs"
    options = {"count": 16, "seed": 5, "size": 32, "processes": 1, "test_fraction": 0.25, "progress": False}
    assert simulate(folder, spectra=True, **options) == 0
    packed = Survey.load(folder)
    assert packed.count() == 16
    assert packed.name == "simulated-pairs-5"
    assert packed.labels == SimulatedPairs.labels
    assert packed.spectrum.grid == SimulatedPairs.spectrum.grid
    assert "galaxies with spectra to train on" in capsys.readouterr().out
    catalogue = pq.read_table(folder / "catalog.parquet").to_pydict()
    source, stored = SimulatedPairs(16, seed=5, size=32), PackedSurvey(folder)
    for row in (0, 9, 15):
        sample, kept = source.read(int(catalogue["key"][row].rpartition("-")[2])), stored.read(row)
        assert kept.key == sample.key
        np.testing.assert_equal(kept.labels, sample.labels)
        np.testing.assert_allclose(kept.image, sample.image, atol=max(packed.step))
        seen = sample.spectrum.ivar > 0
        np.testing.assert_array_equal(kept.spectrum.ivar > 0, seen)
        best = np.percentile(sample.spectrum.ivar[seen] ** -0.5, 10)
        np.testing.assert_allclose(kept.spectrum.flux, sample.spectrum.flux, atol=best / 15)
        np.testing.assert_allclose(kept.spectrum.ivar, sample.spectrum.ivar, rtol=0.012)
        assert math.isfinite(catalogue["log_mstar"][row])
