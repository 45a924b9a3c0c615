import pickle
from dataclasses import fields

import numpy as np
import pyarrow.parquet as pq
import pytest

galsim = pytest.importorskip("galsim", reason="the simulation needs GalSim")
pytest.importorskip("speclite", reason="the simulation needs filter curves")

from armillary.engine.data.format.survey import Survey  # noqa: E402
from armillary.engine.data.simulate.cli import simulate  # noqa: E402
from armillary.engine.data.simulate.population import draw_population, half_light_radius, keyed_generator  # noqa: E402
from armillary.engine.data.simulate.seds import TYPES, attenuation, colour_table  # noqa: E402
from armillary.engine.data.simulate.survey import LEGACY, Band, SimulatedSurvey  # noqa: E402
from armillary.engine.data.sources.source import Described  # noqa: E402
from armillary.engine.evaluate.embedding.cutouts import read_cutouts  # noqa: E402

FILTERS = tuple(band.filter for band in LEGACY)


@pytest.fixture(scope="module")
def survey():
    return SimulatedSurvey(40, seed=5)


@pytest.fixture(scope="module")
def population():
    return draw_population(3000, 5, filters=FILTERS, magnitude_limit=19.5)


def test_reads_do_not_depend_on_their_order(survey):
    forward = [survey.read(i).image for i in (3, 17, 0)]
    other = pickle.loads(pickle.dumps(survey))
    backward = [other.read(i).image for i in (0, 17, 3)][::-1]
    for a, b in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(a, b)


def test_galaxies_do_not_depend_on_how_many_there_are(survey):
    larger = SimulatedSurvey(60, seed=5)
    np.testing.assert_array_equal(survey.read(39).image, larger.read(39).image)
    assert survey.read(39).labels == larger.read(39).labels


def test_seeds_and_galaxies_differ(survey):
    assert not np.array_equal(survey.read(0).image, survey.read(1).image)
    assert not np.array_equal(survey.read(0).image, SimulatedSurvey(1, seed=6).read(0).image)


def test_keys_of_different_streams_do_not_meet():
    draws = {keyed_generator(s, t, i).random() for s in (0, 1, 2**63) for t in (0, 1, 3) for i in (0, 1, 2**47)}
    assert len(draws) == 27


def test_sample_fields(survey):
    sample = survey.read(7)
    assert sample.image.shape == (3, 72, 72)
    assert sample.image.dtype == np.float32
    assert np.isfinite(sample.image).all()
    assert set(sample.labels) == set(survey.labels)
    assert 170 <= sample.ra <= 190
    assert -5 <= sample.dec <= 5
    assert sample.labels["magnitude_z"] < 19.5
    assert 0.02 <= sample.labels["redshift"] <= 0.6
    assert len({survey.read(i).key for i in range(10)}) == 10


@pytest.mark.parametrize("size", [8, 33, 152])
def test_sizes(size):
    image = SimulatedSurvey(2, seed=5, size=size).read(1).image
    assert image.shape == (3, size, size)
    assert np.isfinite(image).all()


def test_flux_agrees_with_the_magnitude_label():
    survey = SimulatedSurvey(30, seed=5, size=200)
    labels = survey.describe(0, 30).columns
    for i in np.argsort(labels["half_light_radius_arcsec"])[:6]:
        measured = 22.5 - 2.5 * np.log10(survey.noiseless(i)[-1].sum())
        assert measured == pytest.approx(labels["magnitude_z"][i], abs=0.03)


def test_half_of_the_light_lies_inside_the_half_light_radius():
    survey = SimulatedSurvey(400, seed=5, size=200, bands=tuple(Band(b.name, b.filter, 0.5, 24.0) for b in LEGACY))
    radius = np.array(half_light_radius(survey.population))
    round_and_large = np.flatnonzero(
        (survey.population.axis_ratio() > 0.85) & (radius > 2.0) & (survey.population.axis_disk > 0.85)
    )
    assert len(round_and_large)
    y, x = np.indices((200, 200)) - 99.5
    for i in round_and_large[:4]:
        image = survey.noiseless(i)[-1]
        total = survey.population.flux()[i, -1]
        assert image[np.hypot(x, y) * 0.262 < radius[i]].sum() / total == pytest.approx(0.5, abs=0.06)


def test_noise_is_the_sky_noise_of_the_depth(survey):
    for c, band in enumerate(LEGACY):
        corners = [survey.read(i).image[c, :10, :10].std() for i in range(40)]
        assert np.median(corners) == pytest.approx(band.sky_sigma(0.262), rel=0.15)


def test_sky_noise_gives_back_the_depth():
    sigma_pixel, scale = LEGACY[0].sky_sigma(0.262), 0.262
    psf = galsim.Gaussian(fwhm=LEGACY[0].fwhm_arcsec).drawImage(nx=65, ny=65, scale=scale, method="no_pixel").array
    five_sigma = 5 * sigma_pixel / np.sqrt((psf**2).sum())  # matched-filter photometry
    assert 22.5 - 2.5 * np.log10(five_sigma) == pytest.approx(24.0, abs=0.01)


def test_population_grows_without_changing(population):
    smaller = draw_population(100, 5, filters=FILTERS, magnitude_limit=19.5)
    for f in fields(smaller):
        np.testing.assert_array_equal(getattr(smaller, f.name), getattr(population, f.name)[:100])


