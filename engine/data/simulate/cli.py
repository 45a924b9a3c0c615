"""The command `armillary data simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from armillary.engine.data.simulate.population import DEFAULT_SEED

__all__ = ["simulate"]


def simulate(
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    *,
    count: int = 5000,
    seed: int = DEFAULT_SEED,
    size: int = 72,
    magnitude_limit: float = 19.5,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.0,
    codec: Literal["bitplane", "float16"] = "bitplane",
    processes: int = 2,
    samples_per_shard: int = 2048,
    progress: bool = True,
    spectra: bool = False,
    grouped: bool = False,
) -> int:
    """Simulate a grz survey with known redshifts and pack it.

    Args:
        out: Folder of the survey; made if need be.
        count: Galaxies.
        seed: Keys the population and every image.
        size: Side of a cutout in pixels of 0.262 arcsec.
        magnitude_limit: Faintest z-band AB magnitude.
        test_fraction: Share of galaxies in the test split.
        validation_fraction: Share of galaxies in the split `validation`, to choose settings on.
        codec: bitplane (quantised) or float16.
        processes: Processes that draw.
        samples_per_shard: Galaxies of a tar.
        progress: Show progress bars.
        spectra: Add a DESI-like spectrum, physical properties and Galaxy Zoo votes to each galaxy, and arms and bars
            to the spirals' images.
        grouped: Put galaxies of like redshift into groups on the sky; else positions tell nothing of a galaxy.

    Returns:
        Exit status 0.
    """
    from armillary.engine.data.building.build import build
    from armillary.engine.data.building.splits import ByKey
    from armillary.engine.data.simulate.pairs import SimulatedPairs
    from armillary.engine.data.simulate.survey import SimulatedSurvey

    kind = SimulatedPairs if spectra else SimulatedSurvey
    source = kind(count, seed=seed, size=size, magnitude_limit=magnitude_limit, grouped=grouped)
    survey = build(
        source,
        out,
        name=f"simulated-pairs-{seed}" if spectra else f"simulated-{seed}",
        codec=codec,
        samples_per_shard=samples_per_shard,
        split=ByKey(test_fraction, validation_fraction=validation_fraction),
        seed=seed,
        processes=processes,
        progress=progress,
    )
    what = "galaxies with spectra" if spectra else "galaxies"
    counts = [f"{survey.count('train'):,} {what} to train on"]
    if validation_fraction:
        counts.append(f"{survey.count('validation'):,} to choose settings on")
    print(f"{out}: {', '.join(counts)} and {survey.count('test'):,} to test on")
    return 0
