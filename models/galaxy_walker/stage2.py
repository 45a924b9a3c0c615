"""Galaxy-Walker's second stage: a frozen vision-language model learns to read galaxies through geometry adapters.

A galaxy is asked for one of its known properties or one question with options, drawn anew in each epoch. The model sees its
image through its own encoder, the embedding of its spectrum and three of its neighbourhood on the sky as tokens
(`modal_tokens`), and answers in words; the value of a property is read by a numeric head from the hidden state in front of
" num", to which the sum of these tokens is added ("replay").

    loss = LM + lambda smooth L1        LM: cross-entropy of the answers' tokens, in each micro-batch over all of them

The neighbourhood's embeddings come from a file that the first stage wrote, or from its network, which then is part of this one
and embeds the neighbours that the views draw, anew in each epoch.

Trained are the adapters, projections, scales and the numeric head, and that network if so wished; everything else is frozen and,
where the model comes from a checkpoint, neither copied into this run's checkpoints nor built on any rank but through the engine (`Method.base`).

Shape legend: B samples, L tokens, K tokens of modalities, D width of the language model, P tokens of an image, N options.

Source: Galaxy-Walker (arXiv:2503.18578), sections 3.2 to 3.4, equation 8, and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.kernels.pixels.philox import Purpose, streams, uniforms
from armillary.models.constants import constant
from armillary.models.galaxy_walker import vlm as vlms
from armillary.models.galaxy_walker.adapter import adapt
from armillary.models.galaxy_walker.cost import activation_bytes, flops_per_sample
from armillary.models.galaxy_walker.geometry_prompt.network import GeometryPrompt, hops_of
from armillary.models.galaxy_walker.modal_tokens import ModalTokens
from armillary.models.galaxy_walker.prompt import Templates
from armillary.models.galaxy_walker.reader import GalaxyReader
from armillary.models.galaxy_walker.settings import Stage2Settings
from armillary.models.method import (
    BaseWeights,
    Batch,
    BatchKey,
    InputSpec,
    Losses,
    Method,
    ParameterGroup,
    Readout,
)
from armillary.models.rules import refuse

__all__ = ["GalaxyWalker", "GalaxyWalkerMethod"]

VLM = "reader.vlm."
"""Prefix of the vision-language model's parameters."""

NODES = ("node_features", "node_row", "neighbours", "left_out")
"""What a batch holds of neighbours, the prompt's inputs."""


class GalaxyWalker(Stage2Settings):
    """Configuration, see `Stage2Settings`."""

    def build(self, inputs: InputSpec) -> GalaxyWalkerMethod:
        """Build the method, see `MethodConfig`. With a checkpoint its frozen parameters have no storage yet."""
        refuse("GalaxyWalker", self.problems(inputs))
        return GalaxyWalkerMethod(self, inputs)


