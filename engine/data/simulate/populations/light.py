"""Light of galaxies with given histories: stars, gas and dust in the rest frame, then what an observer sees.

- Stars: the table of simple populations, weighted by the history, linear in log10 of metallicity.
- Gas: all photons beyond the Lyman limit ionise hydrogen; lines of case B at 10^4 K (Osterbrock & Ferland 2006) and the
  metal lines of `spectra.strong_lines`; infrared and sulphur lines in fixed ratios. No nebular continuum.
- Dust: Calzetti et al. (2000); lines are dimmed by E(B-V) of the stars / 0.44. What dust takes is not given back: the light
  ends with the stars, so channels behind 3 micrometres (rest) lack hot dust and the feature at 3.3 micrometres.
- Intergalactic hydrogen: Lyman series of Madau (1995), equations 12 and 15; nothing below the Lyman limit.

Shape legend: N galaxies, M metallicities, A bins of age, W wavelengths of the rest grid.
"""

from __future__ import annotations

import numpy as np

from armillary.engine.data.simulate.populations.histories import Histories, cosmology
from armillary.engine.data.simulate.populations.ssp import SSPTable
from armillary.engine.data.simulate.seds import attenuation
from armillary.engine.data.simulate.spectra import BALMER, strong_lines

__all__ = ["LOG_STEP", "REST_WAVE", "CompositeLight"]

LOG_STEP = 0.004
REST_WAVE = np.exp(np.arange(np.log(800.0), np.log(60_000.0), LOG_STEP))
"""[W] angstrom: the rest grid, and the step of every other grid."""

AGE_EDGES = np.concatenate([[0.0], np.geomspace(0.003, 14.0, 40)])  # Gyr
SUN_ERG = 3.828e33
LYMAN = 911.75
H_ALPHA_A_PHOTON = 1.37e-12  # erg: case B, 10^4 K
LIGHT_ANGSTROM = 2.99792458e18
MICROJANSKY = 1e-29  # erg/s/cm2/Hz
CALZETTI_RV = 4.05

HYDROGEN = {1215.67: 0.82, 10_052.1: 0.0192, 10_941.1: 0.0315, 12_821.6: 0.0569, 18_756.1: 0.118}
HYDROGEN |= {21_661.2: 0.0097, 26_258.7: 0.0159, 40_522.6: 0.0279}
"""Vacuum wavelength in angstrom: flux by that of H alpha. A tenth of Lyman alpha leaves the galaxy."""
METALS = {9071.1: 0.12, 9533.2: 0.30, 6718.3: 0.17, 6732.7: 0.12, 10_832.1: 0.20}
"""[S III], [S II] and He I likewise."""
FOREST = ((1215.67, 0.0036), (1025.72, 0.0017), (972.54, 0.0012), (949.74, 0.00093))


class CompositeLight:
    """Makes light of histories.

    Args:
        table: Simple stellar populations.
    """

    def __init__(self, table: SSPTable) -> None:
        edges = np.exp(np.log(REST_WAVE[0]) + LOG_STEP * (np.arange(len(REST_WAVE) + 1) - 0.5))
        light, self._alive = table.binned(edges, AGE_EDGES)
        self._light = light.reshape(-1, len(REST_WAVE))
        hard = np.linspace(min(table.wavelength[0], 200.0), LYMAN, 400)
        energy = table.binned(hard, AGE_EDGES)[0] * np.diff(hard) * SUN_ERG  # erg/s in each bin
        photon = 6.62607e-27 * LIGHT_ANGSTROM / ((hard[1:] + hard[:-1]) / 2)
        self._photons = (energy / photon).sum(2).ravel()
        self._log_metals = np.log10(table.metallicity)

    def formed_mass(self, galaxies: Histories) -> np.ndarray:
        """[N] Msun ever formed, of which the stellar mass is alive."""
        return galaxies.stellar_mass / (self._weights(galaxies) @ self._alive.ravel())

    def __call__(self, galaxies: Histories) -> np.ndarray:
        """[N, W] float32 flux density in microjansky at observed wavelengths REST_WAVE (1 + z)."""
        weights = self._weights(galaxies) * self.formed_mass(galaxies)[:, None]
        light = weights @ self._light * SUN_ERG  # erg/s/angstrom
        reddening = galaxies.dust[:, None] / CALZETTI_RV
        light *= 10 ** (-0.4 * np.maximum(attenuation(REST_WAVE, reddening), 0))
        light[:, REST_WAVE < LYMAN] = 0
        h_alpha = H_ALPHA_A_PHOTON * (weights @ self._photons)
        centres, ratios = _lines(galaxies.metallicity)
        strength = h_alpha[:, None] * ratios * 10 ** (-0.4 * np.maximum(attenuation(centres, reddening / 0.44), 0))
        bins = np.rint(np.log(centres / REST_WAVE[0]) / LOG_STEP).astype(int)
        for line, b in enumerate(bins):
            light[:, b] += strength[:, line] / (REST_WAVE[b] * LOG_STEP)
        z = galaxies.redshift[:, None]
        blue = REST_WAVE < FOREST[0][0]
        light[:, blue] *= _forest(REST_WAVE[blue], z)
        area = 4 * np.pi * cosmology().distance_cm(galaxies.redshift)[:, None] ** 2
        return (light * (REST_WAVE**2 / LIGHT_ANGSTROM / MICROJANSKY) * (1 + z) / area).astype(np.float32)

    def _weights(self, galaxies: Histories) -> np.ndarray:
        """[N, M A] share of the mass formed in each metallicity and bin of age."""
        before = galaxies.formed_before(AGE_EDGES)
        shares = before[:, :-1] - before[:, 1:]
        place = np.interp(galaxies.metallicity, self._log_metals, np.arange(len(self._log_metals)))
        near = np.maximum(1 - np.abs(place[:, None] - np.arange(len(self._log_metals))), 0)
        return (near[:, :, None] * shares[:, None, :]).reshape(len(place), -1)


def _lines(metallicity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wavelengths [K] in angstrom and fluxes [N, K] by that of H alpha."""
    nitrogen, oxygen = strong_lines(metallicity)
    h_beta = 1 / BALMER["H alpha"]
    one = np.ones_like(metallicity)
    lines = {6564.6: one, 4862.7: h_beta * one, 4341.7: BALMER["H gamma"] * h_beta * one}
    lines |= {4102.9: BALMER["H delta"] * h_beta * one, 3728.5: 1.2 * one}
    lines |= {6585.3: nitrogen, 6549.9: nitrogen / 2.95, 5008.2: oxygen * h_beta, 4960.3: oxygen * h_beta / 2.98}
    lines |= {wave: ratio * one for wave, ratio in (HYDROGEN | METALS).items()}
    return np.array(list(lines)), np.stack(list(lines.values()), axis=1)


def _forest(rest: np.ndarray, redshift: np.ndarray) -> np.ndarray:
    """[N, K] transmission of intergalactic hydrogen at rest wavelengths [K] of sources at redshifts [N, 1]."""
    observed = rest * (1 + redshift)
    depth = sum(a * (observed / line) ** 3.46 * (rest < line) for line, a in FOREST)
    return np.exp(-depth)
