"""Galaxy colours from spectral templates: magnitudes in survey filters against type, redshift, slope and dust.

The templates are those of Coleman, Wu & Weedman (1980), extended to the ultraviolet and infrared by Bolzonella et al.
(2000), which GalSim installs with itself: E, Sbc, Scd, Im. A galaxy's type is a real number between 0 (E) and 3 (Im);
between two templates their logarithms are interpolated, so that colours are continuous.

Shape legend: N galaxies, C bands.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["TYPES", "ColourTable", "attenuation", "colour_table"]

TYPES = ("E", "Sbc", "Scd", "Im")

PIVOT_ANGSTROM = 5500.0
STEPS_PER_TYPE = 8
REDSHIFT_MAX = 0.65
REDSHIFT_STEP = 0.005


@dataclass(frozen=True)
class ColourTable:
    """Magnitudes of the template sequence on a grid, for linear interpolation.

    Attributes:
        magnitude: [T, Z, C] AB magnitude of a galaxy with rest-frame magnitude 0 in the last band, distance modulus
            left out (so it holds colour and K correction).
        type_step: Spacing of the type axis, which starts at 0.
        redshift_step: Spacing of the redshift axis, which starts at 0.
        wavelength: [C] effective wavelength of the bands, Angstrom.
    """

    magnitude: np.ndarray
    type_step: float
    redshift_step: float
    wavelength: np.ndarray

    def __call__(self, kind: np.ndarray, redshift: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """Apparent minus absolute magnitude (last band, rest frame), without the distance modulus.

        Args:
            kind: [N] position in the template sequence, 0 (E) to 3 (Im).
            redshift: [N], within the table.
            slope: [N] spectral tilt: the flux is multiplied by (rest wavelength / last band's wavelength) ** slope.

        Returns:
            [N, C] magnitudes.

        Raises:
            ValueError: A type or redshift lies outside the table.
        """
        types, redshifts, _ = self.magnitude.shape
        u, v = np.asarray(kind) / self.type_step, np.asarray(redshift) / self.redshift_step
        for name, x, size, step in (("type", u, types, self.type_step), ("redshift", v, redshifts, self.redshift_step)):
            if x.size and not (x.min() >= 0 and x.max() <= size - 1):
                raise ValueError(
                    f"{name}: must lie in [0, {(size - 1) * step:g}], got {x.min() * step:g} to {x.max() * step:g}"
                )
        i, j = np.minimum(u.astype(int), types - 2), np.minimum(v.astype(int), redshifts - 2)
        fu, fv = (u - i)[:, None], (v - j)[:, None]
        m = self.magnitude
        flat = (m[i, j] * (1 - fv) + m[i, j + 1] * fv) * (1 - fu) + (m[i + 1, j] * (1 - fv) + m[i + 1, j + 1] * fv) * fu
        rest = self.wavelength / (1 + np.asarray(redshift))[:, None]
        return flat - 2.5 * np.asarray(slope)[:, None] * np.log10(rest / self.wavelength[-1])


def attenuation(wavelength: np.ndarray, ebv: np.ndarray) -> np.ndarray:
    """Dust attenuation of a starburst galaxy's stars, Calzetti et al. (2000), their equation 4.

    Args:
        wavelength: Rest wavelength in Angstrom, 1,200 to 22,000.
        ebv: Colour excess E(B-V) of the stars, broadcast against `wavelength`.

    Returns:
        Attenuation in magnitudes.
    """
    micron = np.asarray(wavelength) * 1e-4
    red = 2.659 * (-1.857 + 1.040 / micron)
    blue = 2.659 * (-2.156 + 1.509 / micron - 0.198 / micron**2 + 0.011 / micron**3)
    return ebv * (np.where(micron > 0.63, red, blue) + 4.05)


@functools.cache
def colour_table(filters: tuple[str, ...]) -> ColourTable:
    """Integrate the templates through filter curves.

    Args:
        filters: Names that speclite knows, e.g. "decam2014-g".

    Raises:
        ModuleNotFoundError: GalSim or speclite is not installed.
    """
    import galsim
    import speclite.filters

    curves = speclite.filters.load_filters(*filters)
    spectra = []
    for name in TYPES:
        wavelength, flux = np.loadtxt(Path(galsim.meta_data.share_dir) / "SEDs" / f"CWW_{name}_ext.sed").T
        spectra.append((wavelength, np.log(flux / np.interp(PIVOT_ANGSTROM, wavelength, flux))))

    kinds = np.arange(STEPS_PER_TYPE * (len(TYPES) - 1) + 1) / STEPS_PER_TYPE
    redshifts = np.arange(int(np.ceil(REDSHIFT_MAX / REDSHIFT_STEP)) + 1) * REDSHIFT_STEP
    magnitude = np.empty((len(kinds), len(redshifts), len(filters)))
    for b, curve in enumerate(curves):
        grid, response = np.asarray(curve.wavelength), np.asarray(curve.response)
        zero = np.trapezoid(response / grid, grid)  # AB: photons of a source flat in f_nu
        rest = grid / (1 + redshifts[:, None])
        log_flux = np.stack([np.interp(rest, *spectrum) for spectrum in spectra])  # [4, Z, L]
        for t, kind in enumerate(kinds):
            i = min(int(kind), len(TYPES) - 2)
            flux = np.exp((i + 1 - kind) * log_flux[i] + (kind - i) * log_flux[i + 1]) / (1 + redshifts[:, None])
            magnitude[t, :, b] = -2.5 * np.log10(np.trapezoid(flux * response * grid, grid, axis=1) / zero)
    magnitude -= magnitude[:, :1, -1:]
    return ColourTable(magnitude, 1 / STEPS_PER_TYPE, REDSHIFT_STEP, np.asarray(curves.effective_wavelengths.value))
