"""Our own table of simple stellar populations: smooth light of stars of one age and metallicity, with no library behind it.

Main sequence: Chabrier's (2003) mass function from 0.1 to 100 Msun; lifetimes of Raiteri, Villata & Navarro (1996, their
equation 3); luminosities and temperatures of Eker et al. (2018, their tables 4 and 5), brighter by age. Evolved stars: light
by the fuel that is burnt behind the turn-off (Renzini & Buzzoni 1986), in four phases (supergiants, first giant branch, core
helium, asymptotic giant branch) whose fuel and temperatures are rough fits by hand. Each star shines as a black body with the
breaks that matter for broad bands: Lyman and Balmer edges, blanketing by metals below 4,000 A, TiO and CN in cool stars, the H-
bump at 1.6 micrometres, CO and water behind it.

What that is good for: a population whose colours, mass-to-light ratios and breaks follow age and metallicity in the right
direction and by about the right amount, to develop and to compare methods on one footing. What it is not good for: absolute
predictions. `docs/data.md` says by how much it differs from Bruzual & Charlot (2003). There are no absorption lines, no dust of
AGB stars, no binaries, no blue horizontal branch, no light behind 6 micrometres.

Shape legend: M metallicities, A ages, S stars, P phases, L wavelengths.
"""

from __future__ import annotations

import functools

import numpy as np

from armillary.engine.data.simulate.populations.ssp import SSPTable

__all__ = ["smooth_ssp"]

METALLICITIES = (0.02, 0.2, 0.4, 1.0, 2.5)  # of the Sun's
SUN = 0.02
AGES_GYR = np.concatenate([np.geomspace(1e-3, 1e-2, 7), np.geomspace(1.3e-2, 14.0, 45)])
WAVE = np.geomspace(91.0, 60_000.0, 3200)  # angstrom
MASSES = np.geomspace(0.1, 100.0, 1201)
LOWEST_RATE = 1e-300

LUMINOSITY = (
    (2.028, -0.976),
    (4.572, -0.102),
    (5.743, -0.007),
    (4.329, 0.010),
    (3.967, 0.093),
    (2.865, 1.105),
    (1.7, 2.842),
)
"""Slope and intercept of log L in log M, below 0.45, 0.72, 1.05, 2.4, 7, 31 and above; the last is not Eker's."""

PLANCK, LIGHT, BOLTZMANN = 6.62607e-27, 2.99792e10, 1.38065e-16


def _mass_function(mass: np.ndarray) -> np.ndarray:
    """Stars a unit of mass and Msun formed: Chabrier (2003), equation 17."""
    low = np.exp(-0.5 * ((np.log10(mass) - np.log10(0.079)) / 0.69) ** 2) / mass
    high = np.exp(-0.5 * (np.log10(0.079) / 0.69) ** 2) * mass**-2.3
    number = np.where(mass < 1, low, high)
    return number / np.trapezoid(number * mass, mass)


def _lifetime_gyr(mass: np.ndarray, metals: float) -> np.ndarray:
    """Main-sequence lifetime: Raiteri, Villata & Navarro (1996), equation 3."""
    z = np.log10(metals * SUN)
    a = 10.13 + 0.07547 * z - 0.008084 * z**2
    b = -4.424 - 0.7939 * z - 0.1187 * z**2
    c = 1.262 + 0.3385 * z + 0.05417 * z**2
    x = np.log10(mass)
    return 10 ** (a + b * x + c * x**2 - 9)


def _dwarfs(mass: np.ndarray, metals: float) -> tuple[np.ndarray, np.ndarray]:
    """Luminosity in Lsun and temperature in kelvin of stars amid their main sequence."""
    x = np.log10(mass)
    below = [mass < m for m in (0.45, 0.72, 1.05, 2.4, 7.0, 31.0)]
    pieces = [a * x + b for a, b in LUMINOSITY]
    log_l = np.select(below, pieces[:-1], pieces[-1])
    radius = 0.438 * mass**2 + 0.479 * mass + 0.075
    cool = 5772 * (10**log_l / radius**2) ** 0.25
    hot = 10 ** (-0.170 * x**2 + 0.888 * x + 3.671)
    return 10**log_l, np.where(mass < 1.5, cool, hot) * metals**-0.03


def _phases(age: float, metals: float, turn_off: float) -> list[tuple[float, float, float]]:
    """(fuel in Msun, temperature in kelvin, depth of molecular bands) of each phase of evolved stars."""
    t, z = np.log10(age) + 9, np.log10(metals)
    old = 1 / (1 + np.exp(-(t - 9.15) / 0.1))
    young = 1 / (1 + np.exp((t - 7.7) / 0.15))
    red = young / (1 + np.exp(-(t - 6.9) / 0.04))
    clump = 4650 - 300 * z + (1 - old) * 900
    return [
        (0.035 * turn_off * red, 3800 - 300 * z, 0.8),
        (0.03 * turn_off * young, 18_000.0, 0.0),
        (0.19 * old, 4150 - 650 * z - 150 * (t - 10), 0.6),
        ((0.10 + 0.02 * (1 - old)) * (1 - young), clump, 0.1),
        ((0.06 + 0.08 * np.exp(-0.5 * ((t - 8.95) / 0.3) ** 2)) * (1 - young), 3050 - 350 * z, 1.0),
    ]


def _step(x: np.ndarray, width: float) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / width))


