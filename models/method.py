"""What the engine knows of a model: a Method consumes named tensors and returns named losses.

The trainer never names a model. A recipe holds a `MethodConfig`; its `build` returns a `Method`, one `nn.Module` that
owns everything a step needs (student, teacher, heads, losses), so that ZeRO sees, shards and checkpoints all of it.

Shape legend: B samples, C bands, H x W pixels, T patches, G global and L local crops a sample, S crop side in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from armillary.models.quantities import Answer, Quantity, Questions

__all__ = [
    "BaseWeights",
    "Batch",
    "BatchKey",
    "InputSpec",
    "Losses",
    "Method",
    "MethodConfig",
    "ParameterGroup",
    "Readout",
]


class Batch(TypedDict, total=False):
    """Named tensors of one micro-batch. A modality that the data does not have is absent, never a tensor of zeros.

    The reader fills the first block, the views add the second, `Method.prepare` the third.
    """

    row: Tensor  # [B] int64: row of the survey's catalog.parquet
    position: Tensor  # [B] int64: place in the epoch's global order; with seed and epoch it keys every random draw
    image: Tensor  # [B, C, H, W] float32, in the survey's flux unit
    valid: Tensor  # [B, C, H, W] bool, False where a pixel carries no data; absent where every pixel does
    blobs: Tensor  # [B, P] uint8, checked codec blobs, padded: in place of `image` where views decode themselves
    sizes: Tensor  # [B] int64, bytes of each blob
    spectrum: Tensor  # [B, L] float32, flux on the survey's wavelength grid, 0 where a pixel carries no data
    spectrum_ivar: Tensor  # [B, L] float32, inverse variance, 0 where a pixel carries no data
    vectors: Tensor  # [B, n] float32, all of the survey's vectors one behind the other, NaN where unknown
    has_image: Tensor  # [B] bool, False where a sample lacks an image (all 0 then); absent where every sample has one
    has_spectrum: Tensor  # [B] bool, likewise

    global_crops: Tensor  # [G*B, C, S, S] float32, model input; crop-major: all first crops, then all second ones
    local_crops: Tensor  # [L*B, C, s, s] float32, model input; crop-major; absent where L = 0
    crop: Tensor  # [B, C, S, S] float32, model input: the one crop of views of whole objects, and of every evaluation
    quantities: (
        Tensor  # [B, e] float32, scaled entries of `InputSpec.quantities` one behind the other, NaN where unknown
    )
    quantity_errors: Tensor  # [B, e] float32, their errors, scaled likewise, NaN where the survey states none
    shown_quantities: Tensor  # [B, e] float32, the same with what is hidden as NaN
    asked_tokens: Tensor  # [B, T] bool: True where a token of quantities is to be predicted
    token_rows: Tensor  # [R] int64, tokens of quantities that are computed; its length is known to the host
    key_rows: Tensor  # [K] int64, which of these are shown, likewise
    columns: Tensor  # [B, m] float32, columns of the catalogue that are inputs, standardised, NaN where unknown
    targets: Tensor  # [B, n] float32, labels to predict, standardised, NaN where unknown
    spectrum_vector: Tensor  # [B, F] float32, embedding of the spectrum made before, NaN where there is none
    geometry_vectors: Tensor  # [B, S, F] float32, embeddings of the neighbourhood in S spaces, NaN where there are none
    answers: Tensor  # [B, Q] int64, number of the right option of each question, -1 where unknown
    image_tokens: Tensor  # [B, T, D] of a frozen image encoder, from a cache: in place of `crop`
    spectrum_tokens: Tensor  # [B, N, D] of a frozen spectrum encoder, likewise in place of `spectrum`
    node_features: (
        Tensor  # [B + U, F] float32: of the samples themselves, then of U rows that are seen as their neighbours
    )
    node_row: Tensor  # [B + U] int64: their rows of the catalogue
    neighbours: (
        Tensor  # [B, S, f1, 1 + f2] int64, for S graphs: a neighbour and its own, as places among the nodes; -1: none
    )
    left_out: Tensor  # [B] bool: samples too near to another split to be trained on

    mix_partner: Tensor  # [B] int64, place of the sample that is mixed into each one
    mix_share: Tensor  # [B] float32, share of the sample itself in the mixture, 1 where nothing is mixed in
    mask: Tensor  # [G*B, T] bool: True where the student sees the mask token (iBOT)
    mask_index: Tensor  # [M] int64, ascending: masked patches as crop * T + patch; its length is known to the host
    token_mask: Tensor  # [B, N] bool: True where a token of the spectrum is hidden
    image_mask: Tensor  # [B, T] bool: True where a patch of the crop is hidden
    shown_patches: Tensor  # [P] int64, ascending: the others as sample * T + patch; its length is known to the host
    shown_tokens: Tensor  # [P] int64, ascending: tokens of spectra that are not hidden, likewise
    spectrum_hidden: Tensor  # [B] bool: True where the whole spectrum is hidden, or the sample has none
    input_ids: Tensor  # [B, L] int64, a prompt with its answer, filled up on the right
    position_ids: Tensor  # [3, B, L] int64, time, row and column of its tokens
    answer_start: Tensor  # [B] int64, place of the answer's first token
    answer_index: (
        Tensor  # [A] int64, ascending: tokens of answers as sample * L + place; its length is known to the host
    )
    slots: Tensor  # [B, K] int64, place of each modality's token in the prompt, -1 where it has none
    asked: Tensor  # [B] int64, number of the target that is asked for, -1 where it is a question with options, or none


@dataclass(frozen=True)
class BatchKey:
    """Everything besides `position` that keys the random draws of a batch.

    Attributes:
        seed: The run's seed.
        epoch: Which pass over the survey.
        first_position: Position of the first sample of the *global* batch that this micro-batch is part of.
        global_batch: Samples in that global batch, over all ranks and accumulation steps.
    """

    seed: int
    epoch: int
    first_position: int
    global_batch: int


@dataclass(frozen=True)
class InputSpec:
    """What the views hand to the method; a method is built for it and refuses anything else.

    Attributes:
        channels: Channels C of a crop after the stretch; 0 without images.
        global_size: Side of a global crop, or of the one crop, in pixels; 0 without images.
        n_global: Global crops a sample; 1 with views of whole objects.
        local_size: Side of a local crop in pixels; 0 where there are none.
        n_local: Local crops a sample.
        pixels: Pixels L of a spectrum; 0 without spectra.
        wave_start_angstrom: Wavelength of its first pixel, where pixels are equally spaced; else 0.
        wave_step_angstrom: Their spacing; 0 where they are not equally spaced.
        columns: Columns of the catalogue that are inputs.
        column_mean: Mean of each of them over the training split, in the column's unit.
        column_std: Its standard deviation.
        targets: Labels to predict.
        target_mean: Mean of each of them over the training split, in the label's unit.
        target_std: Its standard deviation.
        spectrum_features: Width of the spectrum's embedding; 0 where there is none.
        geometry_features: Width of the neighbourhood's embeddings.
        spaces: Number S of them.
        questions: Questions with options to choose from.
        options: The options of each, joined by "|".
        quantities: Scalars and vectors that are inputs, answers, or both, with their scaling.
        graphs: Sky graphs S; 0 without neighbours.
        node_features: Features F of a node of them.
        node_mean: Mean of each column among these features over the training split.
        node_std: Its standard deviation.
    """

    channels: int = 0
    global_size: int = 0
    n_global: int = 2
    local_size: int = 0
    n_local: int = 0
    pixels: int = 0
    wave_start_angstrom: float = 0.0
    wave_step_angstrom: float = 0.0
    columns: tuple[str, ...] = ()
    column_mean: tuple[float, ...] = ()
    column_std: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    spectrum_features: int = 0
    geometry_features: int = 0
    spaces: int = 0
    questions: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    quantities: tuple[Quantity, ...] = ()
    graphs: int = 0
    node_features: int = 0
    node_mean: tuple[float, ...] = ()
    node_std: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> InputSpec:
        """Rebuild from `dataclasses.asdict` after a way through JSON, which has no tuples."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        fields["quantities"] = tuple(Quantity.from_json(q) for q in described.get("quantities", ()))
        return cls(**fields)


