"""A method whose answers are known: all entries of its quantities are jointly Gaussian, and it conditions them exactly."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from toy import described_survey, toy_run

from armillary.engine.config.config_json import to_json
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.weights.tensors import Entry, write_tensors
from armillary.engine.weights.trained_encoder import EXPORT_FORMAT
from armillary.kernels.pixels.philox import Purpose, normals, streams
from armillary.models.method import Batch, InputSpec, Losses, Method, MethodConfig, ParameterGroup
from armillary.models.quantities import Answer, Quantity, Questions, Scaling

PHOTOMETRY = Quantity(
    "photometry.lsst",
    "nJy",
    ("g", "r", "i"),
    scaling=Scaling("asinh", (1.0, 1.5, 2.0), (0.8, 0.9, 1.0), softening=(50.0, 50.0, 50.0)),
)
REDSHIFT = Quantity("redshift", scaling=Scaling("linear", (0.6,), (0.3,)))
MASS = Quantity("stellar_mass", "solMass", scaling=Scaling("log10", (10.0,), (0.7,)))
SED = Quantity(
    "sed",
    "Jy",
    tuple(f"{w:g}" for w in (4000, 5000, 6000, 7000)),
    (4000.0, 5000.0, 6000.0, 7000.0),
    Scaling("linear", (0.0,) * 4, (2.0,) * 4),
)
QUANTITIES = (PHOTOMETRY, REDSHIFT, MASS, SED)
ENTRIES = sum(q.scaling.entries for q in QUANTITIES)


@dataclass(frozen=True)
class LinearGaussian(MethodConfig):
    """Toy.

    Attributes:
        unanswered: Last of its quantities that it was not trained to answer.
    """

    unanswered: int = 0

    def problems(self, inputs: InputSpec) -> list[str]:
        return []

    def build(self, inputs: InputSpec) -> Method:
        return LinearGaussianMethod(self, inputs)


class LinearGaussianMethod(Method):
    def __init__(self, config: LinearGaussian, inputs: InputSpec):
        super().__init__()
        self.quantities, self.answers = inputs.quantities, len(inputs.quantities) - config.unanswered
        size = sum(q.scaling.entries for q in inputs.quantities)
        self.factor = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(3)) / size**0.5)

    @property
    def covariance(self) -> Tensor:
        factor = self.factor.double()
        return factor @ factor.T + 0.1 * torch.eye(len(factor), dtype=torch.float64)

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        return Losses(self.factor.square().sum())

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(dict(self.named_parameters()))]

    def flops_per_sample(self) -> float:
        return 1.0

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        return {"entries": batch["quantities"].nan_to_num(0.0)}

    def questions(self) -> Questions | None:
        names = tuple(q.name for q in self.quantities)
        return None if not self.answers else Questions(names, self.quantities[: self.answers])

    def answer(self, batch: Batch, given: tuple[str, ...], want: tuple[str, ...], draws: int, seed: int) -> Answer:
        """One row at a time, as it is a toy."""
        place, start = {}, 0
        for q in self.quantities:
            place[q.name] = torch.arange(start, start + q.scaling.entries)
            start += q.scaling.entries
        shown = torch.zeros(start, dtype=torch.bool)
        for name in given:
            shown[place[name]] = True
        rows = [self.conditional(t, shown & ~t.isnan()) for t in batch["quantities"].double().cpu()]
        z = normals(streams(Purpose.PIXEL_NOISE, 0, batch["row"].cpu().numpy(), 0), seed, draws * start)
        noise = torch.from_numpy(z).view(len(rows), draws, start)
        mean = torch.stack([mean for mean, _ in rows])
        factors = torch.stack([torch.linalg.cholesky(c + 1e-12 * torch.eye(start)) for _, c in rows])
        drawn = mean[:, None] + noise @ factors.mT
        wanted = {q.name: q for q in self.quantities if q.name in want}
        return Answer(
            {n: q.scaling.inverse(drawn[..., place[n]]).float() for n, q in wanted.items()},
            {n: q.scaling.inverse(mean[..., place[n]]).float() for n, q in wanted.items()},
        )

    def conditional(self, t: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of all entries given the known ones; those are certain."""
        if not known.any():
            raise ValueError("nothing is known")
        c = self.covariance
        gain = c[:, known] @ torch.linalg.inv(c[known][:, known])
        mean, left = gain @ t[known], c - gain @ c[known]
        left[known], left[:, known], mean[known] = 0, 0, t[known]
        return mean, left


def sampled(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Values [count, n] by name in the quantities' units, drawn from the method's own joint distribution."""
    method = LinearGaussianMethod(LinearGaussian(), InputSpec(quantities=QUANTITIES))
    noise = torch.randn(count, ENTRIES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    entries = (noise @ torch.linalg.cholesky(method.covariance.detach()).T).split(
        [q.scaling.entries for q in QUANTITIES], dim=1
    )
    return {q.name: q.scaling.inverse(t).numpy() for q, t in zip(QUANTITIES, entries, strict=True)}


def exported(
    file: Path,
    config: MethodConfig | None = None,
    quantities: tuple[Quantity, ...] = QUANTITIES,
    views: ObjectViews | None = None,
    survey: Survey | None = None,
) -> Path:
    """A file as `armillary export` writes it; of a run on a survey its own views and quantities."""
    views = views or ObjectViews(columns=("redshift",))
    inputs = InputSpec(quantities=quantities) if survey is None else views.input_spec(survey)
    config = config or LinearGaussian()
    run = replace(toy_run(Path("runs"), Path("survey")), method=config, views=views)
    pixels = (survey or described_survey()).to_json()
    metadata = {"run": to_json(run), "inputs": asdict(inputs), "pixels": pixels, "step": 8}
    told = {"format": EXPORT_FORMAT, "commit": "0" * 40} | {name: json.dumps(x) for name, x in metadata.items()}
    tensors = config.build(inputs).state_dict()
    write_tensors(file, [Entry.of(name, x) for name, x in tensors.items()], told)
    return file
