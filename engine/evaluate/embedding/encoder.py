"""The frozen encoder of a run, with the views that it was trained on, for a survey to embed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from armillary.engine.config.provenance import survey_fingerprint
from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.evaluate.embedding.embed import Pipeline
from armillary.engine.evaluate.embedding.patches import PATCHES, patch_encode
from armillary.engine.weights.init_weights import input_mismatch
from armillary.engine.weights.tensors import state_digest
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Method, Readout

__all__ = ["Encoder"]


@dataclass(frozen=True)
class Encoder:
    """A run's frozen method with the views it was trained on, both on one device.

    Attributes:
        method: In evaluation mode.
        view: Makes its inputs of a survey's batches.
        metadata: What embeddings by it should say of themselves: run, encoder, survey.
        run: The run's record.
        folder: The run's folder, where it was read from one.
        step: Steps that it was trained for, where its record says so.
    """

    method: Method
    view: EvalView
    metadata: dict[str, str]
    run: Run
    folder: Path | None = None
    step: int | None = None

    @classmethod
    def load(cls, source: TrainedEncoder, survey: Survey, device: torch.device, *, trained: bool = True) -> Encoder:
        """Load the encoder of a run to embed a survey with.

        Args:
            source: The encoder.
            survey: The survey to embed.
            device: Where to run.
            trained: False for the untrained twin: the same configuration, initialised anew, keyed by the run's seed.

        Raises:
            ValueError: Its weights or its record do not fit this version; or the survey lacks what the encoder reads, or was taken with other bands, units or wavelengths.
        """
        run, pixels, inputs = source.run, source.pixels, source.inputs
        wanted = run.views.modalities
        shared = [m for m in wanted if m in survey.modalities]
        if wanted and not shared:
            has, reads = ", ".join(survey.modalities), " and ".join(wanted)
            raise ValueError(f"{survey.name}: has {has}, but {run.name} embeds {reads}")
        if problem := input_mismatch(pixels, survey, shared):
            raise ValueError(f"{survey.name}: {problem}")
        method = (source.method if trained else source.untrained()).to(device).eval()
        metadata = {
            "run": run.name,
            "trained": str(trained).lower(),
            "encoder": state_digest(method.state_dict()),
            "survey": survey.name,
            "fingerprint": survey_fingerprint(survey),
        }
        fitted = replace(
            pixels,
            bands=survey.bands,
            height=survey.height,
            width=survey.width,
            codec=survey.codec,
            spectrum=survey.spectrum,
            vectors=survey.vectors,
            labels=survey.labels,
            folder=survey.folder,
        )
        view = run.views.eval_view(fitted, device)
        if view.columns is not None:
            view = replace(view, columns=view.columns.scaled(inputs.column_mean, inputs.column_std))
        if view.quantities is not None:
            view = replace(view, quantities=view.quantities.scaled(inputs.quantities))
        if view.neighbours is not None:
            view = replace(view, neighbours=view.neighbours.scaled(inputs.node_mean, inputs.node_std))
        # RUN/checkpoints/step-N or RUN/export/FILE; a file elsewhere has no run beside it.
        folder = source.path.parents[1] if len(source.path.parents) > 1 else None
        return cls(method, view, metadata, run, folder, source.record.get("step"))

    def readouts_of(self, survey: Survey) -> dict[str, Readout]:
        """The method's named embeddings that this survey has the modalities for."""
        found = {}
        for name, about in self.method.readouts().items():
            made_of = set(about.modality.split("+"))
            read = made_of & set(self.run.views.modalities) or made_of  # beside what is read, embeddings from files
            if about.modality == "columns" or read <= set(survey.modalities):
                found[name] = about
        return found

    def pipeline(self, readout: str | None = None) -> Pipeline:
        """For `embed` and `embed_readouts`; `readout` is the one of its embeddings to make, None for its default.

        Raises:
            ValueError: "patches" of a method without a vision transformer.
        """
        if readout == PATCHES:
            return Pipeline(self.view, patch_encode(self.method), readout)
        return Pipeline(self.view, self.method.encode, readout)
