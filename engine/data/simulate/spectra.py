"""Noiseless spectra of simulated galaxies as a 1.5 arcsec fibre sees them, on DESI's wavelength grid.

Continuum: the templates, slope and dust that make the image's colours (see `seds`), bulge and disk each scaled to its
light in the fibre. The templates have a point every 50 Angstrom or so; lines are drawn on top of them, and the late
types' own blurred emission lines are cut out:

- absorption, as factors exp(-depth * Gaussian): Ca K and H, G band, the Balmer series, Mg b, Fe, Na D, TiO and the Ca II
  triplet. Metal lines deepen with metallicity and age, Balmer lines are deep in young populations. The forms are rough
  fits by hand to SDSS and DESI spectra; no stellar library is behind them.
- emission from the star-formation rate: L(H alpha) = SFR / 7.9e-42 erg/s (Kennicutt 1998; SFR times 1.6 from Salpeter's
  to Kroupa's mass function), Balmer lines in the ratios of case B at 10^4 K (Osterbrock & Ferland 2006: H alpha / H beta
  2.86), [N II] and [O III] from the metallicity by N2 and O3N2 of Pettini & Pagel (2004), [O II] / H alpha 1.2 (Kewley,
  Geller & Jansen 2004), all dimmed by the dust of the gas, E(B-V) of the stars / 0.44 (Calzetti et al. 2000).

Widths add in quadrature: the line's own, the velocity dispersion, and the spectrograph's resolution
R = 2000 + 3000 (wavelength - 3600) / 6200, which follows that of DESI's three arms (DESI Collaboration 2022).

Shape legend: L pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import chndtr, gammaincinv, ndtr

from armillary.engine.data.format.survey import WaveGrid
from armillary.engine.data.simulate.seds import TYPES, attenuation
from armillary.engine.data.simulate.stellar_populations import Stars, luminosity_distance_cm

__all__ = [
    "ABSORPTION",
    "EMISSION",
    "Feature",
    "Motion",
    "SpectrumModel",
    "emission_fluxes",
    "fibre_share",
    "resolution",
    "strong_lines",
]

FIBRE_ARCSEC = 1.5  # diameter
FIBRE_SEEING_ARCSEC = 1.1
LIGHT_SPEED = 299_792.458  # km/s
NANOMAGGY = 3.631e-29 * 2.99792458e18 / 1e-17  # 1e-17 erg/s/cm2 Angstrom, to be divided by Angstrom^2
REACH = 5.0  # sigmas to which a line is drawn
EMITTING = ((3680.0, 3770.0), (3845.0, 3885.0), (4845.0, 4880.0), (4925.0, 5045.0))
"""Angstrom: where templates of late types hold blurred emission lines; their points there are left out."""
PIVOT_FILTER = "decam2014-r"
PIVOT_BAND = 6420.0  # Angstrom; only to keep exponents small
KENNICUTT = 7.9e-42
KROUPA = 1.6

EMISSION = {
    "[O II] 3726": 3727.092,
    "[O II] 3729": 3729.875,
    "H delta": 4102.892,
    "H gamma": 4341.684,
    "H beta": 4862.683,
    "[O III] 4959": 4960.295,
    "[O III] 5007": 5008.240,
    "[O I] 6300": 6302.046,
    "[O I] 6363": 6365.536,
    "[N II] 6548": 6549.86,
    "H alpha": 6564.614,
    "[N II] 6583": 6585.27,
    "[S II] 6716": 6718.294,
    "[S II] 6731": 6732.674,
}
"""Vacuum wavelengths in Angstrom: SDSS, Table of Spectral Lines, from the NIST Atomic Spectra Database."""


@dataclass(frozen=True)
class Feature:
    """One absorption feature.

    Attributes:
        wavelength: Vacuum, rest frame, Angstrom.
        width: Equivalent width in Angstrom, at solar metallicity and 8 Gyr (metals) or 4 Gyr (Balmer lines).
        sigma: Own width, Angstrom.
        metals: Power of the metallicity in the equivalent width; that of the Balmer lines is 0.
        age: Power of the age.
    """

    wavelength: float
    width: float
    sigma: float
    metals: float
    age: float


ABSORPTION = {
    "CN 3883": Feature(3862.0, 7.0, 16.0, 0.6, 0.5),
    "Ca K": Feature(3934.777, 7.0, 6.0, 0.25, 0.45),
    "Ca H": Feature(3969.588, 6.0, 6.0, 0.25, 0.45),
    "H zeta": Feature(3890.151, 2.2, 4.5, 0.0, -0.9),
    "H epsilon": Feature(3971.195, 2.6, 5.0, 0.0, -0.9),
    "H delta": Feature(4102.892, 3.2, 5.0, 0.0, -0.9),
    "Ca I 4227": Feature(4227.9, 1.2, 4.0, 0.6, 0.4),
    "G band": Feature(4305.61, 5.5, 9.0, 0.35, 0.4),
    "H gamma": Feature(4341.684, 2.8, 5.0, 0.0, -0.9),
    "Fe 4383": Feature(4384.8, 3.5, 6.0, 0.6, 0.35),
    "Fe 4531": Feature(4532.5, 2.2, 7.0, 0.5, 0.3),
    "Fe 4668": Feature(4669.5, 4.0, 10.0, 0.9, 0.3),
    "H beta": Feature(4862.683, 2.4, 4.5, 0.0, -0.7),
    "Mg H": Feature(5110.0, 4.0, 20.0, 0.6, 0.4),
    "Mg b 1": Feature(5168.74, 1.5, 3.5, 0.6, 0.35),
    "Mg b 2": Feature(5174.13, 1.7, 3.5, 0.6, 0.35),
    "Mg b 3": Feature(5185.05, 1.5, 3.5, 0.6, 0.35),
    "Fe 5270": Feature(5271.5, 2.6, 6.0, 0.5, 0.25),
    "Fe 5335": Feature(5331.5, 2.2, 6.0, 0.5, 0.25),
    "Na D 2": Feature(5891.58, 1.7, 2.5, 0.8, 0.3),
    "Na D 1": Feature(5897.56, 1.4, 2.5, 0.8, 0.3),
    "TiO 6230": Feature(6232.0, 4.0, 25.0, 0.7, 0.5),
    "H alpha": Feature(6564.614, 1.6, 4.0, 0.0, -0.6),
    "TiO 7150": Feature(7130.0, 8.0, 35.0, 0.7, 0.5),
    "Ca II 8500": Feature(8500.36, 1.3, 3.5, 0.3, 0.1),
    "Ca II 8544": Feature(8544.44, 3.4, 4.0, 0.3, 0.1),
    "Ca II 8664": Feature(8664.52, 2.8, 4.0, 0.3, 0.1),
}
"""SDSS's table for the strong lines, NIST for Mg b, Na D and Ca I; bands and blends by their Lick centres in vacuum."""