@dataclass(frozen=True)
class Readout:
    """What one of the embeddings of `Method.encode` is, for tables and comparisons.

    Attributes:
        title: What a table calls it.
        modality: What it is made of.
        aligned: Whether it lies in one space with the method's other aligned embeddings.
        targets: Labels that its dimensions predict, in order and in the labels' units; empty for embeddings.
    """

    title: str
    modality: Literal["image", "spectrum", "image+spectrum", "columns", "vectors"]
    aligned: bool = False
    targets: tuple[str, ...] = ()


@dataclass
class Losses:
    """Result of a step.

    Attributes:
        total: Scalar that is back-propagated, float32.
        terms: Named parts as they enter `total` (weights applied), detached scalars, for the log.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning-rate and weight-decay multiplier.

    Attributes:
        params: The parameters, by their name in the method.
        lr_scale: Multiplies the scheduled learning rate (layer-wise decay).
        weight_decay_scale: Multiplies the scheduled weight decay; 0 for biases, norms and gains.
        clip_group: Gradients are clipped to the recipe's norm separately for each value of this.
        freeze: True for the last layer of a projection head: its learning rate and weight decay are 0 for the first
            `optim.freeze_last_layer_steps` steps, while the moments accumulate.
    """

    params: dict[str, nn.Parameter]
    lr_scale: float = 1.0
    weight_decay_scale: float = 1.0
    clip_group: str = "all"
    freeze: bool = False


