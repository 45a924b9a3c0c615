"""Lines of observed spectra, and of those that methods decode.

Shape legend: M galaxies, S draws, L bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.lines.fits import BLEND, H_ALPHA, H_BETA, fit_lines
from armillary.engine.evaluate.missing.grid import Shown, masks, pair_method, pairs
from armillary.engine.evaluate.study.study import Study
from armillary.models.method import Batch
from armillary.models.mmae.spectrum_bins import scatter_of

__all__ = ["Decoded", "Observed", "decoded", "observed"]

FINE = 5  # pixels of a bin in which lines of observed spectra are fitted: 4 angstrom of DESI's
COARSE = 30  # pixels of a bin in which widths are measured, as MMAE's paper does
DETECTED = 5.0  # of H alpha, signal over noise
DRAWS = 16
OF_MEAN = 64  # draws that a mean is over
REST = np.arange(-220.0, 221.0, 4.0)
"""Angstrom from H alpha at rest, on which spectra are put on top of each other."""


@dataclass(frozen=True, eq=False)
class Observed:
    """Lines of M observed spectra.

    Attributes:
        rows: [M] of the catalogue.
        z: [M] true redshifts.
        scale: [M] rms by which the spectra are normalised, in the survey's flux unit.
        flux: [M] by line, in the survey's flux unit times angstrom; NaN where the line is not on the spectrum.
        error: [M] likewise.
        fwhm: [M] of H alpha with [N II] in bins of 30 pixels, in angstrom.
        stacked: Median of the galaxies' normalised H alpha complex on `REST`, over each one's H alpha flux.
    """

    rows: np.ndarray
    z: np.ndarray
    scale: np.ndarray
    flux: dict[str, np.ndarray]
    error: dict[str, np.ndarray]
    fwhm: np.ndarray
    stacked: np.ndarray

    def ratio(self, over: str, under: str, signal: float = 3.0) -> np.ndarray:
        """[M] log10 of the ratio of two lines, NaN where either is below so many standard errors."""
        sound = [self.flux[n] > signal * self.error[n] for n in (over, under)]
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.log10(self.flux[over] / self.flux[under])
        return np.where(sound[0] & sound[1], found, np.nan)


@dataclass(frozen=True, eq=False)
class Decoded:
    """Lines of the spectra that a method decodes for the same M galaxies.

    Attributes:
        flux: [M, S] by line, as observed.
        fwhm: [M, S].
        stacked: As observed.
    """

    flux: dict[str, np.ndarray]
    fwhm: np.ndarray
    stacked: np.ndarray

    def line(self, name: str) -> np.ndarray:
        """[M] medians over the draws whose line is on the spectrum of its flux; NaN where none is."""
        return _median(self.flux[name], np.isfinite(self.flux[name]))

    def ratio(self, over: str, under: str) -> np.ndarray:
        """[M] medians over draws of log10 of a ratio, NaN where either line is not positive in half of them or more."""
        a, b = self.flux[over], self.flux[under]
        fitted, both = np.isfinite(a) & np.isfinite(b), (a > 0) & (b > 0)
        logs = np.log10(np.where(both, a, 1) / np.where(both, b, 1))
        return _median(logs, both & (2 * both.sum(1) > fitted.sum(1))[:, None])


def _median(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[M] medians of the chosen ones of [M, S]; NaN where none is."""
    found = np.full(len(values), np.nan)
    some = chosen.any(1)
    found[some] = np.nanmedian(np.where(chosen, values, np.nan)[some], axis=1)
    return found


def observed(encoder: Encoder, study: Study, split: str, samples: int, wanted: int) -> Observed:
    """The first galaxies of a split whose H alpha is detected.

    Raises:
        ValueError: There are none, or the survey's wavelengths are not equally spaced.
    """
    assert study.survey.spectrum is not None
    grid = study.survey.spectrum.grid
    if grid.kind != "linear":
        raise ValueError("lines are fitted on equally spaced wavelengths, and the survey's are not")
    wave = torch.from_numpy(grid.angstrom())
    label = study.label("redshift")
    kept: list[tuple[Tensor, ...]] = []
    fits: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    count = 0
    for batch in pairs(encoder, study, split, samples):
        row, flux, ivar = (batch[k].cpu() for k in ("row", "spectrum", "spectrum_ivar"))
        z = torch.from_numpy(label[row.numpy()])
        known = z.isfinite()
        row, flux, ivar, z = row[known], flux[known], ivar[known], z[known]
        if not len(row):
            continue
        at, y, w = _binned(wave, flux, ivar, FINE)
        alpha, beta = (fit_lines(at, y, z, c, w) for c in (H_ALPHA, H_BETA))
        found = alpha.flux["Halpha"] > DETECTED * alpha.error["Halpha"]
        coarse, y30, w30 = _binned(wave, flux, ivar, COARSE)
        width = fit_lines(coarse, y30, z, BLEND, w30).fwhm
        scale = scatter_of(flux, ivar).double()
        shape = _at_rest(at, (y / scale[:, None])[:, None], z[:, None])[:, 0] * (scale / alpha.flux["Halpha"])[:, None]
        kept.append(tuple(x[found] for x in (row, z, scale, width, shape)))
        flux_of, error_of = (
            {n: x[found] for n, x in (a | b).items()} for a, b in ((alpha.flux, beta.flux), (alpha.error, beta.error))
        )
        fits.append((flux_of, error_of))
        count += int(found.sum())
        if count >= wanted:
            break
    if not count:
        raise ValueError(f"split {split!r}: H alpha is detected in none of its spectra of known redshift")
    columns = [torch.cat(x)[:wanted].numpy() for x in zip(*kept, strict=True)]
    flux_by, error_by = ({n: torch.cat([f[i][n] for f in fits])[:wanted].numpy() for n in fits[0][0]} for i in (0, 1))
    return Observed(
        rows=columns[0],
        z=columns[1],
        scale=columns[2],
        flux=flux_by,
        error=error_by,
        fwhm=columns[3],
        stacked=np.nanmedian(columns[4], axis=0),
    )


