"""Emission lines of binned spectra: their fluxes and their common width, at a given redshift.

    f(bin) = a + b x + sum_l F_l (mean over the bin of a unit Gaussian at w_l (1 + z) with standard deviation s)

Lines of one ion have fixed ratios. Fluxes and continuum are linear least squares for each s of a grid; the best s is kept, and
with it the full width at half maximum, 2.355 s. The profile is averaged over the bin, so a width is not widened by bins.

Shape legend: K spectra, L bins, G widths tried, W bins of a window, P parameters.

Sources: vacuum wavelengths of SDSS's table of spectral lines; ratios of [N II] and [O III], Storey and Zeippen 2000 (MNRAS 312,
813) and Osterbrock and Ferland 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BLEND", "H_ALPHA", "H_BETA", "Complex", "Fit", "fit_lines"]

FWHM = 2.0 * math.sqrt(2.0 * math.log(2.0))
BLOCK = 2**24  # numbers of a design at a time
EDGE = 60.0  # angstrom: a line nearer to the end of the spectrum is not fitted


@dataclass(frozen=True)
class Complex:
    """Lines that are fitted together, at one width.

    Attributes:
        name: What tables call it.
        components: By name, (vacuum wavelength in angstrom, relative flux) of the lines of each; the first line has 1.
        reach: Bins to this distance from the first component are fitted, angstrom as observed.
        widths: Least and greatest standard deviation that is tried, angstrom as observed.
    """

    name: str
    components: dict[str, tuple[tuple[float, float], ...]]
    reach: float = 200.0
    widths: tuple[float, float] = (2.0, 30.0)


N_II = ((6585.27, 1.0), (6549.86, 1 / 2.96))
O_III = ((5008.24, 1.0), (4960.295, 1 / 2.98))
S_II = ((6718.294, 1.0), (6732.674, 0.75))
H_ALPHA = Complex("Halpha", {"Halpha": ((6564.614, 1.0),), "[N II]": N_II, "[S II]": S_II}, 260.0)
H_BETA = Complex("Hbeta", {"Hbeta": ((4862.683, 1.0),), "[O III]": O_III}, 260.0)
BLEND = Complex("Halpha and [N II]", {"Halpha": ((6564.614, 1.0),)}, 900.0, (6.0, 300.0))
"""As MMAE's paper measures widths: one Gaussian over all of it."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted lines of K spectra; NaN where the line is not on the spectrum.

    Attributes:
        flux: [K] of each component's first line, in the spectrum's unit times angstrom.
        error: [K] standard errors likewise; of fits without errors, from the residuals.
        fwhm: [K] full width at half maximum in angstrom, as observed.
    """

    flux: dict[str, Tensor]
    error: dict[str, Tensor]
    fwhm: Tensor


def fit_lines(
    wave: Tensor, spectra: Tensor, z: Tensor, lines: Complex, ivar: Tensor | None = None, tried: int = 24
) -> Fit:
    """Fit the lines of a complex.

    Args:
        wave: [L] wavelengths of bins in angstrom, equally spaced.
        spectra: [K, L].
        z: [K] redshifts of the lines.
        lines: The complex.
        ivar: [K, L] inverse variances, 0 where a bin has no data; all are equal if absent.
        tried: Widths G, in even steps of their logarithm.
    """
    window = max(8, 2 * round(lines.reach / float(wave[1] - wave[0])) + 1)
    size = max(1, BLOCK // (window * (2 + len(lines.components))))
    parts = [
        _fit(wave, spectra[i : i + size], z[i : i + size], lines, None if ivar is None else ivar[i : i + size], tried)
        for i in range(0, len(z), size)
    ]
    names = list(lines.components)
    flux, error, fwhm = (torch.cat(p) for p in zip(*parts, strict=True))
    return Fit(dict(zip(names, flux.T, strict=True)), dict(zip(names, error.T, strict=True)), fwhm)


def _fit(
    wave: Tensor, spectra: Tensor, z: Tensor, lines: Complex, ivar: Tensor | None, tried: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fluxes [K, components], their errors, and widths [K]."""
    wave, z = wave.double(), z.double()
    step = float(wave[1] - wave[0])
    half = max(4, round(lines.reach / step))
    centre = next(iter(lines.components.values()))[0][0] * (1 + z)
    place = ((centre - wave[0]) / step).round().long()[:, None] + torch.arange(-half, half + 1)  # K W
    inside = (place >= 0) & (place < len(wave))
    place = place.clamp(0, len(wave) - 1)
    y = spectra.double().gather(1, place)
    weight = inside.double() if ivar is None else ivar.double().gather(1, place) * inside
    x = wave[place] - centre[:, None]
    on = (centre > wave[0] + EDGE) & (centre < wave[-1] - EDGE) & ((weight > 0).sum(1) > 4 + len(lines.components))

    best = torch.full_like(z, math.inf)
    flux = torch.full((len(z), len(lines.components)), math.nan, dtype=torch.float64)
    error, fwhm = flux.clone(), torch.full_like(z, math.nan)
    low, high = (math.log(s) for s in lines.widths)
    for sigma in torch.linspace(low, high, tried).exp().tolist():
        columns = [torch.ones_like(x), x / lines.reach]
        for component in lines.components.values():
            profile = torch.zeros_like(x)
            for at, share in component:
                offset = x - (at * (1 + z) - centre)[:, None]
                ends = (torch.special.ndtr((offset + side * step / 2) / sigma) for side in (1, -1))
                upper, lower = ends
                profile += share * (upper - lower) / step
            columns.append(profile)
        design = torch.stack(columns, dim=2)  # K W P
        weighted = design * weight[..., None]
        # A ridge far below the data's precision keeps lines that no bin of a spectrum sees from being singular.
        normal = weighted.mT @ design + 1e-9 * weight.sum(1)[:, None, None] * torch.eye(
            design.shape[2], dtype=design.dtype
        )
        normal = torch.where(on[:, None, None], normal, torch.eye(design.shape[2], dtype=design.dtype))
        inverse = torch.linalg.inv(normal)
        found = inverse @ (weighted.mT @ y[..., None])
        chi2 = (weight * (y - (design @ found)[..., 0]).square()).sum(1)
        noise = (
            torch.ones_like(chi2) if ivar is not None else chi2 / ((weight > 0).sum(1) - design.shape[2]).clamp(min=1)
        )
        better = on & (chi2 < best)
        best = torch.where(better, chi2, best)
        flux = torch.where(better[:, None], found[:, 2:, 0], flux)
        variance = inverse.diagonal(dim1=1, dim2=2)[:, 2:] * noise[:, None]
        error = torch.where(better[:, None], variance.clamp(min=0).sqrt(), error)
        fwhm = torch.where(better, FWHM * sigma, fwhm)
    return flux, error, fwhm