BALMER_AGE, METAL_AGE = 4.0, 8.0
BALMER = {"H alpha": 2.86, "H beta": 1.0, "H gamma": 0.469, "H delta": 0.259}
_CENTRES = np.array([f.wavelength for f in ABSORPTION.values()])
_LINES = np.array(list(EMISSION.values()))


@dataclass(frozen=True)
class Motion:
    """Velocity dispersions along the line of sight in km/s.

    Attributes:
        bulge: Of the bulge's stars.
        disk: Of the disk's stars and of the gas, their rotation included.
    """

    bulge: float
    disk: float

    @classmethod
    def of(cls, stars: Stars, axis_disk: float) -> Motion:
        """From the masses: Faber-Jackson for the bulge, Tully-Fisher and the disk's inclination for the rest."""
        bulge = 190 * (float(stars.mass[0]) / 1e11) ** 0.29
        rotation = 210 * (float(stars.mass.sum()) / 10**10.8) ** 0.25
        tilt = math.sqrt(max(0.0, 1 - axis_disk**2))
        return cls(min(max(bulge, 40.0), 350.0), math.hypot(30.0, 0.45 * rotation * tilt))


def resolution(wavelength: np.ndarray) -> np.ndarray:
    """Resolving power lambda / FWHM at observed wavelengths in Angstrom."""
    return 2000 + 3000 * (np.asarray(wavelength) - 3600) / 6200