def _light(temperature: np.ndarray, bands: np.ndarray, metals: float) -> np.ndarray:
    """[S, L] light an angstrom of stars of unit luminosity; `bands` [S] is the depth of molecular bands of giants."""
    t = temperature[:, None]
    cm = WAVE * 1e-8
    with np.errstate(over="ignore"):
        light = cm**-5 / np.expm1(np.minimum(PLANCK * LIGHT / (BOLTZMANN * cm * t), 600))
    micron = WAVE * 1e-4
    below = _step(-np.log(WAVE / 3700), 0.012)  # the Balmer edge, with the crowded lines before it
    edge = 0.85 * np.exp(-0.5 * ((np.log10(t) - 4.0) / 0.19) ** 2) + 0.08 * (t > 15_000)
    depth = np.clip((7300 - t) / 2600, 0, 1.4)
    blanket = (
        depth * metals**0.5 * (0.5 * _step(-np.log(WAVE / 4020), 0.02) + 0.55 * np.clip(np.log(4600 / WAVE), 0, 2))
    )
    cool = np.clip((4300 - t) / 900, 0, 1.5) * metals**0.3
    tio = sum(a * np.exp(-0.5 * (np.log(micron / c) / w) ** 2) for c, w, a in TIO)
    water = sum(a * np.exp(-0.5 * (np.log(micron / c) / w) ** 2) for c, w, a in WATER)
    bump = 0.30 * np.exp(-0.5 * (np.log(micron / 1.75) / 0.2) ** 2) * np.clip((6500 - t) / 2500, 0, 1)
    tau = edge * below * 1.1 + blanket + cool * tio + bands[:, None] * water - bump
    lyman = _step(np.log(WAVE / 912), 0.005)
    open_ = 1 / (1 + np.exp(np.clip(-(t - 33_000) / 2500, -60, 60)))  # how much of the Lyman continuum comes out
    light = light * np.exp(-tau) * (lyman + (1 - lyman) * open_)
    return light / np.trapezoid(light, WAVE, axis=1)[:, None]


TIO = ((0.62, 0.025, 0.25), (0.715, 0.03, 0.5), (0.78, 0.02, 0.25), (0.85, 0.02, 0.3), (0.935, 0.03, 0.25))
WATER = ((1.4, 0.05, 0.12), (1.9, 0.04, 0.12), (2.4, 0.04, 0.15), (2.75, 0.1, 0.15), (4.6, 0.08, 0.12))


def _remnant(mass: np.ndarray) -> np.ndarray:
    """Msun that a dead star leaves: Kalirai et al. (2008) for white dwarfs, then neutron stars, then black holes."""
    return np.where(mass < 8, 0.109 * mass + 0.394, np.where(mass < 25, 1.4, 0.25 * mass))


@functools.cache
def smooth_ssp() -> SSPTable:
    """Compute the table; half a second, once a process."""
    number = _mass_function(MASSES)
    edges = np.concatenate([[MASSES[0]], np.sqrt(MASSES[1:] * MASSES[:-1]), [MASSES[-1]]])
    stars = number * np.diff(edges)
    luminosity = np.zeros((len(METALLICITIES), len(AGES_GYR), len(WAVE)))
    alive = np.zeros((len(METALLICITIES), len(AGES_GYR)))
    for m, metals in enumerate(METALLICITIES):
        lifetime = _lifetime_gyr(MASSES, metals)
        bright, hot = _dwarfs(MASSES, metals)
        grid = np.geomspace(2200, 60_000, 120)
        library = _light(grid, np.zeros(len(grid)), metals)
        for a, age in enumerate(AGES_GYR):
            spent = age / lifetime
            # A mass that dies within the step of the grid counts in part, so that light falls smoothly with age.
            living = np.clip(
                (1 - spent) / np.gradient(np.log(lifetime), np.log(MASSES)).clip(None, -0.5) * -200 + 0.5, 0, 1
            )
            s = np.clip(spent, 0, 1)
            power = stars * living * bright * (0.6 + 0.9 * s**1.5)
            temperature = np.clip(hot * (1 - 0.10 * s**2), grid[0], grid[-1])
            place = np.interp(np.log(temperature), np.log(grid), np.arange(len(grid)))
            i = np.minimum(place.astype(int), len(grid) - 2)
            share = np.bincount(i, power * (1 - place + i), len(grid)) + np.bincount(
                i + 1, power * (place - i), len(grid)
            )
            light = share @ library
            turn_off = float(np.exp(np.interp(-np.log(age), -np.log(lifetime), np.log(MASSES))))
            # Stars a year that leave the main sequence, by Msun formed (Renzini & Buzzoni 1986, equation 2).
            slope = np.interp(-np.log(age), -np.log(lifetime), np.gradient(MASSES, lifetime * 1e9))
            rate = np.interp(turn_off, MASSES, number) * abs(slope) if age > lifetime[-1] else 0.0
            fuel, cool, bands = np.array(_phases(age, metals, turn_off)).T
            light = light + (9.75e10 * rate * fuel) @ _light(cool, bands, metals)
            luminosity[m, a] = light
            alive[m, a] = (stars * (living * MASSES + (1 - living) * np.minimum(_remnant(MASSES), MASSES))).sum()
    return SSPTable(WAVE, AGES_GYR, np.array(METALLICITIES), luminosity, alive)
