"""What a spectrum encoder does, shown at work: gaps that it fills in, and where the alignment's heads look.

Shape legend: M spectra, L pixels, N tokens, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from armillary.engine.config.provenance import survey_fingerprint
from armillary.engine.data.loading.loader import SequentialLoader
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.spectra.figures import attention_over_wavelength, fill_scores, mask_filling
from armillary.engine.evaluate.study.study import Outcome, Study
from armillary.models.astroclip.astroclip import AstroCLIPMethod
from armillary.models.method import Batch, BatchKey, Method
from armillary.models.specformer.specformer import SpectrumTransformer
from armillary.models.specformer.spectrum_filling import fill_hidden
from armillary.models.specformer.spectrum_masking import chunk_masks

__all__ = ["attention", "masking", "spectrum_encoder"]

SCORED = 256  # spectra whose gaps are filled and scored,
SHOWN = 4  # and drawn: at even steps of redshift
CHUNKS = 6
HIDDEN_SHARE = 50 / 778  # of the tokens in each chunk, as AstroCLIP's released code


def spectrum_encoder(method: Method) -> SpectrumTransformer | None:
    """The masked spectrum encoder in a method; None where it has none."""
    prefix = method.encoders().get("spectrum")
    found = None if prefix is None else method.get_submodule(prefix.rstrip("."))
    return found if isinstance(found, SpectrumTransformer) else None


def masking(study: Study, encoders: Sequence[Encoder], samples: int = SCORED) -> Outcome:
    """Hide parts of test spectra and let the first encoder that was trained so fill them in.

    Args:
        study: The survey.
        encoders: Of runs; one has a masked spectrum encoder.
        samples: Test objects to look at, the first ones; 256 at most.

    Returns:
        Mean squared error over hidden pixels, in units of a spectrum's variance, of the encoder, of the spectrum's mean, of
        a straight line over the gap and of the noise alone; and pictures.
    """
    encoder, network = next((e, n) for e in encoders if (n := spectrum_encoder(e.method)) is not None)
    batch = _spectra(study, encoder, samples)
    spectrum, ivar = batch["spectrum"], batch["spectrum_ivar"]
    tokens = network.shape.tokens(spectrum.shape[1])
    width = max(1, min(round(HIDDEN_SHARE * tokens), tokens // CHUNKS - 1))
    key = BatchKey(seed=study.seed, epoch=0, first_position=0, global_batch=len(spectrum))
    mask = chunk_masks(batch["row"], key, tokens, chunks=CHUNKS, width=width)
    filled, hidden = (x.cpu().numpy() for x in fill_hidden(network, spectrum, ivar, mask))
    flux, weight = spectrum.cpu().numpy(), ivar.cpu().numpy()
    measures = fill_scores(flux, weight, filled, hidden, features=encoder.run.name, edge=network.shape.window)
    error = {m.model: m for m in measures}
    line = (
        f"gaps of {CHUNKS} x {width} windows filled with a squared error of {error['model'].value:.3f} ± "
        f"{error['model'].error:.3f} of a spectrum's variance; its mean gives {error['mean'].value:.3f}, a straight line "
        f"{error['interpolation'].value:.3f}, the noise alone {error['noise'].value:.3f} ({error['model'].samples} spectra)"
    )
    shown, z = _examples(study, batch)
    assert study.survey.spectrum is not None
    section = mask_filling(
        study.survey.spectrum.grid.angstrom(),
        flux[shown],
        weight[shown],
        filled[shown],
        hidden[shown],
        z,
        unit=study.survey.spectrum.unit,
    )
    return Outcome("masking", measures, (line,), (section,))


def attention(study: Study, encoders: Sequence[Encoder], samples: int = SCORED) -> Outcome:
    """Draw what the query of the alignment's spectrum head attends to; arguments as for `masking`."""
    encoder = next(e for e in encoders if isinstance(e.method, AstroCLIPMethod))
    method = encoder.method
    assert isinstance(method, AstroCLIPMethod) and study.survey.spectrum is not None
    batch = _spectra(study, encoder, samples)
    shown, z = _examples(study, batch)
    flux, ivar = batch["spectrum"][shown], batch["spectrum_ivar"][shown]
    weights = method.attention(Batch(spectrum=flux, spectrum_ivar=ivar))["spectrum"]
    shape = method.config.spectrum
    section = attention_over_wavelength(
        study.survey.spectrum.grid.angstrom(),
        flux.cpu().numpy(),
        ivar.cpu().numpy(),
        weights.float().cpu().numpy(),
        z,
        window=shape.window,
        step=shape.step,
        unit=study.survey.spectrum.unit,
    )
    return Outcome("attention", (), (), (section,))


def _spectra(study: Study, encoder: Encoder, samples: int) -> Batch:
    """Those of the first test objects that have a spectrum, as one batch on the encoder's device."""
    device = next(encoder.method.parameters()).device
    found = _read(study.folder, study.test_split, survey_fingerprint(study.survey), min(samples, SCORED))
    row, spectrum, ivar = (x.to(device) for x in found)
    return Batch(row=row, spectrum=spectrum, spectrum_ivar=ivar)


@lru_cache(maxsize=1)  # both tasks show the same spectra
def _read(folder: Path, split: str, _: str, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = next(iter(SequentialLoader(folder, split=split, batch=samples, device="cpu", modalities=("spectrum",))))
    has = batch.get("has_spectrum", torch.ones_like(batch["row"], dtype=torch.bool))
    if not bool(has.any()):
        raise ValueError(f"spectra: none of the first {samples} objects of split {split!r} has one")
    return batch["row"][has], batch["spectrum"][has], batch["spectrum_ivar"][has]


def _examples(study: Study, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Places in the batch of the galaxies to draw, and their redshifts (NaN where unknown)."""
    rows = batch["row"].cpu().numpy()
    z = study.label("redshift", rows) if "redshift" in study.survey.labels else np.full(len(rows), math.nan)
    order = np.argsort(np.where(np.isfinite(z), z, np.inf))
    known = int(np.isfinite(z).sum()) or len(rows)
    shown = order[np.linspace(0, known - 1, min(SHOWN, known) + 2).astype(int)[1:-1]]
    return shown, z[shown]
