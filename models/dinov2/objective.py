"""What student and teacher compute of a batch, and the losses between them.

Shape legend: B samples, G global and L local crops a sample, T patches of a global crop, M masked patches of a batch,
D width of the encoder, b of the head's features, V prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from armillary.kernels.launch import Impl
from armillary.kernels.objective.prototype_loss import Term, prototype_loss
from armillary.kernels.tokens.attention import Backend
from armillary.models.dinov2.dino_head import DINOHead, Head
from armillary.models.dinov2.koleo import koleo_loss
from armillary.models.method import Losses
from armillary.models.vit.vit import VisionTransformer, ViT

__all__ = ["Network", "Objective", "Projected"]


class Projected(NamedTuple):
    """Output of a network; a tuple, so that DeepSpeed finds the tensors in it."""

    backbone_cls: Tensor  # [G*B, D] class tokens of the global crops, before the head
    cls: Tensor  # [(G+L)*B, b] normalised features, global crops first
    patches: Tensor  # [M, b]
    prototypes: Tensor  # [V, b]
    patch_prototypes: Tensor  # [V', b]; the same tensor with a shared head


class Network(nn.Module):
    """Encoder and heads: the student, or the teacher.

    Args:
        vit: Shape of the encoder.
        head: Head of the class tokens, and of the patches unless these have their own.
        ibot_head: Head of the patches.
        attention: Backend, see `armillary.kernels.tokens.attention`.
        checkpoint_activations: See `VisionTransformer`.
        impl: See `armillary.kernels.launch`.
    """

    def __init__(
        self, vit: ViT, head: Head, ibot_head: Head | None, attention: Backend, checkpoint_activations: bool, impl: Impl
    ) -> None:
        super().__init__()
        self.backbone = VisionTransformer(vit, attention, checkpoint_activations, impl)
        self.dino_head = DINOHead(head, vit.dim)
        self.ibot_head = None if ibot_head is None else DINOHead(ibot_head, vit.dim)

    def forward(self, crops: list[Tensor], mask: Tensor | None, select: Tensor) -> Projected:
        """Encode crops and project the class tokens and the selected patches of the first group."""
        tokens = self.backbone(crops, mask=mask, select=select)
        cls, patches = torch.cat(tokens.cls), tokens.patches[0]
        if self.ibot_head is None:
            features, prototypes = self.dino_head(torch.cat([cls, patches]))
            cls_features, patch_features = features.split([len(cls), len(patches)])
            return Projected(tokens.cls[0], cls_features, patch_features, prototypes, prototypes)
        cls_features, prototypes = self.dino_head(cls)
        patch_features, patch_prototypes = self.ibot_head(patches)
        return Projected(tokens.cls[0], cls_features, patch_features, prototypes, patch_prototypes)


@dataclass(frozen=True)
class Objective:
    """The losses of a step; settings as in `DINOv2`."""

    n_global: int
    n_local: int
    shared_head: bool
    student_temperature: float
    dino_weight: float
    ibot_weight: float
    koleo_weight: float
    impl: Impl

    @property
    def pairs(self) -> tuple[tuple[float, ...], ...]:
        """Which teacher crops (columns) a student crop (rows, global ones first) predicts: all but itself."""
        g = self.n_global
        return tuple(tuple(float(s != t) for t in range(g)) for s in range(g)) + ((1.0,) * g,) * self.n_local

    def __call__(
        self,
        student: Projected,
        teacher: Projected,
        mask: Tensor | None,
        select: Tensor,
        biases: list[Tensor],
        teacher_temperature: float,
    ) -> Losses:
        """Total and its terms.

        Args:
            student: Of all crops.
            teacher: Of the global crops.
            mask: [G*B, T] bool: masked patches; None where nothing is masked.
            select: [M] int64: which patches these are, as crop * T + patch.
            biases: [V] of the targets of the class tokens and, with a mask, of the patches.
            teacher_temperature: Of the targets' softmax.
        """
        g = self.n_global
        size = len(student.backbone_cls) // g
        pairs = self.pairs
        weight = torch.full((1, 1), self.dino_weight / (sum(map(sum, pairs)) * size), device=select.device)
        dino = Term(student.cls.unflatten(0, (-1, size)), teacher.cls.unflatten(0, (g, size)), pairs, weight, biases[0])
        terms = [(dino, student.prototypes, teacher.prototypes)]
        if mask is not None:
            # every masked crop counts the same, whatever its number of masked patches
            per_crop = mask.sum(1).clamp(min=1).reciprocal() * (self.ibot_weight / len(mask))
            patch_weight = per_crop.index_select(0, select // mask.shape[1])[None]
            ibot = Term(student.patches[None], teacher.patches[None], ((1.0,),), patch_weight, biases[1])
            terms.append((ibot, student.patch_prototypes, teacher.patch_prototypes))
        # With a shared head one call takes both, so that the gradient of the prototypes is formed once.
        calls = [terms] if self.shared_head else [[term] for term in terms]
        total = torch.zeros((), device=select.device)
        rows: list[Tensor] = []
        for call in calls:
            part, losses = prototype_loss(
                [term for term, _, _ in call],
                *call[0][1:],
                student_temperature=self.student_temperature,
                teacher_temperature=teacher_temperature,
                impl=self.impl,
            )
            total = total + part
            rows += losses
        logged = {"dino_global": (rows[0][:g] * weight).sum()}
        if self.n_local:
            logged["dino_local"] = (rows[0][g:] * weight).sum()
        if mask is not None:
            logged["ibot"] = (rows[1] * patch_weight).sum()
        if self.koleo_weight:
            koleo = sum((koleo_loss(x) for x in student.backbone_cls.split(size)), torch.zeros_like(total))
            logged["koleo"] = self.koleo_weight * koleo.detach()
            total = total + self.koleo_weight * koleo
        return Losses(total, logged)
