"""Pictures of what is filled in: an image of which most is hidden, and a spectrum that the image alone foretells.

Shape legend: C channels, W x W pixels of a crop, T patches of p x p pixels; L bins of a spectrum, S draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from markupsafe import Markup

from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.missing.grid import Shown, masks, pair_method, pairs
from armillary.engine.evaluate.page.figures import INK, MUTED, SERIES, canvas, svg
from armillary.engine.evaluate.page.html import card, figure, picture, row, section, sky, stack
from armillary.engine.evaluate.page.pictures import channels_rgb, data_uri
from armillary.engine.evaluate.study.study import Study
from armillary.models.method import Batch

__all__ = ["Example", "examples", "panels"]

SHOWN_GALAXIES = 5
HIDDEN = (0.5, 0.75)
DRAWS = 64
DRAWN = 3  # of the draws are drawn
POINTS = 320  # of a drawn spectrum
COLOURS = (SERIES[0], SERIES[1], SERIES[3])
GREY = (70, 76, 88)  # of hidden patches


@dataclass(frozen=True)
class Example:
    """One galaxy.

    Attributes:
        image: [C, W, W] as the method is shown it.
        hidden: For each share of `HIDDEN`, [W, W] bool: pixels that were hidden.
        filled: For each of them, [C, W, W] the image with these pixels decoded from the others.
        spectrum: [L] normalised bins, NaN where none of a bin's pixels has data.
        z: [S] draws of the redshift, given the image.
        draws: [S, L] spectra at these.
        true: The spectroscopic redshift.
    """

    image: np.ndarray
    hidden: list[np.ndarray]
    filled: list[np.ndarray]
    spectrum: np.ndarray
    z: np.ndarray
    draws: np.ndarray
    true: float


@torch.no_grad()
def examples(encoder: Encoder, study: Study) -> tuple[np.ndarray, list[Example]]:
    """Wavelengths [L] in angstrom, and galaxies at even steps of redshift among the better measured half of the first ones."""
    method = pair_method(encoder)
    batch = next(pairs(encoder, study, study.test_split, 4 * SHOWN_GALAXIES + 200))
    true = study.label("redshift", batch["row"].cpu().numpy())
    flux, ivar = batch["spectrum"], batch["spectrum_ivar"]
    signal = ((flux * ivar).sum(1) / ivar.sum(1).clamp(min=1e-30).sqrt()).cpu().numpy()
    good = np.flatnonzero(np.isfinite(true) & (signal >= np.median(signal)))
    good = good[np.argsort(true[good], kind="stable")]
    chosen = good[np.linspace(0, len(good) - 1, min(SHOWN_GALAXIES, len(good)) + 2).astype(int)[1:-1]]
    kept = torch.from_numpy(chosen).to(batch["row"].device)
    few = Batch(**{k: v[kept] for k, v in batch.items() if isinstance(v, torch.Tensor)})  # type: ignore[typeddict-item]
    drawn = [masks(method, few["row"], Shown(share, False), study.seed) for share in HIDDEN]
    filled = [method.reconstruct(few, *hidden).image().cpu().numpy() for hidden in drawn]
    answer = method.answer(few, ("image",), ("redshift", "spectrum"), DRAWS, study.seed)
    bins, with_data = (x[:, : method.cut.bins(method.inputs)] for x in method.bins(few, len(kept)))
    size, side = method.cut.patch_size, method.inputs.global_size // method.cut.patch_size
    pixels = [
        patches.unflatten(1, (side, side)).repeat_interleave(size, 1).repeat_interleave(size, 2).cpu().numpy()
        for patches, _ in drawn
    ]
    wave = method.cut.wavelengths(method.inputs).numpy()

    found = []
    for i, galaxy in enumerate(chosen):
        spectrum = torch.where(with_data[i], bins[i], torch.nan)
        z, draws = answer.draws["redshift"][i, :, 0], answer.draws["spectrum"][i]
        image, observed, said, spectra = (x.cpu().numpy() for x in (few["crop"][i], spectrum, z, draws))
        hidden = [p[i] for p in pixels]
        whole = [np.where(h, f[i], image) for h, f in zip(hidden, filled, strict=True)]
        found.append(Example(image, hidden, whole, observed, said, spectra, float(true[galaxy])))
    return wave, found


def panels(name: str, wave: np.ndarray, found: list[Example], *, points: bool) -> Markup:
    """The section of one method; `points` says that it has no p(z), so that all draws are alike."""
    text = (
        "Images: as the method is shown them, with half and three quarters of the patches hidden, and filled in. Spectra: observed "
        "(grey), and what the whole image alone foretells. "
    )
    text += (
        "The method says one redshift and one spectrum."
        if points
        else f"{DRAWN} draws, each at a redshift drawn from p(z); the dashed line is the mean over {DRAWS} draws, whose lines are as "
        "wide as p(z). Right: p(z), and the true redshift as a line."
    )
    cards = [card(_strip(one), _spectra(wave, one, points)) for one in found]
    return section(f"Filled in by {name}", text, stack(cards))


def _strip(one: Example) -> Markup:
    width = one.image.shape[2]
    # Side by side, so that all have the same colours.
    parts = [one.image, *(x for filled in one.filled for x in (one.image, filled))]
    strip = channels_rgb(np.concatenate(parts, axis=2))
    pictures = [strip[:, i * width : (i + 1) * width] for i in range(len(parts))]
    names = ["image"]
    for i, (share, hidden) in enumerate(zip(HIDDEN, one.hidden, strict=True)):
        pictures[1 + 2 * i][hidden[::-1]] = GREY  # rows of a picture run upwards
        names += [f"{share:.0%} hidden", "filled in"]
    figures = [figure(picture(data_uri(p, enlarge=3), n), [n]) for p, n in zip(pictures, names, strict=True)]
    return sky(row(figures, len(figures)))


def _spectra(wave: np.ndarray, one: Example, points: bool) -> Markup:
    drawn, (left, right) = canvas(10, 2.9, columns=2)
    left.get_gridspec().set_width_ratios([3.6, 1])
    every = max(1, len(wave) // POINTS)
    size = len(wave) // every * every
    at = wave[:size].reshape(-1, every).mean(1)

    def binned(y: np.ndarray) -> np.ndarray:
        return y[..., :size].reshape(*y.shape[:-1], -1, every).mean(-1)

    left.plot(at, binned(one.spectrum), color=MUTED, lw=0.9, alpha=0.75)
    if points:
        left.plot(at, binned(one.draws[0]), color=SERIES[0], lw=1.5)
    else:
        for i in range(DRAWN):
            left.plot(at, binned(one.draws[i]), color=COLOURS[i], lw=1.2)
        left.plot(at, binned(one.draws.mean(0)), color=INK, lw=1.2, ls=(0, (4, 2)))
    left.set_xlim(at[0], at[-1])
    left.set_xlabel("wavelength (angstrom)")
    left.set_ylabel("normalised flux")
    if points:
        right.axvline(float(one.z[0]), color=SERIES[0], lw=2, label="said")
    else:
        right.hist(one.z, bins=20, color=SERIES[0], alpha=0.7, density=True)
    right.axvline(one.true, color=INK, lw=1.4, label="true")
    spread = max(0.08, 1.3 * float(np.abs(one.z - one.true).max()))
    right.set_xlim(max(0.0, one.true - spread), one.true + spread)
    right.set_yticks([])
    right.set_xlabel(f"redshift, true {one.true:.3f}")
    return svg(drawn)
