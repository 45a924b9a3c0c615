"""The simulated survey: reproducible, the same for every count and number of processes, packed and read back."""

import numpy as np
import pytest

from armillary.engine.cli import main
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.simulate.populations.histories import cosmology
from armillary.engine.data.simulate.populations.survey import SimulatedPhotometry
from armillary.engine.data.sources.packed import PackedSurvey


@pytest.fixture(scope="module")
def survey():
    return SimulatedPhotometry(600, seed=11)


def test_the_first_galaxies_do_not_depend_on_the_count(survey):
    few = SimulatedPhotometry(30, seed=11)
    other = SimulatedPhotometry(30, seed=12)
    for i in (0, 29):
        a, b = few.read(i), survey.read(i)
        assert a.key == b.key and a.labels == b.labels
        for name, values in a.vectors.items():
            np.testing.assert_array_equal(values, b.vectors[name])
    assert other.read(0).labels != few.read(0).labels


def test_galaxies_are_brighter_than_the_limit_and_known_in_all(survey):
    rows = survey.describe(0, 600)
    assert len(set(rows.keys)) == 600
    assert max(rows.columns["magnitude_i"]) <= 21.5
    for record in survey.vectors:
        values = np.stack([survey.read(i).vectors[record.name] for i in range(600)])
        assert values.shape == (600, record.size) and np.isfinite(values).all() and (values >= 0).all()
    for name in ("stellar_mass", "halo_mass", "sfr", "redshift"):
        assert (rows.columns[name] > 0).all()


def test_the_history_adds_to_the_mass_formed(survey):
    for i in range(0, 600, 60):
        sample = survey.read(i)
        formed = sample.vectors["sfh"].sum() * cosmology().age_at(np.array([sample.labels["redshift"]]))[0] / 36 * 1e9
        assert 1.2 < formed / sample.labels["stellar_mass"] < 2.5


def test_true_fluxes_and_noise_of_the_sky_or_measured_ones_with_stated_errors(survey):
    noisy = SimulatedPhotometry(600, seed=11, noise=True)
    name = "photometry_spherex"
    true, sky, seen, said = (
        np.stack([s.read(i).vectors[n] for i in range(600)])
        for s, n in ((survey, name), (survey, f"{name}_err"), (noisy, name), (noisy, f"{name}_err"))
    )
    pull = (seen - true) / np.hypot(sky, 0.01 * true)
    assert pull.std() == pytest.approx(1, abs=0.02) and (seen < 0).any()
    np.testing.assert_allclose(said, np.hypot(sky, 0.01 * seen), rtol=1e-4)


def test_rest_and_observed_distributions_are_of_the_same_light(survey):
    observed = SimulatedPhotometry(50, seed=11, sed="observed")
    rest_wave, wave = (np.array([float(c.split()[0]) for c in s.vectors[-1].components]) for s in (survey, observed))
    for i in (0, 7, 49):
        stretch = 1 + survey.read(i).labels["redshift"]
        inside = (wave > 1.4 * stretch) & (wave < 4.5)  # bins differ, so only where the light is smooth
        moved = np.interp(wave[inside], rest_wave * stretch, survey.read(i).vectors["sed"])
        np.testing.assert_allclose(np.median(observed.read(i).vectors["sed"][inside] / moved), 1, atol=0.01)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 0}, "count: must be at least 1"),
        ({"sed": "restframe"}, "sed: must be one of rest, observed"),
        ({"magnitude_limit": 13.0}, "magnitude_limit: must be above 14"),
        ({"processes": 0}, "processes: must be at least 1"),
    ],
)
def test_bad_settings_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        SimulatedPhotometry(**{"count": 5} | options)


@pytest.mark.slow
def test_the_command_packs_the_same_galaxies_with_two_processes(survey, tmp_path, capsys):
    folder = tmp_path / "survey"
    arguments = ["data", "simulate-photometry", "-o", str(folder), "--seed", "11", "--count", "60", "--no-progress"]
    assert main([*arguments, "--processes", "2"]) == 0
    assert "galaxies to train on" in capsys.readouterr().out
    written = Survey.load(folder)
    assert written.modalities == ("vectors",) and written.count() == 60 and written.count("test") > 0
    packed = PackedSurvey(folder)
    assert {"redshift", "stellar_mass", "halo_mass", "sfr"} <= set(packed.labels)
    sample = packed.read(0)
    for name, values in survey.read(int(sample.key.split("-")[1])).vectors.items():
        np.testing.assert_allclose(sample.vectors[name], values, rtol=1e-6)
    assert main([*arguments[:3], str(tmp_path / "none"), "--ssp", str(tmp_path / "none.npz")]) == 2
    assert "no such file" in capsys.readouterr().err