@dataclass(frozen=True)
class BaseWeights:
    """Frozen parameters that lie in files of their own, and so in no checkpoint and no export.

    Attributes:
        folder: Where the files are.
        sha256: Their hashes by name.
        names: The parameters that come from them, by their name in the method.
    """

    folder: Path
    sha256: dict[str, str]
    names: frozenset[str]


class Method(nn.Module, ABC):
    """A model with its objective. The engine reaches it only through `forward`, as ZeRO-3 requires."""

    required_scalars: tuple[str, ...] = ()
    """Schedules that `training_step` reads, by name; the engine checks that the recipe has them."""

    takes_missing_spectra: bool = False
    """Whether samples of a batch may lack their spectrum (`has_spectrum`); the engine checks the views against it."""

    def forward(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Run one training step's forward pass; see `training_step`."""
        return self.training_step(batch, scalars)

    @abstractmethod
    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Compute the losses of one micro-batch.

        Args:
            batch: Named tensors on the method's device.
            scalars: Value of every schedule at this step, by name (learning_rate, ema_momentum, ...).
        """

    def prepare(self, batch: Batch, key: BatchKey) -> Batch:
        """Add what the step needs and a CPU can make ahead of it (masks). Runs in the loader's thread.

        Draws must be pure functions of `key` and `batch["position"]`, so that global batches do not depend on the
        number of ranks.
        """
        return batch

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """All trained parameters, each in exactly one group."""

    def teacher_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(student, teacher) parameters: each teacher is kept as the exponential moving average of its student."""
        return []

    @abstractmethod
    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample, forward and backward, recomputation not counted."""

    @abstractmethod
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Frozen embeddings of the modalities that a batch holds.

        Args:
            batch: Model inputs as the views' `eval_view` makes them: `crop`, stretched as in training, `spectrum` and
                `spectrum_ivar`, `columns`.

        Returns:
            Named embeddings, each [B, D] float32; the first is the default one.

        Raises:
            ValueError: The batch holds nothing that this method embeds.
        """

    def questions(self) -> Questions | None:
        """What `answer` can be given and asked; None for a method that answers nothing."""
        return None

    def answer(self, batch: Batch, given: tuple[str, ...], want: tuple[str, ...], draws: int, seed: int) -> Answer:
        """Draw what is wanted from the method's distribution, given parts of a batch.

        Args:
            batch: Model inputs, as for `encode`, with `row`; what is not given is not looked at.
            given: Names out of `questions().given`.
            want: Names out of `questions().want`.
            draws: Draws S a sample.
            seed: With `row` it keys the draws, so that an answer does not depend on the batch it came in.

        Raises:
            ValueError: A name is not known, or nothing of what is given is known for a sample.
        """
        raise NotImplementedError(f"{type(self).__name__} answers no questions")

    def answer_pit(self, batch: Batch, given: tuple[str, ...], want: str) -> Tensor:
        """Cumulative probabilities of true components by the distributions of `answer`, before any correction.

        Args:
            batch: As for `answer`.
            given: As for `answer`.
            want: One quantity.

        Returns:
            [B, n] of the quantity's components, NaN where the truth is unknown or given.
        """
        raise NotImplementedError(f"{type(self).__name__} answers no questions")

    def correct_answers(self, given: tuple[str, ...], corrections: Mapping[str, Tensor]) -> None:
        """Have later answers corrected by what held-out samples showed.

        Args:
            given: What is given.
            corrections: [n, K + 1] of components by name of a wanted quantity, see `armillary.models.masked.recalibration`.
        """
        raise NotImplementedError(f"{type(self).__name__} answers no questions")

    def readouts(self) -> dict[str, Readout]:
        """What the embeddings of `encode` are, by name; those that a comparison should show, the default one first."""
        return {}

    def tokens(self, batch: Batch) -> dict[str, Tensor]:
        """What frozen encoders make of a batch, to be cached; `training_step` takes it in place of the inputs.

        Args:
            batch: As for `training_step`.

        Returns:
            `image_tokens` and `spectrum_tokens`, or one of them, [B, T, D]; nothing where no encoder is frozen.
        """
        return {}

    def encoders(self) -> dict[str, str]:
        """Prefix of the parameters of each modality's encoder, by modality: what other methods may start from."""
        return {}

    def starts_from(self) -> dict[str, Path]:
        """Where encoders of a new run come from, by modality: a run's folder or a file of weights.

        The engine fills them before the first step; where a checkpoint is continued they are not read again.
        """
        return {}

    def base(self) -> BaseWeights | None:
        """Frozen parameters that come from files of their own; None where there are none.

        They are built on the meta device, without storage. The engine calls `materialise` before the first step.
        """
        return None

    def materialise(self, device: torch.device, dtype: torch.dtype, read: bool) -> None:
        """Give the parameters of `base` storage.

        Args:
            device: Where they shall lie.
            dtype: Their type.
            read: Whether to fill them from the files; where several ranks train, one reads and the others receive.

        Raises:
            ValueError: The files do not fit.
        """

    def activation_bytes(self, micro_batch: int, itemsize: int) -> int | None:
        """Estimate of what a micro-batch keeps for its backward, in bytes; None where nobody has counted.

        Args:
            micro_batch: Samples.
            itemsize: Bytes of a number in the working precision.
        """
        return None

    def monitor(self) -> dict[str, float]:
        """Health measures since the last call, for the log (collapse measures of self-distillation)."""
        return {}

    def warnings(self, measures: Mapping[str, float]) -> list[str]:
        """Plain-language warnings that follow from `measures`, a result of `monitor`."""
        return []


class MethodConfig(ABC):
    """The recipe's description of a method: a frozen dataclass with a `build`."""

    @abstractmethod
    def problems(self, inputs: InputSpec) -> list[str]:
        """Every rule that this configuration breaks for these inputs, as `field: rule, got value`; empty if none."""

    @abstractmethod
    def build(self, inputs: InputSpec) -> Method:
        """Build the method with freshly initialised parameters (from torch's global generator).

        Raises:
            ValueError: The configuration breaks a rule; all of them are listed.
        """
