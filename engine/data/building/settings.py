"""What all shards of a build share, decided from some samples: image shape, sky noise, quantisation steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from armillary.engine.data.building.cluster import Cluster
from armillary.engine.data.building.held_out import training_splits
from armillary.engine.data.building.packing import Settings, SkyTask, measure_sky
from armillary.engine.data.building.shard_assignment import ShardAssignment
from armillary.engine.data.building.workers import Workers
from armillary.engine.data.sources.source import Source, lossless_step_of, sky_sigma_of, spectrum_of, vectors_of

__all__ = ["measure_settings"]

STEP_FRACTION = 1 / 8  # of the sky noise: at most 1/16 of it is lost, and .14 % of variance added to aperture fluxes
SKY_SAMPLES = 256
SKY_TASK = 16
COUNT_SIGMA = 1.0  # display images are rounded to a count, so their noise is never less


def measure_settings(
    source: Source,
    workers: Workers | Cluster,
    layout: ShardAssignment,
    options: dict[str, Any],
    on_bad: str,
) -> Settings:
    """Measure shape and sky noise from some training samples, and decide the quantisation steps."""
    trained = training_splits(plan.split for plan in layout.shards)
    first = [plan.rows for plan in layout.shards if plan.split in trained]
    rows = np.sort(np.concatenate(first)[:SKY_SAMPLES])
    tasks = (SkyTask(rows[i : i + SKY_TASK], on_bad) for i in range(0, rows.size, SKY_TASK))
    skies = list(workers.map(measure_sky, tasks))
    types = next((sky.label_types for sky in skies if sky.label_types is not None), None)
    if types is None:
        raise ValueError(f"none of {rows.size} samples that were tried is usable; look at the source")
    shape = next((sky.shape for sky in skies if sky.shape is not None), (0, 0, 0))
    if source.bands and shape == (0, 0, 0):
        raise ValueError(
            f"none of {rows.size} samples that were tried has an image; the source declares {source.bands}"
        )
    if set(types) != set(source.labels):
        raise ValueError(f"labels: the source declares {sorted(source.labels)}, its samples have {sorted(types)}")
    if options["sky_sigma"] is not None:
        sigma = np.array(options["sky_sigma"], np.float64)
    elif (known := sky_sigma_of(source)) is not None:
        sigma = np.array(known, np.float64)
    else:
        sigma = _median_sigma(source, np.concatenate([sky.sigma for sky in skies]))
    step: tuple[float, ...] = ()
    if options["codec"] == "bitplane":
        lossless = lossless_step_of(source)
        if options["step_fraction"] is None and lossless is not None:
            step = lossless
        else:
            step = tuple((sigma * (options["step_fraction"] or STEP_FRACTION)).tolist())
    spectrum = spectrum_of(source)
    pixels = 0 if spectrum is None else spectrum.grid.count
    return Settings(shape, options["codec"], step, tuple(sigma.tolist()), types, pixels, vectors_of(source))


def _median_sigma(source: Source, sigmas: np.ndarray) -> np.ndarray:
    """Median over samples [N, C], of those with valid pixels in the band."""
    sigma = np.array([np.median(s[~np.isnan(s)]) if not np.isnan(s).all() else np.nan for s in sigmas.T])
    if source.unit == "count":
        sigma = np.where(np.isnan(sigma), COUNT_SIGMA, np.maximum(sigma, COUNT_SIGMA))
    for band, value in zip(source.bands, sigma, strict=True):
        if not 0 < value < math.inf:
            what = "has no valid pixel" if math.isnan(value) else "has no measurable noise"
            raise ValueError(
                f"band {band!r} {what} in {len(sigmas)} samples, so its sky noise is unknown; give it: sky_sigma "
                "(--sky-sigma, one number a band)"
            )
    return sigma
