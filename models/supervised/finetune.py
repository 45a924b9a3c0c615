"""Fine-tuning: an image encoder that was trained without labels learns labels.

The encoder starts from a run, an export or a published file (`image_from`), or from nothing, for comparison. With `trained =
"head"` it stays as it is and a linear layer (or a perceptron) on its tokens is trained; with "lora" also what is added to its linear
layers (`armillary.models.vit.low_rank`); with "whole" all of it, deep layers faster than shallow ones: the learning rate of block i
of D is lr * layer_decay^(D - i). The head sees the class token and the mean of the patch tokens, one behind the other; of a network of timm, its pooled features.

`mixup` mixes samples at places 2 k and 2 k + 1 of the epoch's order, share s of the one and 1 - s of the other, s from Beta(mixup,
mixup); micro-batches of an even number hold both, so the mixtures are the same for any number of ranks.

Shape legend: B samples, C channels, S crop side, D width, m outputs.

Source: layer-wise decay as Bao et al. 2022 (BEiT, arXiv:2106.08254); what the head sees as Oquab et al. 2023 (DINOv2,
arXiv:2304.07193), its linear evaluation; mixup as Zhang et al. 2018 (arXiv:1710.09412).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from armillary.kernels.launch import Impl
from armillary.kernels.pixels.philox import Purpose, streams, uniforms
from armillary.kernels.tokens.attention import Backend
from armillary.models.method import Batch, BatchKey, InputSpec, Losses, Method, MethodConfig, ParameterGroup, Readout
from armillary.models.rules import at_least, choices, refuse
from armillary.models.supervised.label_losses import Gaussian, LabelLoss, Mix, Votes
from armillary.models.supervised.timm_encoder import Timm, depths
from armillary.models.vit.low_rank import adapt
from armillary.models.vit.vit import VisionTransformer, ViT

__all__ = ["FineTune", "FineTuneMethod"]


@dataclass(frozen=True)
class FineTune(MethodConfig):
    """Configuration.

    Attributes:
        encoder: Shape of the encoder, that of its training; or a network of timm.
        image_from: Where it starts from: a run's folder, a file of weights, hf://OWNER/REPO/FILE; None: untrained.
        trained: What is trained: the "head" alone, the head and low-rank additions ("lora"), or the "whole".
        labels: What is said of the labels, and the loss.
        hidden: Hidden width of the head; 0: one linear layer.
        layer_decay: Learning rate of a block over that of the next one.
        lora_rank: Rank r of the additions.
        lora_alpha: They are multiplied by this over r.
        mixup: Parameter of the Beta distribution of shares; 0: samples are not mixed.
        attention: Backend of the encoder, see `armillary.kernels.tokens.attention`.
        impl: Implementation of the encoder's kernels, see `armillary.kernels.launch`.
    """

    encoder: ViT | Timm = field(default_factory=lambda: ViT(drop_path=0.1))
    image_from: Path | None = None
    trained: Literal["head", "lora", "whole"] = "whole"
    labels: LabelLoss = field(default_factory=Gaussian)
    hidden: int = 0
    layer_decay: float = 0.75
    lora_rank: int = 8
    lora_alpha: float = 16.0
    mixup: float = 0.0
    attention: Backend = "auto"
    impl: Impl = "auto"

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        encoder = self.encoder
        broken = encoder.problems(inputs.global_size) if isinstance(encoder, Timm) else encoder.problems()
        found = [f"encoder.{p}" for p in broken] + choices(self)
        found += at_least(0, self, "hidden", "mixup") + at_least(1, self, "lora_rank")
        if not 0 < self.layer_decay <= 1:
            found.append(f"layer_decay: must be above 0 and at most 1, got {self.layer_decay}")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            found.append(f"lora_alpha: must be a finite number above 0, got {self.lora_alpha}")
        if self.trained != "whole" and self.image_from is None:
            found.append("image_from: must name a run or a file where the encoder's weights stay as they are, got None")
        if self.trained == "lora" and isinstance(self.encoder, Timm):
            found.append(
                "trained: must be head or whole with a network of timm, whose layers have no additions, got lora"
            )
        if self.mixup and isinstance(self.labels, Votes):
            found.append(f"mixup: must be 0 with votes, which are counts and cannot be mixed, got {self.mixup}")
        if not inputs.channels or inputs.n_global != 1:
            found.append(f"views.image: must give one crop an object, got {inputs.n_global if inputs.channels else 0}")
        elif inputs.channels != self.encoder.channels:
            found.append(f"encoder.channels: must be the views' {inputs.channels}, got {self.encoder.channels}")
        elif isinstance(self.encoder, ViT) and inputs.global_size % self.encoder.patch_size:
            patch = self.encoder.patch_size
            found.append(f"views.image.global_size: must be a multiple of patch_size {patch}, got {inputs.global_size}")
        if not inputs.targets:
            return [*found, "views.targets: must name labels to learn, got none"]
        for name, mean, std in zip(inputs.targets, inputs.target_mean, inputs.target_std, strict=True):
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                found.append(
                    f"views.targets: must be labels that vary, got {name} with mean {mean} and deviation {std}"
                )
        return found + [p if p.startswith("views.") else f"labels.{p}" for p in self.labels.problems(inputs)]

    def build(self, inputs: InputSpec) -> FineTuneMethod:
        """Build the method, see `MethodConfig`."""
        refuse("FineTune", self.problems(inputs))
        return FineTuneMethod(self, inputs)


class FineTuneMethod(Method):
    """The encoder with a head; see `FineTune`."""

    def __init__(self, config: FineTune, inputs: InputSpec) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        outputs = config.labels.outputs(inputs)
        self.encoder: Any
        self._depths: dict[str, int] = {}
        if isinstance(config.encoder, Timm):
            self.encoder = config.encoder.build(inputs.global_size)
            self._depths, width = depths(self.encoder), config.encoder.width(inputs.global_size)
        else:
            self.encoder = VisionTransformer(config.encoder, config.attention, impl=config.impl)
            self.encoder.mask_token.requires_grad_(False)
            width = 2 * config.encoder.dim
        last = nn.Linear(config.hidden or width, outputs)
        nn.init.zeros_(last.bias)
        nn.init.trunc_normal_(last.weight, std=0.01)
        self.head = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), last) if config.hidden else last
        if config.trained == "head":
            self.encoder.requires_grad_(False)
            self.train()
        elif config.trained == "lora":
            adapt(self.encoder, config.lora_rank, config.lora_alpha)

    def train(self, mode: bool = True) -> FineTuneMethod:
        """As of any module; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.config.trained == "head":
            self.encoder.eval()
        return self

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs [B, m] and features [B, 2 D], float32."""
        if "crop" not in batch:
            raise ValueError("FineTune: reads images, but the batch has no `crop`")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.trained != "head"):
            if isinstance(self.config.encoder, Timm):
                features = self.encoder(batch["crop"].to(next(self.encoder.parameters()).dtype))
            else:
                tokens = self.encoder([batch["crop"]])
                features = torch.cat([tokens.cls[0], tokens.patches[0].mean(1)], dim=1)
        return self.head(features).float(), features.float()

    def prepare(self, batch: Batch, key: BatchKey) -> Batch:
        """Draw what is mixed into each sample, where `mixup` is on and both labels are known."""
        targets = batch.get("targets")
        if not self.config.mixup or targets is None:
            return batch
        position = batch["position"].cpu().numpy()
        order = position.argsort()
        place = order[np.searchsorted(position, position ^ 1, sorter=order).clip(max=len(order) - 1)]
        known = ~targets.isnan().any(1).cpu().numpy()
        mixed = (position[place] == position ^ 1) & known & known[place]
        chance = uniforms(streams(Purpose.MIXUP, 0, position & ~1, key.epoch), key.seed, 1)[:, 0]
        share = np.where(mixed, betaincinv(self.config.mixup, self.config.mixup, chance), 1.0)
        made = (np.where(mixed, place, np.arange(len(place))), share.astype(np.float32))
        partner, shares = (torch.from_numpy(x).to(targets.device) for x in made)
        return Batch(**{**batch, "mix_partner": partner, "mix_share": shares})

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Negative log likelihood of the known labels of a micro-batch.

        Args:
            batch: `crop` [B, C, S, S] and `targets` [B, n] float32, standardised, NaN where unknown; what `prepare` adds.
            scalars: Not read.

        Raises:
            ValueError: The batch lacks the image or the targets, or a label is no class.
        """
        targets, n = batch.get("targets"), len(self.inputs.targets)
        if targets is None or targets.shape[1:] != (n,):
            got = "none" if targets is None else list(targets.shape)
            raise ValueError(f"targets: must be [B, {n}] for {', '.join(self.inputs.targets)}, got {got}")
        mix = Mix(batch["mix_partner"], batch["mix_share"]) if "mix_share" in batch else None
        shown = batch if mix is None else Batch(crop=mix.of(batch["crop"]))
        parts = self.config.labels.loss(self._run(shown)[0], targets, self.inputs, mix)
        return Losses(torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()})

    def parameter_groups(self) -> list[ParameterGroup]:
        """By depth of the encoder, and without weight decay biases, norms and gains."""
        groups: dict[tuple[float, float], ParameterGroup] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decay = 0.0 if parameter.ndim == 1 or name.endswith("_token") or "pos_embed" in name else 1.0
                key = (self._lr_scale(name), decay)
                groups.setdefault(key, ParameterGroup({}, *key)).params[name] = parameter
        return list(groups.values())

    def _lr_scale(self, name: str) -> float:
        decay = self.config.layer_decay
        if isinstance(self.config.encoder, Timm):
            deepest = max(self._depths.values())
            return decay ** (deepest - self._depths.get(name.removeprefix("encoder."), deepest))
        depth = self.config.encoder.depth
        if name.startswith("encoder.blocks."):
            return decay ** (depth - int(name.split(".")[2]))
        return 1.0 if name.startswith(("head.", "encoder.norm.")) else decay ** (depth + 1)

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """What the network says of the labels, first, and the features that it says it from.

        Args:
            batch: `crop` [B, C, S, S], stretched as in training.

        Returns:
            As `said` of the labels' loss has them, in the labels' units ("prediction" and "sigma" of numbers; "prediction"
            and "probability" of classes; "share" and "concentration" of votes), and "features" [B, 2 D]; float32.
        """
        out, features = self._run(batch)
        return {**self.config.labels.said(out, self.inputs), "features": features}

    def readouts(self) -> dict[str, Readout]:
        """The predictions, and the features."""
        votes = isinstance(self.config.labels, Votes)
        first = Readout("fine-tuned", "image", targets=() if votes else self.inputs.targets)
        return {"share" if votes else "prediction": first, "features": Readout("fine-tuned, features", "image")}

    def encoders(self) -> dict[str, str]:
        """Prefix of the encoder."""
        return {"image": "encoder."}

    def starts_from(self) -> dict[str, Path]:
        """`image_from`, where given."""
        return {} if self.config.image_from is None else {"image": self.config.image_from}

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample; a frozen encoder runs forward only."""
        config = self.config
        kept = 1.0 if config.trained == "head" else 1 - config.encoder.drop_path
        if isinstance(config.encoder, Timm):
            encoder = config.encoder.flops(self.inputs.global_size)
        else:
            encoder = config.encoder.flops(self.inputs.global_size, kept=kept)
        head = 2.0 * sum(p.numel() for p in self.head.parameters() if p.ndim > 1)
        return (1 if config.trained == "head" else 3) * encoder + 3 * head