def test_early_types_are_redder_and_rounder(population):
    colour = -2.5 * np.log10(population.flux()[:, 0] / population.flux()[:, 1])
    near = np.abs(population.redshift - 0.15) < 0.05
    assert np.median(colour[near & population.early]) > np.median(colour[near & ~population.early]) + 0.15
    assert np.median(population.axis_ratio()[population.early]) > np.median(population.axis_ratio()[~population.early])


def test_every_label_is_physical(population):
    assert (population.flux() > 0).all()
    assert ((population.bulge_fraction() >= 0) & (population.bulge_fraction() <= 1)).all()
    assert ((population.axis_ratio() >= 0.19) & (population.axis_ratio() <= 1)).all()
    r = half_light_radius(population)
    low = np.minimum(population.radius_bulge, population.radius_disk)
    high = np.maximum(population.radius_bulge, population.radius_disk)
    assert ((r >= low * 0.999) & (r <= high * 1.001)).all()


def test_colours_of_unredshifted_templates():
    table = colour_table(FILTERS)
    kinds = np.arange(len(TYPES), dtype=float)
    m = table(kinds, np.zeros(4), np.zeros(4))
    np.testing.assert_allclose(m[:, -1], 0, atol=1e-12)
    gr = m[:, 0] - m[:, 1]
    assert (np.diff(gr) < 0).all()  # E is reddest, Im bluest
    assert gr[0] == pytest.approx(0.78, abs=0.1)  # a local elliptical (Fukugita et al. 1995: 0.77 in SDSS g-r)


def test_elliptical_reddens_with_redshift_and_slope():
    table = colour_table(FILTERS)
    z = np.linspace(0, 0.35, 8)
    m = table(np.zeros(8), z, np.zeros(8))
    assert (np.diff(m[:, 0] - m[:, 1]) > 0).all()
    tilted = table(np.zeros(8), z, np.full(8, 0.3))
    assert (tilted[:, 0] - tilted[:, 1] > m[:, 0] - m[:, 1]).all()


@pytest.mark.parametrize(("kind", "z", "name"), [(3.1, 0.1, "type"), (0.0, 0.9, "redshift"), (0.0, -0.1, "redshift")])
def test_colours_outside_the_table_are_refused(kind, z, name):
    with pytest.raises(ValueError, match=f"{name}: must lie in"):
        colour_table(FILTERS)(np.array([kind]), np.array([z]), np.zeros(1))


def test_attenuation_is_calzettis():
    assert attenuation(np.array([5500.0]), np.array([1.0]))[0] == pytest.approx(4.05, abs=0.02)  # R_V
    k = attenuation(np.array([6299.0, 6301.0]), np.array([1.0]))
    assert abs(k[0] - k[1]) < 0.05  # the two branches meet
    assert attenuation(np.array([4400.0]), np.array([1.0]))[0] - 4.05 == pytest.approx(1.0, abs=0.1)  # E(B-V)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count: must be at least 1, got 0"),
        ({"size": 4}, "size: must be at least 8, got 4"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"bands": ()}, "bands: must be at least 1"),
        ({"pixel_scale_arcsec": 0.0}, "pixel_scale_arcsec: must be positive"),
        ({"magnitude_limit": 14.0}, "choose a fainter magnitude_limit"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimulatedSurvey(**({"count": 3} | arguments))


@pytest.mark.parametrize("index", [-1, 40])
def test_no_such_galaxy(survey, index):
    with pytest.raises(IndexError, match="this simulated survey has 40"):
        survey.read(index)


def test_description_needs_no_images(survey):
    rows = survey.describe(3, 6)
    assert isinstance(survey, Described)
    for place, i in enumerate((3, 4, 5)):
        sample = survey.read(i)
        assert rows.keys[place] == sample.key
        expected = {"ra": sample.ra, "dec": sample.dec, **sample.labels}
        assert {name: column[place] for name, column in rows.columns.items()} == expected


def test_packed_survey_holds_the_galaxies(tmp_path, capsys):
    folder = tmp_path / "survey"
    options = {"count": 24, "seed": 5, "size": 32, "processes": 1, "test_fraction": 0.25, "progress": False}
    assert simulate(folder, **options) == 0
    packed = Survey.load(folder)
    assert packed.count() == 24
    assert packed.bands == ("g", "r", "z")
    assert packed.labels == SimulatedSurvey.labels
    assert "galaxies to train on" in capsys.readouterr().out
    catalogue = pq.read_table(folder / "catalog.parquet").to_pydict()
    source = SimulatedSurvey(24, seed=5, size=32)
    for row in (0, 23):
        index = int(catalogue["key"][row].rpartition("-")[2])
        image, valid = read_cutouts(folder, [row])[0]
        assert valid is None
        np.testing.assert_allclose(image, source.read(index).image, atol=max(packed.step))
        assert catalogue["redshift"][row] == source.read(index).labels["redshift"]


def test_grouped_galaxies_differ_in_their_places_alone():
    plain, grouped = SimulatedSurvey(40, seed=5), SimulatedSurvey(40, seed=5, grouped=True)
    a, b = plain.describe(0, 40).columns, grouped.describe(0, 40).columns
    assert all((a[name] == b[name]).all() for name in a if name not in ("ra", "dec")) and (a["ra"] != b["ra"]).any()
    sample = grouped.read(3)
    np.testing.assert_array_equal(sample.image, plain.read(3).image)
    assert (sample.ra, sample.dec) == (b["ra"][3], b["dec"][3]) and "grouped=True" in repr(grouped)