def fibre_share(sersic: float, radius: float, axis: float) -> float:
    """Share of a Sersic profile's light in a centred fibre of 1.5 arcsec under Gaussian seeing of 1.1 arcsec.

    The profile is taken as points at quantiles of its light; the light of a point at distance r that the seeing brings
    into the fibre is the distribution of a non-central chi^2. Pointing errors and the PSF's wings are left out.

    Args:
        sersic: Sersic index.
        radius: Half-light radius before the shear, arcsec.
        axis: Minor over major axis; the shear keeps the area, as GalSim's does.
    """
    quantiles = (np.arange(64) + 0.5) / 64
    r = radius * (gammaincinv(2 * sersic, quantiles) / gammaincinv(2 * sersic, 0.5)) ** sersic
    angle = (np.arange(8) + 0.5) * np.pi / 16
    distance = r[:, None] * np.hypot(np.cos(angle) / math.sqrt(axis), np.sin(angle) * math.sqrt(axis))
    sigma = FIBRE_SEEING_ARCSEC / 2.3548
    return float(np.interp(distance / sigma, _STEPS, _ENTERING, right=0.0).mean())


_STEPS = np.linspace(0, 12, 600)  # of the seeing's sigma
_ENTERING = chndtr((FIBRE_ARCSEC / 2 / (FIBRE_SEEING_ARCSEC / 2.3548)) ** 2, 2, _STEPS**2)


def emission_fluxes(stars: Stars, fibre: np.ndarray, burst: float = 1.0) -> dict[str, float]:
    """Flux of each line of `EMISSION` in the fibre, in 1e-17 erg/s/cm2.

    Args:
        stars: Star-formation rates, dust, metallicity, redshift.
        fibre: [2] share of bulge and disk in the fibre.
        burst: Present star-formation rate by its mean.
    """
    area = 4 * math.pi * luminosity_distance_cm(stars.redshift) ** 2
    gas = stars.ebv[:, None] / 0.44
    h_alpha = stars.mass * stars.ssfr * burst * KROUPA / KENNICUTT / area * fibre / 1e-17  # [2]
    by_h_alpha, by_h_beta = strong_lines(stars.metallicity)
    h_beta = h_alpha / BALMER["H alpha"]
    nitrogen, oxygen3 = h_alpha * by_h_alpha, h_beta * by_h_beta
    intrinsic = {name: h_beta * ratio for name, ratio in BALMER.items()}
    intrinsic |= {"[O II] 3726": 1.2 * h_alpha / 2.35, "[O II] 3729": 1.2 * h_alpha * 1.35 / 2.35}
    intrinsic |= {"[O III] 5007": oxygen3, "[O III] 4959": oxygen3 / 2.98}
    intrinsic |= {"[O I] 6300": 0.04 * h_alpha, "[O I] 6363": 0.04 * h_alpha / 3.0}
    intrinsic |= {"[N II] 6583": nitrogen, "[N II] 6548": nitrogen / 2.95}
    intrinsic |= {"[S II] 6716": 0.17 * h_alpha, "[S II] 6731": 0.12 * h_alpha}
    dimming = 10 ** (-0.4 * attenuation(_LINES, gas))  # [2, lines]
    return {name: float((intrinsic[name] * dimming[:, i]).sum()) for i, name in enumerate(EMISSION)}