class GalaxyWalkerMethod(Method):
    """The model with its objective; see `GalaxyWalker`."""

    def __init__(self, config: GalaxyWalker, inputs: InputSpec) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        self.options = tuple(tuple(o.split("|")) for o in inputs.options)
        self.model_config = config.model_config()
        build = vlms.build_random if config.base is None else vlms.build_empty
        vlm = build(self.model_config).requires_grad_(False)
        layers = adapt(vlm, config.adapter)
        if config.base is not None:
            for block, layer in layers.items():
                layer.experts.load_mlp(vlms.read_mlp(config.base, block))
        if config.activation_checkpointing:
            vlm.activation_checkpointing_enable({"use_reentrant": False})
        tokens, (features, spaces) = None, config.geometry(inputs)
        if inputs.spectrum_features or spaces:
            dim = int(self.model_config.text_config.hidden_size)
            tokens = ModalTokens(inputs.spectrum_features, features, spaces, dim, config.token_scale)
        self.reader = GalaxyReader(vlm, tokens, config.image_side if inputs.channels else 0)
        self.loss_weights = nn.Parameter(torch.ones(2)) if config.loss_weights == "learned" else None
        self.prompt: GeometryPrompt | None = None
        if config.prompt is not None:
            self.prompt = GeometryPrompt(config.prompt).requires_grad_(config.train_prompt)

    def train(self, mode: bool = True) -> GalaxyWalkerMethod:
        """As `nn.Module.train`; a frozen prompt drops nothing out."""
        super().train(mode)
        if self.prompt is not None and not self.config.train_prompt:
            self.prompt.eval()
        return self

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model."""
        return self.config.open_tokenizer()

    @cached_property
    def templates(self) -> Templates:
        """All prompts."""
        inputs, grid = self.inputs, self.reader.grid
        return Templates.make(
            self.tokenizer,
            self.reader.vlm.model.get_rope_index,
            self.model_config.image_token_id,
            grid=(1, grid, grid) if grid else None,
            image_tokens=self.reader.image_tokens,
            placeholders=self.config.shown_placeholders(inputs),
            has_spectrum=bool(inputs.spectrum_features),
            properties=inputs.targets,
            questions=inputs.questions,
            options=self.options,
        )

    def base(self) -> BaseWeights | None:
        """The checkpoint, see `Method.base`."""
        folder = self.config.base
        if folder is None:
            return None
        return BaseWeights(folder, vlms.hashes(folder), frozenset(f"{VLM}{n}" for n in self._frozen()))

    def _frozen(self) -> set[str]:
        """Names in the model of all that is not an adapter's."""
        return {n for n, _ in self.reader.vlm.named_parameters() if ".mlp.experts." not in n}

    def materialise(self, device: torch.device, dtype: torch.dtype, read: bool) -> None:
        """Fill the frozen parameters, see `Method.materialise`."""
        if self.config.base is None:
            return
        vlms.give_storage(self.reader.vlm, device, dtype)
        if read:
            frozen = self._frozen()
            vlms.fill(self.reader.vlm, self.config.base, dtype, lambda name: name in frozen)

    def prepare(self, batch: Batch, key: BatchKey) -> Batch:
        """Draw what each galaxy is asked, of what is known of it, and write the prompts.

        Raises:
            ValueError: An answer is none of its question's options.
        """
        position = batch["position"]
        drawn = uniforms(streams(Purpose.QUESTION, 0, position.cpu().numpy(), key.epoch), key.seed, 1)[:, 0]
        targets, answers = (x if x is None else x.cpu().numpy() for x in (batch.get("targets"), batch.get("answers")))
        known = np.isfinite(targets) if targets is not None else np.zeros((len(position), 0), bool)
        written = self.templates.drawn(known, answers, drawn)
        return {**batch, **{name: x.to(position.device) for name, x in written.items()}}  # type: ignore[typeddict-item]

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Losses of one micro-batch.

        Args:
            batch: `crop`, `spectrum_vector`, `geometry_vectors` or neighbours, as far as the views give them, `targets` and
                `answers`, and what `prepare` adds.
            scalars: None is read.

        Returns:
            Total and the terms `lm` and `number`, weighted.
        """
        reading = self.reader(self.embed_neighbours(batch))
        index = batch["answer_index"]
        logits = self.reader.vlm.lm_head(reading.hidden.flatten(0, 1)[index - 1]).float()
        chosen = batch["input_ids"].flatten()[index]
        lm = F.cross_entropy(logits, chosen, reduction="sum") / max(len(index), 1)

        number = lm.new_zeros(())
        if self.inputs.targets:
            predicted = self.reader.number(reading, batch["answer_start"], self.config.replay)
            asked = batch["asked"]
            wanted = batch["targets"].gather(1, asked.clamp(min=0)[:, None])[:, 0]
            scored = asked >= 0
            if not self.config.standardise:
                moments = self.inputs.target_std, self.inputs.target_mean
                std, mean = (constant(x, wanted)[asked.clamp(min=0)] for x in moments)
                wanted = wanted * std + mean
            errors = F.smooth_l1_loss(predicted, torch.where(scored, wanted, 0.0), reduction="none")
            number = torch.where(scored, errors, 0.0).sum() / scored.sum().clamp(min=1)
        if self.loss_weights is None:
            terms = lm, self.config.number_weight * number
        else:
            weights = F.softplus(self.loss_weights.float())
            weights = weights / weights.sum()
            terms = weights[0] * lm, weights[1] * number
        return Losses(terms[0] + terms[1], {"lm": terms[0].detach(), "number": terms[1].detach()})

    def embed_neighbours(self, batch: Batch) -> Batch:
        """The batch with `geometry_vectors` in place of its neighbours; as it is where it has none.

        Samples of such a batch can be taken out and put together, which those of a batch with neighbours cannot.

        Raises:
            ValueError: It has none and the model reads them, or those of another number of graphs.
        """
        if self.prompt is None or "geometry_vectors" in batch:
            return batch
        hops = hops_of(batch, self.inputs.graphs, self.prompt.config.spaces)
        features = batch["node_features"]
        samples = torch.arange(len(batch["neighbours"]), device=features.device)
        with torch.set_grad_enabled(self.config.train_prompt and torch.is_grad_enabled()):
            vectors = self.prompt(features, samples, hops).tokens
        others: Any = {name: x for name, x in batch.items() if name not in NODES}
        return {**others, "geometry_vectors": vectors}

    def ask(self, batch: Batch, template: int) -> Batch:
        """The same galaxies, all with one prompt."""
        written = self.templates.batch(torch.full((self._samples(batch),), template))
        device = next(x for x in batch.values() if isinstance(x, Tensor)).device
        return {**batch, **{k: v.to(device) for k, v in written.items()}}  # type: ignore[typeddict-item]

    def _samples(self, batch: Batch) -> int:
        for name in ("crop", "spectrum_vector", "geometry_vectors"):
            if name in batch:
                return len(batch[name])
        raise ValueError(
            "GalaxyWalker: reads images, embeddings of spectra or geometries, and the batch has none of them"
        )

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Predicted properties, and the hidden state in front of the first answer. Call `eval()` first.

        Args:
            batch: `crop`, `spectrum_vector`, and `geometry_vectors` or neighbours, as far as the method was trained on them.

        Returns:
            "hidden" [B, D], and "properties" [B, n] in the labels' units where properties were trained. Float32.

        Raises:
            ValueError: The batch lacks them.
        """
        batch = self.embed_neighbours(batch)
        found: dict[str, Tensor] = {}
        numbers = []
        for place, first in enumerate(self.templates.first[: max(len(self.inputs.targets), 1)]):
            asked = self.ask(batch, first)
            reading = self.reader(asked)
            if place == 0:
                found["hidden"] = reading.hidden[:, int(asked["answer_start"][0]) - 1].float()
            numbers.append(self.reader.number(reading, asked["answer_start"], self.config.replay))
        if self.inputs.targets:
            std, mean = (constant(x, numbers[0]) for x in (self.inputs.target_std, self.inputs.target_mean))
            raw = torch.stack(numbers, 1)
            found["properties"] = raw * std + mean if self.config.standardise else raw
        return found

    def encoders(self) -> dict[str, str]:
        """The prompt, where it is part of the model."""
        return {"prompt": "prompt."} if self.prompt is not None else {}

    def starts_from(self) -> dict[str, Path]:
        """`prompt_from`, where given."""
        return {"prompt": self.config.prompt_from} if self.config.prompt_from is not None else {}

    def readouts(self) -> dict[str, Readout]:
        """The hidden state as an embedding, and the properties as predictions."""
        modality: Literal["image", "image+spectrum", "columns"] = "columns"
        if self.inputs.channels:
            modality = "image+spectrum" if self.inputs.spectrum_features else "image"
        found = {"hidden": Readout("Galaxy-Walker hidden state", modality)}
        if self.inputs.targets:
            found["properties"] = Readout("Galaxy-Walker", modality, targets=self.inputs.targets)
        return found

    def parameter_groups(self) -> list[ParameterGroup]:
        """Adapters, and what is new; vectors and single numbers are not decayed."""
        groups: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                rate = 1.0 if name.startswith(VLM) else self.config.new_lr_scale
                groups.setdefault((rate, float(p.ndim > 1)), {})[name] = p
        return [ParameterGroup(params, rate, decay) for (rate, decay), params in groups.items()]

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample with the longest prompt, see `cost.flops_per_sample`."""
        experts = 1 if self.config.adapter.taking_part == ("euclidean",) else 3
        prompt = (
            self.prompt.config.flops(5) * (3 if self.config.train_prompt else 1) if self.prompt is not None else 0.0
        )
        return flops_per_sample(self.reader, int(self.templates.lengths.max()), experts) + prompt

    def activation_bytes(self, micro_batch: int, itemsize: int) -> int:
        """Estimate with the longest prompts, see `Method.activation_bytes`."""
        tokens = micro_batch * int(self.templates.lengths.max())
        answers = micro_batch * int((self.templates.lengths - self.templates.starts).max())
        return activation_bytes(self.reader, tokens, answers, itemsize, self.config.activation_checkpointing)
