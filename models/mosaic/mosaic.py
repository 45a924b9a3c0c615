"""MOSAIC: scalars and vectors of a galaxy, any of them given, any of them asked for.

    shown runs of components, with what is known of them and their errors, are tokens; hidden ones are asked for
    asked tokens -> a distribution of each entry, and a copula of the entries of a token
    loss: the scores of what was hidden by its distribution and by the copula, averaged over the hidden entries of a quantity
    in a micro-batch, and summed over quantities with their weights

What is hidden is drawn anew for each sample (`armillary.models.mosaic.masking`), so that one network answers every question
(`armillary.models.mosaic.answers`). Quantities are declared by the views; nothing here knows one by name.

It stays apart from what is known of the published model in these: hidden tokens ask and are not attended to, distributions are
predicted in place of single numbers (`HeadConfig("point")` for those), and a token of the sample's own is the embedding.

Shape legend: B samples, e entries of all quantities, T tokens, w entries of a token, D width.

Source: Xia et al. 2025 (MOSAIC, arXiv:2510.07684), of which sizes and objective are not public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from armillary.kernels.tokens.attention import Backend
from armillary.models.masked.copula import copula_score, normal_scores
from armillary.models.masked.density import known_mean, whole_precision
from armillary.models.masked.heads import HeadConfig
from armillary.models.method import Batch, BatchKey, InputSpec, Losses, Method, MethodConfig, ParameterGroup, Readout
from armillary.models.mosaic.answers import component_pit, draw_answer
from armillary.models.mosaic.layout import Layout
from armillary.models.mosaic.masking import Masking
from armillary.models.mosaic.network import Network, computed_rows
from armillary.models.quantities import Answer, Questions
from armillary.models.rules import at_least, choices, fractions, refuse

__all__ = ["MOSAIC", "MOSAICMethod"]


@dataclass(frozen=True)
class MOSAIC(MethodConfig):
    """Configuration.

    Attributes:
        dim: Width D.
        depth: Blocks.
        heads: Attention heads; they divide `dim`.
        mlp_ratio: Hidden width of a block's perceptron, in widths.
        dropout: Dropout.
        scalar_head: Distribution of scalars.
        vector_head: Distribution of each entry of vectors.
        rank: Of the copula that says how the entries of a token vary together; 0: they do not.
        masking: What is hidden.
        weights: (quantity, weight of its loss); 1 for all others.
        embed: Quantities, or parts of them, that an embedding is made of; all vectors where none are named.
        attention: Backend, see `armillary.kernels.tokens.attention`.
    """

    dim: int = 256
    depth: int = 6
    heads: int = 8
    mlp_ratio: int = 4
    dropout: float = 0.0
    scalar_head: HeadConfig = field(default_factory=lambda: HeadConfig("mixture", 4))
    vector_head: HeadConfig = field(default_factory=lambda: HeadConfig("mixture", 1))
    rank: int = 4
    masking: Masking = field(default_factory=Masking)
    weights: tuple[tuple[str, float], ...] = ()
    embed: tuple[str, ...] = ()
    attention: Backend = "auto"

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        found = at_least(1, self, "dim", "depth", "heads", "mlp_ratio") + fractions(self, "dropout") + choices(self)
        found += at_least(0, self, "rank")
        if self.rank and self.vector_head.kind == "point":
            found.append(f"rank: must be 0 where vectors are points, which do not vary, got {self.rank}")
        found += self.scalar_head.problems("scalar_head") + self.vector_head.problems("vector_head")
        if not found and self.dim % self.heads:
            found.append(f"heads: must divide dim {self.dim}, got {self.heads}")
        names = [q.name for q in inputs.quantities]
        if len(names) < 2:
            found.append(f"views.quantities: must be two or more, of which one can tell of others, got {names}")
        if inputs.channels or inputs.pixels:
            found.append("views.image, views.spectrum: must be off; give what an encoder makes of them as a vector")
        if inputs.columns or inputs.targets:
            found.append("views.columns, views.targets: must be empty; name them among views.quantities")
        for quantity in inputs.quantities:
            if quantity.scaling.entries % quantity.runs:
                found.append(
                    f"views.quantities.{quantity.name}.runs: must be 1 with scaling shape, got {quantity.runs}"
                )
        for name, weight in self.weights:
            if name not in names or not 0 <= weight < math.inf:
                found.append(f"weights: must be finite, not negative and of {names}, got {(name, weight)}")
        if not found:
            found += self.masking.problems(Layout(inputs.quantities))
            try:
                Layout(inputs.quantities).chosen(self.embed)
            except ValueError as error:
                found.append(f"embed: {error}")
        return found

    def build(self, inputs: InputSpec) -> MOSAICMethod:
        """Build the method, see `MethodConfig`."""
        refuse("MOSAIC", self.problems(inputs))
        return MOSAICMethod(self, inputs)


class MOSAICMethod(Method):
    """The network with its objective; see `MOSAIC`."""

    def __init__(self, config: MOSAIC, inputs: InputSpec) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        self.layout = Layout(inputs.quantities)
        self.corrections: dict[frozenset[str], dict[str, Tensor]] = {}
        self.network = Network(
            self.layout,
            config.dim,
            config.depth,
            config.heads,
            config.mlp_ratio * config.dim,
            config.dropout,
            config.scalar_head,
            config.vector_head,
            config.rank,
            config.attention,
        )

    def prepare(self, batch: Batch, key: BatchKey) -> Batch:
        """Add `shown_quantities` [B, e], `asked_tokens` [B, T], and the rows of tokens that are computed."""
        entries = self._entries(batch)
        hidden = self.config.masking.hidden(self.layout, self.layout.known(entries), batch["position"], key)
        prepared = batch.copy()
        prepared["shown_quantities"] = shown = self.layout.shown(entries, hidden)
        wanted = self.layout.any_of_token(~self.layout.scored(entries, shown).isnan())
        asked = self.config.masking.asked_of(self.layout, wanted, batch["position"], key)
        prepared["asked_tokens"] = asked
        rows = computed_rows(self.layout.any_of_token(~shown.isnan()), asked)
        prepared["token_rows"], prepared["key_rows"] = rows
        return prepared

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Losses of one micro-batch; means run over all hidden entries of a quantity in it.

        Args:
            batch: `quantities` and `quantity_errors` [B, e], and what `prepare` adds.
            scalars: None is read.

        Returns:
            Total and a term a quantity, weighted.

        Raises:
            ValueError: Something is missing from the batch, or does not fit the inputs that the method was built for.
        """
        for name in ("quantities", "quantity_errors", "shown_quantities", "asked_tokens", "token_rows", "key_rows"):
            if name not in batch:
                raise ValueError(f"{name}: missing from the batch; views give quantities, `prepare` what is hidden")
        true, asked = self.layout.scored(self._entries(batch), batch["shown_quantities"]), batch["asked_tokens"]
        said = self.network(
            batch["shown_quantities"], batch["quantity_errors"], asked, batch["token_rows"], batch["key_rows"]
        )
        weights = dict(self.config.weights)
        terms = {}
        count = len(self.layout.spans)
        for number, span in enumerate(self.layout.spans):
            density = self.network.head(number).density(said[1 + number])
            wanted = span.of(true).masked_fill(~asked[:, span.tokens, None], torch.nan)
            loss = density.loss(wanted)
            if (loadings := whole_precision(said[1 + count + number])).shape[-1]:
                with torch.no_grad():
                    scores = normal_scores(density.pit(wanted))
                loss = loss + known_mean(copula_score(loadings, scores))
            name = span.quantity.name
            terms[name] = weights.get(name, 1.0) * loss
        return Losses(torch.stack(list(terms.values())).sum(), {name: x.detach() for name, x in terms.items()})

    def _entries(self, batch: Batch) -> Tensor:
        entries = batch["quantities"]
        if entries.dim() != 2 or entries.shape[1] != self.layout.entries:
            raise ValueError(f"quantities: must be [B, {self.layout.entries}] as built for, got {tuple(entries.shape)}")
        return entries

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of what `embed` names. Call `eval()` first.

        Args:
            batch: `quantities` and `quantity_errors` [B, e].

        Returns:
            "quantities" [B, D] float32; where nothing of it is known, what is said of nothing.

        Raises:
            ValueError: There are no quantities, or other ones than the method was built for.
        """
        if "quantities" not in batch:
            raise ValueError("MOSAIC: embeds quantities, but the batch has none")
        names = self.config.embed or [s.quantity.name for s in self.layout.spans if s.quantity.size > 1]
        chosen = self.layout.chosen(names).to(batch["quantities"].device)
        entries = self.layout.shown(self._entries(batch), ~chosen.expand(len(batch["quantities"]), -1))
        asked = torch.zeros(len(entries), self.layout.tokens, dtype=torch.bool, device=entries.device)
        rows = computed_rows(self.layout.any_of_token(~entries.isnan()), asked)
        return {"quantities": self.network(entries, batch["quantity_errors"], asked, *rows)[0].float()}

    def readouts(self) -> dict[str, Readout]:
        """The one embedding."""
        return {"quantities": Readout("MOSAIC", "vectors")}

    def questions(self) -> Questions:
        """Every quantity may be given, as a whole or in part (`name[first:end]`), and asked for."""
        return Questions(tuple(q.name for q in self.inputs.quantities), self.inputs.quantities)

    def answer(self, batch: Batch, given: tuple[str, ...], want: tuple[str, ...], draws: int, seed: int) -> Answer:
        """See `Method.answer`, and `armillary.models.mosaic.answers` on how draws are made."""
        self._entries(batch)
        return draw_answer(self.network, batch, given, want, draws, seed, self.corrections.get(frozenset(given), {}))

    def answer_pit(self, batch: Batch, given: tuple[str, ...], want: str) -> Tensor:
        """See `Method.answer_pit`."""
        self._entries(batch)
        return component_pit(self.network, batch, given, want)

    def correct_answers(self, given: tuple[str, ...], corrections: Mapping[str, Tensor]) -> None:
        """See `Method.correct_answers`."""
        for name, steps in corrections.items():
            if len(steps) != (size := self.layout.span(name).quantity.size):
                raise ValueError(f"corrections of {name!r}: must be of {size} components, got {len(steps)}")
        self.corrections.setdefault(frozenset(given), {}).update(corrections)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Weights, and without weight decay biases, norms and learned tokens."""
        named: dict[str, Any] = dict(self.named_parameters())
        tables = ("network.own", "network.position", "network.question")
        decayed = {k: p for k, p in named.items() if p.ndim > 1 and k not in tables}
        return [
            ParameterGroup(decayed),
            ParameterGroup({k: p for k, p in named.items() if k not in decayed}, weight_decay_scale=0.0),
        ]

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample, forward and backward, where half of the tokens are shown."""
        d, keys = self.config.dim, 1 + self.layout.tokens / 2
        rows = keys + self.config.masking.asked * self.layout.tokens / 2
        block = 2 * d * d * ((2 + 2 * self.config.mlp_ratio) * rows + 2 * keys) + 4 * d * rows * keys
        ends = 0.0
        for number, span in enumerate(self.layout.spans):
            tokens, numbers = span.quantity.runs, span.width * self.network.head(number).config.numbers
            numbers += self.config.rank * span.width * (span.width > 1)
            ends += 2 * tokens * (3 * span.width * 2 * d + 2 * d * d + d * numbers)
        return 3.0 * (self.config.depth * block + ends)