def strong_lines(metallicity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N II] 6583 by H alpha, and [O III] 5007 by H beta, of gas whose stars have this log10 of solar metallicity.

    N2 and O3N2 of Pettini & Pagel (2004), their equations 1 and 3.
    """
    oxygen = np.clip(8.69 + 0.6 * metallicity, 7.9, 8.72)  # 12 + log O/H of the gas, on the scale of N2
    n2 = (oxygen - 8.90) / 0.57
    return 10**n2, 10 ** ((8.73 - oxygen) / 0.32 + n2)


class SpectrumModel:
    """Noiseless spectra on one grid.

    Args:
        grid: A linear grid of vacuum wavelengths that covers the r band.

    Raises:
        ModuleNotFoundError: GalSim or speclite is not installed.
        ValueError: The grid is not linear.
    """

    def __init__(self, grid: WaveGrid) -> None:
        import galsim
        import speclite.filters

        if grid.kind != "linear":
            raise ValueError(f"grid: must be linear, got {grid.kind}")
        self.wavelength = grid.angstrom()
        self._first, self._step = float(self.wavelength[0]), float(self.wavelength[1] - self.wavelength[0])
        self._templates = []
        for name in TYPES:
            at, flux = np.loadtxt(Path(galsim.meta_data.share_dir) / "SEDs" / f"CWW_{name}_ext.sed").T
            near = (at > 1500) & (at < 12_000)
            for low, high in EMITTING if name != "E" else ():
                near &= (at < low) | (at > high)
            self._templates.append((at[near], np.log(flux[near] / np.interp(5500.0, at, flux))))
        curve = speclite.filters.load_filter(PIVOT_FILTER)
        response = np.interp(self.wavelength, curve.wavelength, curve.response, left=0, right=0)
        # Photons of a spectrum by those of one that is flat in f_nu at one nanomaggy.
        self._band = response * self.wavelength / (NANOMAGGY * (response / self.wavelength).sum())

    def __call__(self, stars: Stars, flux: np.ndarray, fibre: np.ndarray, motion: Motion, burst: float) -> np.ndarray:
        """[L] float64 spectrum of the galaxy in the fibre, 1e-17 erg/s/cm2/Angstrom.

        Args:
            stars: Stellar populations.
            flux: [2] flux of bulge and disk in the r band, nanomaggies.
            fibre: [2] share of each in the fibre.
            motion: Velocity dispersions.
            burst: Present star-formation rate by its mean.
        """
        speeds = (motion.bulge, motion.disk)
        total = np.zeros(len(self.wavelength))
        for i, speed in enumerate(speeds):
            light = self.continuum(stars, i) * (float(flux[i]) * float(fibre[i]))
            total += light * np.exp(-self._absorption(stars, i, speed))
        fluxes = np.array(list(emission_fluxes(stars, fibre, burst).values()))
        return total + self.lines(stars.redshift, fluxes, motion.disk)

    def continuum(self, stars: Stars, component: int) -> np.ndarray:
        """[L] template of the bulge (0) or disk (1) with slope and dust; one nanomaggy in the r band."""
        rest = self.wavelength / (1 + stars.redshift)
        kind = float(stars.kind[component])
        i = min(int(kind), len(TYPES) - 2)
        low, high = (np.interp(rest, *self._templates[k]) for k in (i, i + 1))
        log = (i + 1 - kind) * low + (kind - i) * high + float(stars.slope[component]) * np.log(rest / PIVOT_BAND)
        ebv = float(stars.ebv[component])
        if ebv > 0:
            log = log - 0.4 * math.log(10) * attenuation(rest, np.asarray(ebv))
        light = np.exp(log)
        return light / float(light @ self._band)

    def lines(self, redshift: float, fluxes: np.ndarray, speed: float) -> np.ndarray:
        """[L] emission lines, exactly their flux summed over pixels.

        Args:
            redshift: Where they are.
            fluxes: Of each line of `EMISSION`, in the order of that table.
            speed: Velocity dispersion, km/s.
        """
        out = np.zeros(len(self.wavelength))
        centres = _LINES * (1 + redshift)
        sigmas = np.hypot(centres * speed / LIGHT_SPEED, _instrument(centres))
        for centre, sigma, flux in zip(centres, sigmas, fluxes, strict=True):
            low, high = self._window(centre, sigma)
            if high > low:
                edges = (self._first + self._step * (np.arange(low, high + 1) - 0.5) - centre) / sigma
                out[low:high] += flux * np.diff(ndtr(edges)) / self._step
        return out

    def _absorption(self, stars: Stars, component: int, speed: float) -> np.ndarray:
        """[L] optical depth of the absorption lines of one component."""
        age, metals = float(stars.age[component]), float(stars.metallicity[component])
        out = np.zeros(len(self.wavelength))
        stretch = 1 + stars.redshift
        centres = _CENTRES * stretch
        broadening = np.hypot(centres * speed / LIGHT_SPEED, _instrument(centres))
        for feature, centre, blur in zip(ABSORPTION.values(), centres, broadening, strict=True):
            width = feature.width * (age / (METAL_AGE if feature.metals else BALMER_AGE)) ** feature.age
            width = min(width * 10 ** (feature.metals * metals), 12.0)
            sigma = math.hypot(feature.sigma * stretch, float(blur))
            low, high = self._window(centre, sigma)
            if high > low:
                x = (self.wavelength[low:high] - centre) / sigma
                out[low:high] += width * stretch / (math.sqrt(2 * math.pi) * sigma) * np.exp(-0.5 * x * x)
        return out

    def _window(self, centre: float, sigma: float) -> tuple[int, int]:
        """Pixels [low, high) within reach of a line."""
        low = math.floor((centre - REACH * sigma - self._first) / self._step)
        high = math.ceil((centre + REACH * sigma - self._first) / self._step) + 1
        return max(low, 0), min(high, len(self.wavelength))


def _instrument(wavelength: np.ndarray) -> np.ndarray:
    """Sigma of the spectrograph's line profile in Angstrom."""
    return wavelength / resolution(wavelength) / 2.3548
