import math
from dataclasses import replace

import numpy as np
import pytest

galsim = pytest.importorskip("galsim", reason="the simulation needs GalSim")

from armillary.engine.data.simulate.scene import Scene  # noqa: E402
from armillary.engine.data.simulate.votes import (  # noqa: E402
    ASKED,
    VOTE_LABELS,
    Shape,
    Structure,
    add_structure,
    draw_structure,
    draw_votes,
    probabilities,
)
from armillary.engine.data.sources.surveys.galaxyzoo import DECALS_QUESTIONS  # noqa: E402

SPIRAL = Shape(bulge=0.15, radius=4.0, axis=0.8, axis_disk=0.8, early=False, fwhm=1.2)
ARMS = Structure(arms=2, pitch=12.0, arm_share=0.4)
SHAPES = {
    "spiral": (SPIRAL, ARMS),
    "unresolved": (replace(SPIRAL, radius=0.15), ARMS),
    "edge-on": (replace(SPIRAL, axis=0.22, axis_disk=0.2), Structure()),
    "elliptical": (replace(SPIRAL, bulge=0.99, early=True), Structure()),
    "barred": (SPIRAL, Structure(bar_share=0.25)),
}


def likeliest(question, name):
    return DECALS_QUESTIONS[question][int(np.argmax(probabilities(*SHAPES[name])[question]))]


@pytest.mark.parametrize("name", SHAPES)
def test_probabilities_are_probabilities(name):
    chances = probabilities(*SHAPES[name])
    assert set(chances) == set(ASKED)
    for question, p in chances.items():
        assert len(p) == len(DECALS_QUESTIONS[question])
        assert (p >= 0).all()
        assert p.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("spiral", "smooth-or-featured", "featured-or-disk"),
        ("unresolved", "smooth-or-featured", "smooth"),
        ("elliptical", "smooth-or-featured", "smooth"),
        ("edge-on", "disk-edge-on", "yes"),
        ("spiral", "disk-edge-on", "no"),
        ("spiral", "has-spiral-arms", "yes"),
        ("barred", "has-spiral-arms", "no"),
        ("barred", "bar", "strong"),
        ("spiral", "bar", "no"),
        ("spiral", "spiral-winding", "tight"),
        ("spiral", "spiral-arm-count", "2"),
        ("spiral", "bulge-size", "small"),
        ("elliptical", "bulge-size", "dominant"),
        ("edge-on", "how-rounded", "cigar-shaped"),
    ],
)
def test_most_volunteers_see_what_was_drawn(name, question, answer):
    assert likeliest(question, name) == answer


def test_seeing_rounds_small_galaxies():
    thin = replace(SPIRAL, axis=0.25, axis_disk=0.25)
    large, small = (probabilities(replace(thin, radius=r), Structure())["disk-edge-on"][0] for r in (4.0, 0.4))
    assert large > 0.8 > 0.2 > small


def test_votes_are_counts_of_the_labels():
    labels = draw_votes(SPIRAL, ARMS, np.random.default_rng(0))
    assert set(labels) == set(VOTE_LABELS)
    assert 20 <= labels["smooth-or-featured_votes"] <= 80
    for question in ASKED:
        fractions = [labels[f"{question}_{a}"] for a in DECALS_QUESTIONS[question]]
        if labels[f"{question}_votes"]:
            assert sum(fractions) == pytest.approx(1)
        else:
            assert all(math.isnan(f) for f in fractions)


def test_votes_have_their_probabilities():
    rng = np.random.default_rng(1)
    drawn = [draw_votes(SPIRAL, ARMS, rng) for _ in range(400)]
    votes = np.array([d["spiral-winding_votes"] for d in drawn])
    tight = np.nansum([d["spiral-winding_tight"] * v for d, v in zip(drawn, votes, strict=True)]) / votes.sum()
    assert tight == pytest.approx(probabilities(SPIRAL, ARMS)["spiral-winding"][0], abs=0.02)


def test_only_resolved_spirals_have_structure():
    rng = np.random.default_rng(2)
    assert draw_structure(True, 5.0, 0.8, rng) == Structure()
    assert draw_structure(False, 0.3, 0.1, rng) == Structure()
    drawn = [draw_structure(False, 3.0, 0.1, rng) for _ in range(300)]
    assert np.mean([s.arms > 0 for s in drawn]) == pytest.approx(0.8, abs=0.08)
    assert np.mean([s.bar_share > 0 for s in drawn]) == pytest.approx(0.35, abs=0.09)
    assert all((s.arm_share > 0) == (s.arms > 0) for s in drawn)
    assert max(s.arm_share + s.bar_share for s in drawn) < 0.75  # with the knots' quarter some smooth disk is left
    tight, loose = ([draw_structure(False, 3.0, b, rng).pitch for _ in range(100)] for b in (0.6, 0.0))
    assert np.mean(tight) < np.mean(loose) - 8


def test_arms_hold_their_light_and_wind():
    scene = Scene(160, 0.262, np.array([0.7]))
    structure = Structure(arms=2, pitch=20.0, arm_share=0.4, bar_share=0.2, phase=0.7)
    share = add_structure(scene, structure, 3.0, 1.0, 0 * galsim.degrees, np.array([10.0]), 0.0, 0.0)
    image = scene.image()[0]
    assert share == pytest.approx(0.6)
    assert image.sum() == pytest.approx(6.0, rel=0.01)
    np.testing.assert_allclose(image, image[::-1, ::-1], atol=1e-3 * image.max())  # two arms: the same upside down
    mirrored = Scene(160, 0.262, np.array([0.7]))
    add_structure(mirrored, replace(structure, sense=-1), 3.0, 1.0, 0 * galsim.degrees, np.array([10.0]), 0.0, 0.0)
    assert np.abs(mirrored.image()[0] - image).max() > 0.2 * image.max()


def test_no_structure_draws_nothing():
    scene = Scene(32, 0.262, np.array([1.2]))
    assert add_structure(scene, Structure(), 2.0, 0.5, 0 * galsim.degrees, np.array([10.0]), 0.0, 0.0) == 0
    np.testing.assert_allclose(scene.image(), 0, atol=1e-15)
