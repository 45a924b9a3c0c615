"""A method on two frozen encoders, and a survey for it: what a cache of tokens is tested with.

Run as a script it is a recipe; `FROZEN_OUT` and `FROZEN_SURVEY` say where. `FAULT_SIGNAL` is sent to the rank `FAULT_RANK` when it
is about to mark chunk `FAULT_CHUNK` finished; `CHUNK_BYTES` makes chunks small. The preset `evals` evaluates itself while it trains; `SCORES`
are what it finds, in order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.engine.config.evals import KNN
from armillary.engine.config.run import Checkpointing, Data, Optim, Run, Telemetry, Training
from armillary.engine.config.schedule import Constant, Schedules
from armillary.engine.data.building.build import build
from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import SpectrumRecord, WaveGrid
from armillary.engine.data.sources.source import Sample
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.stretch import ToRGB
from armillary.models.method import Batch, InputSpec, Losses, Method, MethodConfig, ParameterGroup

SIDE, PATCH, WINDOW = 8, 4, 50
GRID = WaveGrid("linear", 3600.0, 0.8, 400)


@dataclass(frozen=True)
class AlignConfig(MethodConfig):
    """Toy alignment.

    Attributes:
        width: Dimensions of a token.
        scale: Multiplies the tokens: what no weight shows.
        train_encoders: Nothing is frozen.
    """

    width: int = 12
    scale: float = 1.0
    train_encoders: bool = False

    def problems(self, inputs: InputSpec) -> list[str]:
        return []

    def build(self, inputs: InputSpec) -> Method:
        return Align(self, inputs)


class Align(Method):
    def __init__(self, config: AlignConfig, inputs: InputSpec):
        super().__init__()
        self.scale = config.scale
        torch.manual_seed(3)  # the encoders are "pretrained": the same in every run
        self.image = nn.Linear(inputs.channels * PATCH * PATCH, config.width).requires_grad_(config.train_encoders)
        self.spectrum = nn.Linear(WINDOW, config.width).requires_grad_(config.train_encoders)
        self.heads = nn.ModuleDict({name: nn.Linear(config.width, 5) for name in ("image", "spectrum")})
        self.dropout = nn.Dropout(0.5)

    def tokens(self, batch: Batch) -> dict[str, Tensor]:
        patches = F.unfold(batch["crop"].to(self.image.weight.dtype), PATCH, stride=PATCH).mT
        windows = batch["spectrum"].to(self.spectrum.weight.dtype).unfold(1, WINDOW, WINDOW)
        image, spectrum = F.gelu(self.image(patches)), F.gelu(self.spectrum(windows))
        return {"image_tokens": self.scale * image, "spectrum_tokens": self.scale * spectrum}

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        tokens: Any = batch if "image_tokens" in batch else self.tokens(batch)
        a, b = (self.heads[name](tokens[f"{name}_tokens"].mean(1)).float() for name in ("image", "spectrum"))
        loss = F.cross_entropy(a @ self.dropout(b).T, torch.arange(len(a), device=a.device))
        return Losses(loss, {"clip": loss.detach()})

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup({n: p for n, p in self.named_parameters() if p.requires_grad})]

    def encoders(self) -> dict[str, str]:
        return {"image": "image.", "spectrum": "spectrum."}

    def flops_per_sample(self) -> float:
        return 1e4

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        return {name: x.mean(1) for name, x in self.tokens(batch).items()}


@dataclass
class Pairs:
    """ObjectViews with an image and a spectrum.

    Attributes:
        count: Samples.
        lacking: Samples without a spectrum.
    """

    count: int = 40
    lacking: tuple[int, ...] = ()

    bands = ("g", "r", "z")
    pixel_scale_arcsec = 0.262
    unit = "nanomaggy"
    labels = {"z": "redshift"}
    vectors = ()
    spectrum = SpectrumRecord(GRID, "1e-17 erg/s/cm2/angstrom")

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"Pairs({self.count}, {self.lacking})"

    def read(self, index):
        rng = np.random.default_rng(index)
        flux = rng.normal(2, 1, GRID.count).astype(np.float32)
        return Sample(
            key=f"p{index:04d}",
            image=rng.normal(0.05, 0.05, (3, 12, 12)).astype(np.float32),
            valid=None,
            ra=float(index),
            dec=0.0,
            labels={"z": index / 100},
            source=f"pairs:{index}",
            spectrum=None if index in self.lacking else Spectrum(flux, np.ones(GRID.count, np.float32)),
            vectors={},
        )


def make_survey(folder: Path, source: Pairs | None = None) -> Path:
    build(source or Pairs(), folder, name="pairs", samples_per_shard=8, progress=False, test_fraction=0.2)
    return folder


def frozen_run(out: Path, survey: Path, tokens: Path | None = None, **train: Any) -> Run:
    numbers: dict[str, Any] = {"steps": 12, "global_batch": 8, "micro_batch": 4, "precision": "fp32"} | train
    crop = MultiCrop(
        global_size=SIDE, local_size=0, n_global=1, n_local=0, placement="centre", hflip=0.0, vflip=0.0, stretch=ToRGB()
    )
    return Run(
        name="frozen",
        method=AlignConfig(),
        views=ObjectViews(image=crop, spectrum=True),
        data=Data(survey, reader="webdataset", token_cache=tokens, token_cache_dtype="float32"),
        optim=Optim(lr=0.05),
        schedule=Schedules(learning_rate=Constant(), weight_decay=Constant(0.01)),
        train=Training(**numbers),
        checkpoint=Checkpointing(every_steps=5),
        telemetry=Telemetry(every_steps=4, tensorboard=False),
        device="cpu",
        out=out,
        seed=5,
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import frozen_toy

    from armillary.engine.train.start import start

    base = frozen_toy.frozen_run(Path(os.environ["FROZEN_OUT"]), Path(os.environ["FROZEN_SURVEY"]))
    if "FAULT_CHUNK" in os.environ and os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0"):
        from armillary.engine.token_cache import fill

        write = fill.write_bytes

        def faulty(path, data):
            if path.name == f"chunk-{int(os.environ['FAULT_CHUNK']):06d}":
                os.kill(os.getpid(), int(os.environ["FAULT_SIGNAL"]))
            write(path, data)

        fill.write_bytes = faulty
    if "CHUNK_BYTES" in os.environ:
        from armillary.engine.token_cache import fill

        fill.CHUNK_BYTES = int(os.environ["CHUNK_BYTES"])
    if "SCORES" in os.environ:
        from armillary.engine.train.evals import Evals

        scores = [float(score) for score in os.environ["SCORES"].split(",")]
        Evals._scores = lambda self, due: {f"eval/{knn.name}": scores.pop(0) for knn in due}
    watched = replace(base, evals=(KNN("z", every_steps=4, split="test", neighbours=3),))
    sys.exit(start(base, {"evals": watched}, sys.argv[1:]))
