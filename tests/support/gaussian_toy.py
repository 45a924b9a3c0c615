"""Galaxies whose quantities are jointly Gaussian, and a method that knows their covariance: every answer is exact."""

import re
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import Survey, VectorRecord
from armillary.engine.data.sources.source import Sample
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.quantity_view import QuantityView
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.study.study import Study
from armillary.models.method import Method
from armillary.models.quantities import Answer, Questions

SIZES = {"redshift": 1, "stellar_mass": 1, "photometry_lsst": 3, "photometry_spherex": 4, "sfh": 8}
TOTAL = sum(SIZES.values())
PLACES = {}
for _name, _size in SIZES.items():
    PLACES[_name] = slice(sum(SIZES[n] for n in PLACES), sum(SIZES[n] for n in PLACES) + _size)
MEAN = np.full(TOTAL, 10.0)
LOADINGS = np.random.default_rng(5).normal(size=(TOTAL, 3))
COVARIANCE = LOADINGS @ LOADINGS.T + np.diag(np.r_[0.3, 0.3, np.full(TOTAL - 2, 1.0)])
VIEWS = ObjectViews(quantities=tuple(QuantityView(name=n, vector=n if size > 1 else "") for n, size in SIZES.items()))


class Gaussians:
    """A source of them; the first component of photometry_lsst is unknown where i % 7 == 1."""

    bands, pixel_scale_arcsec, unit = (), None, "uJy"
    labels = {"redshift": "", "stellar_mass": ""}
    vectors = tuple(
        VectorRecord(n, tuple(f"{k} um" for k in range(1, size + 1)), "uJy") for n, size in SIZES.items() if size > 1
    )

    def __init__(self, count):
        self.count = count
        self.values = np.random.default_rng(1).multivariate_normal(MEAN, COVARIANCE, count)

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"Gaussians({self.count})"

    def read(self, index):
        vectors = {r.name: self.values[index, PLACES[r.name]].astype(np.float32) for r in self.vectors}
        if index % 7 == 1:
            vectors["photometry_lsst"][0] = np.nan
        labels = {name: float(self.values[index, PLACES[name]][0]) for name in self.labels}
        return Sample(f"g{index:05d}", None, None, np.nan, np.nan, labels, f"gaussian {index}", vectors=vectors)


class GaussianAnswers(Method):
    """Answers from the joint distribution, whose widths are multiplied by `width`."""

    def __init__(self, quantities, width=1.0):
        super().__init__()
        self.quantities, self.width = quantities, width
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, scalars):
        raise NotImplementedError

    def parameter_groups(self):
        return []

    def flops_per_sample(self):
        return 0.0

    def encode(self, batch):
        return {"quantities": batch["quantities"].float()}

    def questions(self):
        return Questions(tuple(SIZES), self.quantities)

    def answer(self, batch, given, want, draws, seed):
        values, begin = [], 0
        for q in self.quantities:
            entries = batch["quantities"][:, begin : (begin := begin + q.scaling.entries)]
            values.append(q.scaling.inverse(entries.double()))
        x = torch.cat(values, 1).numpy() - MEAN
        known = np.zeros(TOTAL, bool)
        for name in given:
            match = re.fullmatch(r"(\w+)(?:\[(\d+):(\d+)\])?", name)
            place = PLACES[match[1]]
            part = slice(place.start + int(match[2]), place.start + int(match[3])) if match[2] else place
            known[part] = True
        if not known.any():
            raise ValueError("given: must name a quantity, got none")
        asked = np.concatenate([np.arange(TOTAL)[PLACES[w]] for w in want])
        medians = np.empty((len(x), len(asked)))
        drawn = np.empty((len(x), draws, len(asked)))
        for i, one in enumerate(x):
            has = known & np.isfinite(one)
            gain = np.linalg.solve(COVARIANCE[np.ix_(has, has)], COVARIANCE[np.ix_(has, asked)]).T
            spread = COVARIANCE[np.ix_(asked, asked)] - gain @ COVARIANCE[np.ix_(has, asked)]
            medians[i] = MEAN[asked] + gain @ one[has]
            rng = np.random.default_rng([seed, int(batch["row"][i])])
            drawn[i] = rng.multivariate_normal(medians[i], spread * self.width**2, draws, method="cholesky")
        ends = np.cumsum([0, *(SIZES[w] for w in want)])
        parts = {w: slice(a, b) for w, a, b in zip(want, ends[:-1], ends[1:], strict=True)}
        return Answer(
            {w: torch.from_numpy(drawn[..., p]).float() for w, p in parts.items()},
            {w: torch.from_numpy(medians[:, p]).float() for w, p in parts.items()},
        )


def gaussian_survey(folder, count):
    build(Gaussians(count), folder, name="gaussians", test_fraction=0.4, seed=2, processes=1, progress=False)
    return folder


def gaussian_encoder(folder, width=1.0, name="gaussian"):
    survey = Survey.load(folder)
    view = VIEWS.eval_view(survey, "cpu")
    method = GaussianAnswers(view.quantities.quantities, width)
    return Encoder(method, view, {}, SimpleNamespace(name=name, views=VIEWS))


def gaussian_study(folder):
    return Study(folder, Survey.load(folder), pq.read_table(folder / "catalog.parquet"), {})
