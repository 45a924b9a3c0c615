"""Arms and bars of simulated spirals, and how the volunteers of Galaxy Zoo would vote on what the image shows.

Of the ten questions of GZD-5 nine are asked; on mergers the images have nothing to say. A question is put to those who
gave the answer that leads to it: only who sees a disk is asked whether it is edge-on, only who does not is asked for
arms, bar and bulge, and only who sees arms is asked how they wind and how many they are. Each is a multinomial draw. Its
probabilities follow from the galaxy as drawn, blurred by the seeing: a spiral too small to be resolved looks smooth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from armillary.engine.data.simulate.scene import Scene
from armillary.engine.data.sources.surveys.galaxyzoo import DECALS_QUESTIONS

__all__ = ["ASKED", "VOTE_LABELS", "Shape", "Structure", "add_structure", "draw_structure", "draw_votes"]

ASKED = tuple(question for question in DECALS_QUESTIONS if question != "merging")
FOLLOWS = {
    "how-rounded": ("smooth-or-featured", "smooth"),
    "disk-edge-on": ("smooth-or-featured", "featured-or-disk"),
    "edge-on-bulge": ("disk-edge-on", "yes"),
    "has-spiral-arms": ("disk-edge-on", "no"),
    "bar": ("disk-edge-on", "no"),
    "bulge-size": ("disk-edge-on", "no"),
    "spiral-winding": ("has-spiral-arms", "yes"),
    "spiral-arm-count": ("has-spiral-arms", "yes"),
}
"""Which answer to which question leads to a question; the first is put to everybody."""

VOTE_LABELS = {f"{q}_{a}": "fraction of votes" for q in ASKED for a in DECALS_QUESTIONS[q]} | {
    f"{q}_votes": "volunteers who answered the question" for q in ASKED
}
VOLUNTEERS = (20, 80)
POINTS = 60  # of an arm
SPIRAL_ARCSEC = 0.7  # disks smaller than this get no arms or bar


@dataclass(frozen=True)
class Structure:
    """Arms and bar of one galaxy; shares are of the disk's light.

    Attributes:
        arms: Number of arms; 0 for none.
        pitch: Pitch angle in degrees.
        arm_share: Light in the arms.
        bar_share: Light in the bar.
        sense: 1 or -1, which way the arms wind.
        phase: Where they start, radian.
    """

    arms: int = 0
    pitch: float = 0.0
    arm_share: float = 0.0
    bar_share: float = 0.0
    sense: int = 1
    phase: float = 0.0


@dataclass(frozen=True)
class Shape:
    """What else the image shows of a galaxy.

    Attributes:
        bulge: Share of the bulge in the z band.
        radius: Half-light radius, arcsec.
        axis: Minor over major axis, light-weighted.
        axis_disk: Of the disk alone.
        early: An elliptical or lenticular.
        fwhm: Seeing, arcsec.
    """

    bulge: float
    radius: float
    axis: float
    axis_disk: float
    early: bool
    fwhm: float


def draw_structure(early: bool, radius_disk: float, bulge: float, rng: np.random.Generator) -> Structure:
    """Arms and bar: most spirals have the one, a third the other; ellipticals and lenticulars have neither.

    Args:
        early: An elliptical or lenticular.
        radius_disk: Half-light radius of the disk, arcsec.
        bulge: Share of the bulge; arms of early spirals wind more tightly.
        rng: The galaxy's own generator.
    """
    if early or radius_disk < SPIRAL_ARCSEC:
        return Structure()
    arms = int(rng.choice([0, 1, 2, 3, 4, 5], p=[0.2, 0.05, 0.45, 0.14, 0.11, 0.05]))
    pitch = float(np.clip(24 - 30 * bulge + 6 * rng.standard_normal(), 7, 40))
    arm_share, bar_share = float(rng.uniform(0.15, 0.45)), float(rng.uniform(0.05, 0.25))
    barred = rng.random() < 0.35
    return Structure(
        arms=arms,
        pitch=pitch,
        arm_share=arm_share if arms else 0.0,
        bar_share=bar_share if barred else 0.0,
        sense=1 if rng.random() < 0.5 else -1,
        phase=float(rng.uniform(0, 2 * np.pi)),
    )


def add_structure(
    scene: Scene, structure: Structure, radius: float, axis: float, angle: Any, flux: np.ndarray, x: float, y: float
) -> float:
    """Draw arms and bar into a scene.

    Args:
        scene: Where to.
        structure: What.
        radius: Half-light radius of the disk before the shear, arcsec.
        axis: Minor over major axis of the disk.
        angle: Position angle, a `galsim.Angle`.
        flux: [C] of the disk.
        x: Pixels to the right of the image's centre.
        y: Pixels above the image's centre.

    Returns:
        The share of the disk's light that was drawn, to be left out of the smooth disk.
    """
    import galsim

    if structure.bar_share:
        turn = (structure.phase % np.pi) * galsim.radians
        bar = galsim.Gaussian(half_light_radius=0.38 * radius).shear(q=0.3, beta=turn)
        scene.add(bar.shear(q=axis, beta=angle), flux * structure.bar_share, x, y)
    if structure.arms:
        scale = radius / 1.678  # an exponential's half-light radius in scale lengths
        r = np.linspace(0.7, 3.6, POINTS) * scale
        turn = structure.sense * np.log(r / r[0]) / math.tan(math.radians(structure.pitch)) + structure.phase
        turn = turn[:, None] + np.arange(structure.arms) * 2 * np.pi / structure.arms
        u, v = (
            (r[:, None] * np.cos(turn)).ravel() / math.sqrt(axis),
            (r[:, None] * np.sin(turn)).ravel() * math.sqrt(axis),
        )
        weight = np.repeat(r * np.exp(-r / scale), structure.arms)
        cos, sin = math.cos(angle.rad), math.sin(angle.rad)
        places = np.stack([u * cos - v * sin, u * sin + v * cos], 1)
        blob = galsim.Gaussian(half_light_radius=0.12 * radius).shear(q=axis, beta=angle)
        scene.add_points(blob, places, weight / weight.sum(), flux * structure.arm_share, x, y)
    return structure.arm_share + structure.bar_share


def draw_votes(shape: Shape, structure: Structure, rng: np.random.Generator) -> dict[str, float]:
    """The labels of `VOTE_LABELS`: counts by question and fractions by answer, NaN where nobody was asked.

    Args:
        shape: The galaxy as seen.
        structure: Its arms and bar.
        rng: The galaxy's own generator.
    """
    chances = probabilities(shape, structure)
    counts: dict[str, np.ndarray] = {}
    labels: dict[str, float] = {}
    for question in ASKED:
        if question in FOLLOWS:
            parent, answer = FOLLOWS[question]
            asked = int(counts[parent][DECALS_QUESTIONS[parent].index(answer)])
        else:
            asked = int(rng.integers(VOLUNTEERS[0], VOLUNTEERS[1] + 1))
        counts[question] = rng.multinomial(asked, chances[question])
        for answer, count in zip(DECALS_QUESTIONS[question], counts[question], strict=True):
            labels[f"{question}_{answer}"] = count / asked if asked else math.nan
        labels[f"{question}_votes"] = float(asked)
    return labels


def probabilities(shape: Shape, structure: Structure) -> dict[str, np.ndarray]:
    """Probability of each answer to each question, among those who are asked."""
    blur = shape.fwhm / 2
    clear = _logistic(math.log(shape.radius / (1.5 * blur)) / 0.35)  # 0 unresolved, 1 well resolved
    fine = _logistic(math.log(shape.radius / (2.5 * blur)) / 0.3)  # the same for what is finer than the disk
    flat = _seen(shape.axis_disk, shape.radius, blur)
    face = _logistic((flat - 0.40) / 0.05)
    disk = 1 - shape.bulge
    arms = fine * face * min(structure.arm_share / 0.3, 1.3) * disk
    bar = fine * face * structure.bar_share / 0.12 * disk
    edge = clear * (1 - face) * disk * (not shape.early)
    featured = _logistic(-2.6 + 2.6 * clear * disk * (not shape.early) + 3.2 * arms + 1.2 * bar + 4.5 * edge)
    if not structure.arms:
        number = 1
    else:
        number = min(structure.arms, 5) - 1
    count = np.full(5, 0.06) + (0.2 + 0.8 * fine) * np.eye(5)[number] * 1.6
    return {
        "smooth-or-featured": _norm([1 - featured, featured, 0.03]),
        "disk-edge-on": _norm([1 - face + 0.02, face + 0.02]),
        "has-spiral-arms": _norm([p := _logistic(-2.2 + 5.5 * arms), 1 - p]),
        "bar": _norm([max(bar - 0.5, 0.02), min(bar, 0.5) + 0.08, max(1.1 - bar, 0.1)]),
        "bulge-size": _near(shape.bulge, (0.85, 0.6, 0.35, 0.15, 0.0), 0.11),
        "how-rounded": _near(_seen(shape.axis, shape.radius, blur), (0.95, 0.65, 0.3), 0.11),
        "edge-on-bulge": _norm([0.07, _logistic((0.18 - shape.bulge) / 0.07), _logistic((shape.bulge - 0.18) / 0.07)]),
        "spiral-winding": _near(structure.pitch, (11.0, 19.0, 29.0), 4.5),
        "spiral-arm-count": _norm([*count, 0.15 + 0.6 * (1 - fine)]),
    }


def _seen(axis: float, radius: float, blur: float) -> float:
    """Axis ratio behind the seeing."""
    return math.sqrt(((axis * radius) ** 2 + blur**2) / (radius**2 + blur**2))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _norm(weights: list[float]) -> np.ndarray:
    w = np.asarray(weights)
    return w / w.sum()


def _near(value: float, centres: tuple[float, ...], sigma: float) -> np.ndarray:
    """Chances of ordered answers: the nearer to an answer's centre, the likelier it is."""
    distance = ((value - np.asarray(centres)) / sigma) ** 2
    w = np.exp(-0.5 * (distance - distance.min())) + 0.02
    return w / w.sum()
