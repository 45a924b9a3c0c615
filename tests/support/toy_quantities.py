"""Galaxies of two hidden numbers, as batches of quantities, for methods that answer questions."""

import torch

from armillary.models.method import Batch, BatchKey, InputSpec
from armillary.models.quantities import Quantity, Scaling


def values(size, seed=0):
    """[B, n] float64 by name: z sets the colours, m the brightness, both with noise; `history` is bright early or late."""
    draw = torch.Generator().manual_seed(seed)
    z, m, early = torch.randn(3, size, 1, generator=draw, dtype=torch.float64)
    noise = torch.randn(size, 4, generator=draw, dtype=torch.float64)
    colours = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
    flux = torch.exp(1 + 0.5 * m + 0.3 * z * colours + 0.1 * noise)
    steps = torch.linspace(1, -1, 6, dtype=torch.float64)
    history = torch.exp(
        0.5 * m + 0.5 * early * steps + 0.05 * torch.randn(size, 6, generator=draw, dtype=torch.float64)
    )
    return {"z": 1 + 0.1 * z, "mass": 10 ** (10 + 0.3 * m), "flux": flux, "history": history}


def inputs(seed=100):
    """Scalings of 2,000 galaxies."""
    v = values(2000, seed)
    return InputSpec(
        n_global=1,
        quantities=(
            Quantity("z", "", scaling=Scaling.fitted("log1p", v["z"])),
            Quantity("mass", "Msun", scaling=Scaling.fitted("log10", v["mass"])),
            Quantity("flux", "uJy", tuple("abcd"), scaling=Scaling.fitted("asinh", v["flux"], (0.5,) * 4, levels=1)),
            Quantity("history", "Msun/yr", tuple("123456"), scaling=Scaling.fitted("log10", v["history"]), runs=3),
        ),
    )


def batch(spec, size=8, seed=0, unknown=True):
    """A batch as the views make it. Where things may be unknown: sample 1 has no flux, 2 no mass, 3 lacks component b."""
    v = {name: x.float() for name, x in values(size, seed).items()}
    if unknown:
        v["flux"][1], v["mass"][2], v["flux"][3, 1] = torch.nan, torch.nan, torch.nan
    errors = {name: torch.full_like(x, torch.nan) for name, x in v.items()} | {"flux": 0.1 * v["flux"]}
    return Batch(
        row=torch.arange(size) + 1000 * seed,
        position=torch.arange(size) + 1000 * seed,
        quantities=torch.cat([q.scaling(v[q.name]) for q in spec.quantities], dim=1),
        quantity_errors=torch.cat([q.scaling.errors(v[q.name], errors[q.name]) for q in spec.quantities], dim=1),
    )


def key(size, epoch=0):
    return BatchKey(seed=3, epoch=epoch, first_position=0, global_batch=size)
