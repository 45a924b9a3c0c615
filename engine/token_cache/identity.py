"""Whether cached tokens are those that a run's frozen encoders would give.

It is asked twice: by the record of what they were made of (survey, split, views, digest of each encoder, precision), and by
the tokens of two made-up samples, which also see a setting of the method that changes them and that no weight shows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from armillary.engine.config.config_json import to_json
from armillary.engine.config.provenance import survey_fingerprint
from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import Survey
from armillary.engine.token_cache.cache import TokenCacheError
from armillary.engine.weights.tensors import state_digest
from armillary.models.method import Batch, InputSpec, Method

__all__ = ["compare_probe", "encoder_prefixes", "made_of", "probe_tokens"]

TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 3e-2}
"""Relative error allowed between the tokens of made-up samples now and when the tokens were made: other devices, other
kernels and other shapes of a batch round differently."""


def encoder_prefixes(run: Run, method: Method) -> dict[str, str]:
    """Prefix of the parameters of each modality's encoder; "" where the method does not say."""
    return {name: method.encoders().get(name, "") for name in run.views.modalities}


def made_of(run: Run, method: Method, survey: Survey) -> dict[str, Any]:
    """All that decides the tokens and has a record, as JSON types."""
    state = method.state_dict()
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    pixels = json.dumps(replace(survey.pixels(), name="").to_json(), sort_keys=True)
    return {
        "survey": survey_fingerprint(survey),
        "pixels": hashlib.sha256(pixels.encode()).hexdigest()[:16],
        "split": run.data.split,
        "views": _without_impl(to_json(run.views)),
        "encoders": {
            name: state_digest({k: v for k, v in state.items() if k.startswith(prefix) and k not in trained})
            for name, prefix in encoder_prefixes(run, method).items()
        },
        "precision": run.train.precision,
    }


def _without_impl(described: Any) -> Any:
    """Implementations agree but for rounding."""
    if isinstance(described, dict):
        return {k: _without_impl(v) for k, v in described.items() if k != "impl"}
    return [_without_impl(v) for v in described] if isinstance(described, list) else described


def _made_up(inputs: InputSpec, device: torch.device) -> Batch:
    """Two samples of random numbers, the same everywhere."""
    g = torch.Generator().manual_seed(0)
    batch = Batch(row=torch.arange(2), position=torch.arange(2))
    if inputs.channels:
        batch["crop"] = torch.rand(2, inputs.channels, inputs.global_size, inputs.global_size, generator=g)
    if inputs.pixels:
        batch["spectrum"] = 1 + 0.3 * torch.randn(2, inputs.pixels, generator=g)
        batch["spectrum_ivar"] = torch.ones(2, inputs.pixels)
    for name, x in list(batch.items()):
        batch[name] = x.to(device)  # type: ignore[literal-required, attr-defined]
    return batch


def probe_tokens(method: Method, inputs: InputSpec, device: torch.device) -> dict[str, Tensor]:
    """Tokens [2, T, D] of two made-up samples, float32 on the CPU.

    Raises:
        TokenCacheError: They depend on parameters that are trained.
    """
    with torch.enable_grad():
        tokens = method.tokens(_made_up(inputs, device))
    for name, x in tokens.items():
        if x.requires_grad:
            raise TokenCacheError(
                f"data.token_cache: the encoders must be frozen, got {name} that depend on trained parameters"
            )
    return {name: x.detach().float().cpu().contiguous() for name, x in tokens.items()}


def compare_probe(folder: Path, probe: dict[str, Tensor], precision: str) -> None:
    """Compare tokens of made-up samples with those of the encoder that filled a folder.

    Raises:
        TokenCacheError: They differ by more than rounding.
    """
    try:
        before = load_file(folder / "probe.safetensors")
        before = {name: before[name] for name in probe}
    except (SafetensorError, OSError, KeyError) as error:
        raise TokenCacheError(
            f"data.token_cache: {folder / 'probe.safetensors'} is damaged ({error}); delete {folder} to fill it anew"
        ) from error
    for name, now in probe.items():
        difference = float((now - before[name]).norm() / before[name].norm().clamp(min=1e-30))
        if not difference <= TOLERANCE[precision]:
            raise TokenCacheError(
                f"data.token_cache: {folder} was filled by an encoder that gives other {name} (relative difference {difference:.2g} "
                "on made-up samples, from a setting that the weights do not show); choose another folder"
            )
