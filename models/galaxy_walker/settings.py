"""Settings of Galaxy-Walker's second stage and the rules that they have to keep.

Source: Galaxy-Walker (arXiv:2503.18578), sections 3.2 to 3.4, and its released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from armillary.models.galaxy_walker import vlm as vlms
from armillary.models.galaxy_walker.adapter import GeometryAdapter, ffn_problems
from armillary.models.galaxy_walker.geometry_prompt.network import GeometryPromptConfig, graph_problems
from armillary.models.galaxy_walker.prompt import PLACEHOLDERS, byte_tokenizer, open_tokenizer, prompt_problems
from armillary.models.method import InputSpec, MethodConfig
from armillary.models.rules import at_least, choices, positive

__all__ = ["Stage2Settings"]


@dataclass(frozen=True)
class Stage2Settings(MethodConfig):
    """Fields and rules of `stage2.GalaxyWalker`.

    Attributes:
        base: Folder of a checkpoint of Qwen2-VL, Qwen2.5-VL or Qwen3-VL. None: a tiny random model with bytes as tokens.
        tiny: Family of the tiny model.
        tiny_dim: Its width, a multiple of 32.
        tiny_depth: Its blocks.
        adapter: Where the geometry adapters are, and how they are made.
        image_side: Crops are resized to so many pixels; a multiple of the side of a token of the model's image encoder (28
            in Qwen2-VL and Qwen2.5-VL, 32 in Qwen3-VL).
        prompt: Shape of the first stage's geometry prompt, which then makes the geometry tokens of the views' neighbours as they are
            drawn. None: tokens come from a file of the views, made before (`armillary embed`), as in the released code.
        prompt_from: Run of the first stage whose prompt it starts from.
        train_prompt: Whether it is trained on; else it stays as it was.
        placeholders: Words of the vocabulary whose place the tokens of spectrum and geometries take.
        number_weight: lambda.
        loss_weights: "fixed": as above; "learned": two weights, softplus of 1 at the start, normalised to a sum of 1, as
            in the released code. Without a penalty their optimum is to weigh the smaller loss only.
        standardise: Whether the head predicts standardised labels; the released code's predicts them as they are.
        replay: Whether the tokens are added in front of the numeric head.
        token_scale: Length of the tokens at the start.
        new_lr_scale: Learning rate of projections, scales and head, relative to the adapters', which start from
            pretrained weights.
        activation_checkpointing: Compute each block again in the backward pass and keep only what enters it.
    """

    base: Path | None = None
    tiny: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] = "qwen2_vl"
    tiny_dim: int = 64
    tiny_depth: int = 4
    adapter: GeometryAdapter = GeometryAdapter()
    image_side: int = 196
    prompt: GeometryPromptConfig | None = None
    prompt_from: Path | None = None
    train_prompt: bool = False
    placeholders: tuple[str, ...] = PLACEHOLDERS
    number_weight: float = 1.0
    loss_weights: Literal["fixed", "learned"] = "fixed"
    standardise: bool = True
    replay: bool = True
    token_scale: float = 0.1
    new_lr_scale: float = 5.0
    activation_checkpointing: bool = False

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        if not vlms.is_installed():
            return [f"base: {vlms.MISSING}"]
        found = at_least(1, self, "tiny_depth", "image_side") + positive(self, "token_scale", "new_lr_scale")
        found += at_least(0, self, "number_weight") + choices(self) + self.adapter.problems()
        if self.tiny_dim < 32 or self.tiny_dim % 32:
            found.append(f"tiny_dim: must be a multiple of 32, got {self.tiny_dim}")
        if not (inputs.targets or inputs.questions):
            found.append("views.targets: must be labels to ask for, or views.questions questions, got neither")
        if inputs.channels not in (0, 3):
            found.append(f"views.image.stretch: must give red, green and blue, got {inputs.channels} channels")
        if inputs.channels and (inputs.n_global, inputs.n_local) != (1, 0):
            found.append(f"views.image: must give one crop an object, got {inputs.n_global} and {inputs.n_local}")
        if len(self.placeholders) != len(set(self.placeholders)):
            found.append(f"placeholders: must differ, got {self.placeholders}")
        found += self._prompt_problems(inputs)
        spaces = self.geometry(inputs)[1]
        if len(self.placeholders) < 1 + spaces:
            found.append(
                f"placeholders: must be {1 + spaces}, a spectrum's and one a geometry, got {self.placeholders}"
            )
        if not (inputs.spectrum_features or spaces or inputs.channels):
            found.append("views: must show an image, a spectrum's embedding or geometries, got none")
        if self.base is not None:
            found += [f"base: {p}" for p in vlms.checkpoint_problems(self.base)]
        return found or self._model_problems(inputs)

    def _prompt_problems(self, inputs: InputSpec) -> list[str]:
        """Rules about where the geometry tokens come from."""
        if self.prompt is None:
            given = ["prompt_from"] * (self.prompt_from is not None) + ["train_prompt"] * self.train_prompt
            found = [f"{name}: is for a prompt, got {getattr(self, name)} without one" for name in given]
            if inputs.graphs:
                found.append("prompt: must be given where views.neighbours are, for it reads them, got None")
            return found
        found = [f"prompt.{p}" for p in self.prompt.problems()] + graph_problems(inputs, self.prompt.spaces)
        if inputs.graphs and self.prompt.features != inputs.node_features:
            found.append(
                f"prompt.features: must be the {inputs.node_features} features of the views' neighbours, got {self.prompt.features}"
            )
        if self.prompt_from is None and not self.train_prompt:
            found.append("prompt_from: must name a run of stage 1, because an untrained prompt says nothing, got None")
        if inputs.spaces:
            found.append("views.geometry: must be None where a prompt makes the geometry tokens")
        return found

    def geometry(self, inputs: InputSpec) -> tuple[int, int]:
        """Features of a geometry's vector and the number of geometries, by prompt or by file; 0 and 0 without any."""
        if self.prompt is None:
            return inputs.geometry_features, inputs.spaces
        return self.prompt.tokens, len(self.prompt.spaces)

    def _model_problems(self, inputs: InputSpec) -> list[str]:
        """Rules that take the model's configuration and tokenizer to check."""
        config = self.model_config()
        vision = config.vision_config
        token = vision.patch_size * vision.spatial_merge_size
        found = []
        if inputs.channels and self.image_side % token:
            found.append(f"image_side: must be a multiple of {token} for this model, got {self.image_side}")
        try:
            found += prompt_problems(self.open_tokenizer(), config, self.shown_placeholders(inputs))
        except ValueError as error:
            found.append(f"base: {error}")
        return found + ffn_problems(vlms.build_empty(config), self.adapter.every)

    def model_config(self) -> Any:
        """Configuration of the language model, of transformers."""
        if self.base is not None:
            return vlms.read_config(self.base)
        return vlms.tiny_config(self.tiny, dim=self.tiny_dim, depth=self.tiny_depth)

    def open_tokenizer(self) -> Any:
        """Its tokenizer."""
        return byte_tokenizer() if self.base is None else open_tokenizer(self.base)

    def shown_placeholders(self, inputs: InputSpec) -> tuple[str, ...]:
        """Those that are used: the first is the spectrum's."""
        begin = 0 if inputs.spectrum_features else 1
        return self.placeholders[begin : 1 + self.geometry(inputs)[1]]
