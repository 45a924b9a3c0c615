"""DINOv2: self-distillation of class tokens (DINO) and masked patches (iBOT) with a spread term (KoLeo).

The student sees all crops, some patches of the global ones hidden; the teacher, an exponential moving average of it,
sees the whole global crops. Student class tokens predict the teacher's assignment of the same galaxy's other crops to
prototypes; student mask tokens predict the teacher's assignment of the hidden patches.

Shape legend: B samples, G global and L local crops a sample, T patches of a global crop, M masked patches of a batch,
D width, V prototypes. Crops are crop-major: all first crops, then all second ones.

Source: Oquab et al. 2023 (arXiv:2304.07193); weights, factors and schedules of the released code.
One factor differs: without local crops the class-token loss is the mean over its 2 pairs, where the released code divides by 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from armillary.kernels.launch import Impl
from armillary.kernels.tokens.attention import Backend
from armillary.models.dinov2.centering import SoftmaxCentre, sinkhorn_bias
from armillary.models.dinov2.collapse import CollapseMonitor
from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.masking import masks
from armillary.models.dinov2.objective import Network, Objective, Projected
from armillary.models.method import Batch, BatchKey, InputSpec, Losses, Method, MethodConfig, ParameterGroup, Readout
from armillary.models.rules import at_least, choices, fractions, positive, refuse
from armillary.models.vit.vit import ViT

__all__ = ["DINOv2", "DINOv2Method"]


@dataclass(frozen=True)
class DINOv2(MethodConfig):
    """Configuration. The defaults are AstroCLIP's released ViT-L/12 pre-training.

    Attributes:
        vit: Encoder.
        head: Projection head of the class tokens, and of the patches unless `separate_head`.
        ibot_head: Projection head of the patches, used with `separate_head`.
        separate_head: Whether patches have a head of their own.
        centering: "softmax" (running mean of the logits) or "sinkhorn".
        center_momentum: Weight of the old centre (softmax).
        sinkhorn_iterations: Iterations (sinkhorn).
        student_temperature: Temperature of the student's softmax; the teacher's is a schedule.
        dino_weight: Weight of the class-token loss.
        ibot_weight: Weight of the masked-patch loss; 0 leaves it out.
        koleo_weight: Weight of KoLeo, summed over the global crops; 0 leaves it out.
        masked_crops: Fraction of the global crops that are masked.
        mask_ratio: Least and greatest fraction of a masked crop's patches.
        masking: "block" or "random".
        layer_decay: Learning-rate factor from a block to the one below it.
        patch_embed_lr: Further factor of the patch projection.
        attention: Backend, see `armillary.kernels.tokens.attention`.
        impl: Implementation of the encoder's and the loss's kernels, see `armillary.kernels.launch`.
        checkpoint_activations: Recompute the student's blocks in the backward pass.
        readout: What `encode` returns first: "cls" or "mean" (of the patch tokens).
    """

    vit: ViT = field(default_factory=ViT)
    head: Head = field(default_factory=Head)
    ibot_head: Head = field(default_factory=Head)
    separate_head: bool = False
    centering: Literal["softmax", "sinkhorn"] = "softmax"
    center_momentum: float = 0.9
    sinkhorn_iterations: int = 3
    student_temperature: float = 0.1
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    masked_crops: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    masking: Literal["block", "random"] = "block"
    layer_decay: float = 0.9
    patch_embed_lr: float = 0.2
    attention: Backend = "auto"
    impl: Impl = "auto"
    checkpoint_activations: bool = False
    readout: Literal["cls", "mean"] = "cls"

    @property
    def patch_head(self) -> Head:
        """Head of the patches."""
        return self.ibot_head if self.separate_head else self.head

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        found = [f"vit.{p}" for p in self.vit.problems()]
        found += [f"head.{p}" for p in self.head.problems()]
        if self.separate_head:
            found += [f"ibot_head.{p}" for p in self.ibot_head.problems()]
        found += choices(self) + at_least(0, self, "dino_weight", "ibot_weight", "koleo_weight")
        found += positive(self, "student_temperature", "layer_decay", "patch_embed_lr")
        found += fractions(self, "center_momentum") + at_least(1, self, "sinkhorn_iterations")
        if not 0 <= self.masked_crops <= 1:
            found.append(f"masked_crops: must be in [0, 1], got {self.masked_crops}")
        low, high = self.mask_ratio
        if not 0 <= low <= high <= 1:
            found.append(f"mask_ratio: must be 0 <= low <= high <= 1, got {self.mask_ratio}")
        if inputs.channels != self.vit.channels:
            found.append(f"vit.channels: must be the views' {inputs.channels}, got {self.vit.channels}")
        if inputs.n_global < 2:
            found.append(f"views.n_global: must be at least 2 (crops predict each other), got {inputs.n_global}")
        sizes = [("global_size", inputs.global_size)]
        sizes += [("local_size", inputs.local_size)] if inputs.n_local else []
        for name, size in sizes:
            if self.vit.patch_size >= 1 and (size < self.vit.patch_size or size % self.vit.patch_size):
                found.append(f"views.{name}: must be a multiple of vit.patch_size {self.vit.patch_size}, got {size}")
        return found

    def build(self, inputs: InputSpec) -> DINOv2Method:
        """Build the method, see `MethodConfig`."""
        refuse("DINOv2", self.problems(inputs))
        return DINOv2Method(self, inputs)


class DINOv2Method(Method):
    """Student, teacher and objective; see `DINOv2`."""

    required_scalars = ("teacher_temperature",)

    def __init__(self, config: DINOv2, inputs: InputSpec) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        ibot_head = config.ibot_head if config.separate_head else None
        networks = [
            Network(vit, config.head, ibot_head, config.attention, config.checkpoint_activations, config.impl)
            for vit in (config.vit, replace(config.vit, drop_path=0.0))
        ]
        self.student, self.teacher = networks
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        if not self._uses_masks:
            self.student.backbone.mask_token.requires_grad_(False)  # no gradient would ever reach it
        if config.centering == "softmax":
            self.dino_center = SoftmaxCentre(config.head.prototypes, config.center_momentum)
            self.ibot_center = SoftmaxCentre(config.patch_head.prototypes, config.center_momentum)
        self._objective = Objective(
            inputs.n_global,
            inputs.n_local,
            not config.separate_head,
            config.student_temperature,
            config.dino_weight,
            config.ibot_weight,
            config.koleo_weight,
            config.impl,
        )
        self._collapse = CollapseMonitor()

    @property
    def _uses_masks(self) -> bool:
        return self.config.ibot_weight > 0 and self.config.masked_crops > 0

    def prepare(self, batch: Batch, key: BatchKey) -> Batch:
        """Add `mask` [G*B, T] and `mask_index` [M]; nothing where the recipe masks nothing."""
        if not self._uses_masks:
            return batch
        side = self.inputs.global_size // self.config.vit.patch_size
        mask = masks(
            batch["position"],
            key,
            self.inputs.n_global,
            (side, side),
            crop_fraction=self.config.masked_crops,
            ratio_range=self.config.mask_ratio,
            kind=self.config.masking,
        )
        prepared = batch.copy()
        prepared["mask"] = mask
        prepared["mask_index"] = mask.flatten().nonzero().squeeze(1)
        return prepared

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Losses of one micro-batch.

        Args:
            batch: `global_crops` [G*B, C, S, S], `local_crops` [L*B, C, s, s] where L > 0, `mask` [G*B, T] and, if
                `prepare` made it, `mask_index`.
            scalars: `teacher_temperature`.

        Returns:
            Total and the terms `dino_global`, `dino_local`, `ibot`, `koleo`, weighted as they enter it.

        Raises:
            ValueError: The crops do not fit the inputs that the method was built for.
        """
        crops, size = self._crops(batch)
        mask, select = self._masked(batch, crops[0])
        temperature = float(scalars["teacher_temperature"])
        with torch.no_grad():
            teacher = self.teacher(crops[:1], None, select)
        biases, finish = self._center(teacher, temperature)
        student = self.student(crops, mask, select)
        losses = self._objective(student, teacher, mask, select, biases, temperature)
        for f in finish:
            f()
        if self.training:
            rows = slice(0, size)  # one crop a sample: crops of one galaxy are not independent rows
            self._collapse.update(teacher.backbone_cls[rows], teacher.cls[rows], teacher.prototypes, temperature)
        return losses

    def _crops(self, batch: Batch) -> tuple[list[Tensor], int]:
        g, n_local = self.inputs.n_global, self.inputs.n_local
        crops = [batch["global_crops"]]
        size, rest = divmod(len(crops[0]), g)
        if rest or not size:
            raise ValueError(f"global_crops: needs {g} crops of each of at least one sample, got {len(crops[0])}")
        if n_local:
            crops.append(batch["local_crops"])
            if len(crops[1]) != n_local * size:
                raise ValueError(f"local_crops: needs {n_local} crops of {size} samples, got {len(crops[1])}")
        return crops, size

    def _masked(self, batch: Batch, crops: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self._uses_masks:
            return None, torch.zeros(0, dtype=torch.int64, device=crops.device)
        if "mask" not in batch:
            raise ValueError("mask: missing from the batch; `prepare` adds it")
        mask = batch["mask"]
        index = batch.get("mask_index")
        return mask, mask.flatten().nonzero().squeeze(1) if index is None else index

    def _center(self, teacher: Projected, temperature: float) -> tuple[list[Tensor], list[Callable[[], None]]]:
        """Biases of the class-token and patch targets, and what is left to do after the step."""
        config = self.config
        pairs = [(teacher.cls, teacher.prototypes)]
        if self._uses_masks:
            pairs.append((teacher.patches, teacher.patch_prototypes))
        if config.centering == "sinkhorn":
            return [
                sinkhorn_bias(f, w, temperature, config.sinkhorn_iterations, impl=config.impl) for f, w in pairs
            ], []
        centres = [self.dino_center, self.ibot_center][: len(pairs)]
        biases = [centre.bias(temperature) for centre in centres]
        return biases, [centre.start_update(f, w) for centre, (f, w) in zip(centres, pairs, strict=True)]

    def parameter_groups(self) -> list[ParameterGroup]:
        """Groups as in the released code: layer-wise decay, none of biases, norms and gains, clipping a submodule."""
        groups: dict[tuple[float, float, str, bool], ParameterGroup] = {}
        for name, parameter in self.student.named_parameters():
            if not parameter.requires_grad:
                continue
            submodule, _, rest = name.partition(".")
            lr = self._lr_scale(rest) if submodule == "backbone" else 1.0
            decay = 0.0 if rest.endswith(".bias") or "norm" in rest or "gamma" in rest else 1.0
            key = (lr, decay, submodule, rest.startswith("last_layer."))
            group = groups.setdefault(key, ParameterGroup({}, *key))
            group.params[f"student.{name}"] = parameter
        return list(groups.values())

    def _lr_scale(self, name: str) -> float:
        """Learning-rate factor of a parameter of the encoder."""
        depth, decay = self.config.vit.depth, self.config.layer_decay
        if name.startswith("blocks."):
            return decay ** (depth - int(name.split(".")[1]))
        if name.startswith("patch_embed."):
            return decay ** (depth + 1) * self.config.patch_embed_lr
        return 1.0 if name.startswith("norm.") else decay ** (depth + 1)

    def teacher_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(student, teacher) parameters, without those that are not trained."""
        pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
        return [(s, t) for s, t in pairs if s.requires_grad]

    def readouts(self) -> dict[str, Readout]:
        """Class token and mean patch token, the configured readout first."""
        titles = {"cls": "DINOv2", "mean": "DINOv2, mean patch"}
        first = self.config.readout
        return {name: Readout(titles[name], "image") for name in (first, *(titles.keys() - {first}))}

    def encoders(self) -> dict[str, str]:
        """The image encoder is the teacher's."""
        return {"image": "teacher.backbone."}

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample, forward and backward, recomputation not counted.

        Of the last blocks only the tokens that are used are counted, as only they are computed; the released code
        computes all, which adds about 3 % to a ViT-L.
        """
        config, inputs, vit = self.config, self.inputs, self.config.vit
        g, n_local = inputs.n_global, inputs.n_local
        masked = 0.0  # masked patches of a global crop, on average
        if self._uses_masks:
            masked = config.masked_crops * sum(config.mask_ratio) / 2 * vit.patches(inputs.global_size)
        kept = 1 - vit.drop_path
        total = g * vit.flops(inputs.global_size, selected=1 + masked)
        total += 3 * g * vit.flops(inputs.global_size, kept=kept, selected=1 + masked)
        if n_local:
            total += 3 * n_local * vit.flops(inputs.local_size, kept=kept, selected=1)
        total += (g + 3 * (g + n_local)) * config.head.flops(vit.dim)
        return total + 4 * g * masked * config.patch_head.flops(vit.dim)

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings by the teacher's encoder, after the final norm.

        Args:
            batch: `crop` [B, C, S, S] float32, stretched as in training; any side that is a multiple of the patch size.

        Returns:
            "cls" [B, D] class token and "mean" [B, D] mean of the patch tokens, float32; the configured readout first.
        """
        if "crop" not in batch:
            raise ValueError("DINOv2: embeds images, but the batch has no `crop`")
        tokens = self.teacher.backbone([batch["crop"]])
        found = {"cls": tokens.cls[0].float(), "mean": tokens.patches[0].float().mean(1)}
        first = self.config.readout
        return {first: found.pop(first), **found}

    def monitor(self) -> dict[str, float]:
        """`effective_rank` and `prototypes_in_use` of the teacher, over `window_rows` recent samples of this rank."""
        return self._collapse.measure()

    def warnings(self, measures: Mapping[str, float]) -> list[str]:
        """Signs of collapse in a result of `monitor`."""
        return self._collapse.warnings(measures, self.config.head.prototypes)