@torch.no_grad()
def decoded(encoder: Encoder, study: Study, truth: Observed, shown: Shown, samples: int) -> Mapping[str, Decoded]:
    """What a method decodes for the galaxies of `truth`, shown parts of them.

    Returns:
        A method with p(z): "z given", "samples", each at a redshift of its own, and "mean over draws", at the median of p(z).
        One without: "as decoded", at the redshift that it says.
    """
    method = pair_method(encoder)
    wave = method.cut.wavelengths(method.inputs)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch, place in _of(pairs(encoder, study, study.test_split, samples), truth.rows):
        seen = method.reconstruct(batch, *masks(method, batch["row"], shown, study.seed))
        if seen.density is None:
            ways = {"as decoded": seen.redshift[:, None]}
        else:
            given = torch.from_numpy(truth.z[place]).to(seen.redshift.dtype)[:, None].to(seen.redshift.device)
            draws = method.answer(
                batch, ("image", "spectrum") if shown.spectrum else ("image",), ("redshift",), OF_MEAN, study.seed
            )
            z = draws.draws["redshift"][..., 0]
            ways = {"z given": given, "samples": z[:, :DRAWS], "mean over draws": z}
        for name, z in ways.items():
            spectra = seen.spectra(z)
            if name == "mean over draws":
                spectra, z = spectra.mean(1, keepdim=True), seen.redshift[:, None]
            parts.setdefault(name, []).append((spectra.cpu(), z.cpu()))
    measured = {}
    for name, found in parts.items():
        spectra, z = torch.cat([s for s, _ in found]), torch.cat([z for _, z in found])
        measured[name] = _measured(wave, spectra, z, truth, method.cut.bin_pixels)
    return measured


def _measured(wave: Tensor, spectra: Tensor, z: Tensor, truth: Observed, pixels: int) -> Decoded:
    """Lines of normalised spectra [M, S, L] at redshifts [M, S]."""
    m, s = z.shape
    scaled = spectra.double() * torch.from_numpy(truth.scale)[:, None, None]
    flat, at = scaled.flatten(0, 1), z.double().flatten()
    flux = fit_lines(wave, flat, at, H_ALPHA).flux | fit_lines(wave, flat, at, H_BETA).flux
    coarse, wide, _ = _binned(wave, flat, torch.ones_like(flat), max(1, COARSE // pixels))
    fwhm = fit_lines(coarse, wide, at, BLEND).fwhm
    by_name = {n: f.unflatten(0, (m, s)).numpy() for n, f in flux.items()}
    shape = _at_rest(wave, scaled, z.double()).numpy() / truth.flux["Halpha"][:, None, None]
    return Decoded(by_name, fwhm.unflatten(0, (m, s)).numpy(), np.nanmedian(shape, axis=(0, 1)))


def _of(batches: Iterator[Batch], rows: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
    """Parts of batches that are rows [M] in their order, and their places there."""
    done = 0
    for batch in batches:
        mine = batch["row"].cpu().numpy()
        inside = np.isin(mine, rows)
        if inside.any():
            where = torch.from_numpy(inside).to(batch["row"].device)
            part = Batch(**{k: v[where] for k, v in batch.items() if isinstance(v, Tensor)})  # type: ignore[typeddict-item]
            yield part, np.arange(done, done + int(inside.sum()))
            done += int(inside.sum())
        if done == len(rows):
            return


def _binned(wave: Tensor, flux: Tensor, ivar: Tensor, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Wavelengths, means weighted with ivar, and their inverse variance, of bins of some pixels."""
    y, w = (x.double().unfold(1, pixels, pixels) for x in (flux, ivar))
    total = w.sum(2)
    mean = (torch.where(w > 0, y, 0.0) * w).sum(2) / torch.where(total > 0, total, 1.0)
    return wave.double().unfold(0, pixels, pixels).mean(1), mean, total


def _at_rest(wave: Tensor, spectra: Tensor, z: Tensor) -> Tensor:
    """Spectra [M, S, L] around H alpha at rest on `REST`, in flux an angstrom at rest, without their continuum; NaN beyond the spectrum."""
    target = next(iter(H_ALPHA.components.values()))[0][0] + torch.from_numpy(REST)
    place = (target * (1 + z[..., None]) - wave[0]) / (wave[1] - wave[0])
    low = place.floor().long().clamp(0, len(wave) - 2)
    part = place - low
    values = torch.lerp(spectra.double().gather(2, low), spectra.double().gather(2, low + 1), part)
    values = torch.where((place >= 0) & (place <= len(wave) - 1), values, torch.nan)
    aside = torch.from_numpy(np.abs(REST) > 120)
    return (values - values[..., aside].nanmedian(2, keepdim=True).values) * (1 + z[..., None])
