"""Evaluations that a run makes of itself while it trains: nearest neighbours on held-out samples, by all ranks.

Each rank embeds its share of the reference and held-out samples with the method as it stands, teachers included, and finds the
neighbours of its share; predictions meet on all ranks, so that all know the same score. Nothing of the training is touched:
generators and modes of modules are put back, and no loader of the run is used, so checkpoints have the bits of a run without.
Weights that ZeRO-3 has cut are gathered once for the evaluation: shares differ in length and in which modules their samples need, so
ranks that gathered module by module would wait for each other for ever.
An evaluation that cannot be made is said and logged as unknown; it ends no run.

Shape legend: N reference samples, M held-out samples, D embedding dimensions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from armillary.engine.config.evals import KNN
from armillary.engine.config.randomness import random_states, set_random_states
from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import Survey
from armillary.engine.token_cache.training import evaluating
from armillary.engine.zero.processes import Ranks, gather_objects
from armillary.models.method import Method

__all__ = ["Evals", "eval_problems", "readout_problems"]

Embedded = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By readout: rows of the catalogue and vectors [n, D]."""


def eval_problems(run: Run, survey: Survey) -> list[str]:
    """Broken rules of a run's evaluations, as `evals: rule, got value`.

    Args:
        run: The run.
        survey: Its survey, loaded from its folder.
    """
    found: list[str] = []
    names = [knn.name for knn in run.evals]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        found.append(f"evals: must have different labels or readouts, got {twice[0]} twice")
    best = run.checkpoint.keep_best
    if best is not None and best not in names:
        found.append(
            f"checkpoint.keep_best: must be one of the run's evals ({', '.join(names) or 'none'}), got {best!r}"
        )
    if run.checkpoint.patience is not None and best is None:
        found.append(
            "checkpoint.patience: must go with checkpoint.keep_best, whose score it waits for, got "
            f"{run.checkpoint.patience} alone"
        )
    if not run.evals:
        return found
    if not callable(getattr(run.views, "eval_view", None)):
        found.append(f"views: must be an object with a method `eval_view` for evals, got {type(run.views).__name__}")
    splits = sorted({shard.split for shard in survey.shards} - {run.data.split})
    for number, knn in enumerate(run.evals):
        where = f"evals.{number}"
        for field, least in (("every_steps", 1), ("samples", 2), ("neighbours", 1), ("references", knn.neighbours)):
            if getattr(knn, field) < least:
                found.append(f"{where}.{field}: must be at least {least}, got {getattr(knn, field)}")
        if knn.split not in splits:
            have = ", ".join(splits) or "none; build one with --validation-fraction"
            found.append(f"{where}.split: must be a split beside the training split ({have}), got {knn.split!r}")
        if not _is_number(survey, knn.label):
            have = ", ".join(survey.labels) or "none"
            found.append(f"{where}.label: must be a numeric label of the survey ({have}), got {knn.label!r}")
    return found


def _is_number(survey: Survey, label: str) -> bool:
    import pyarrow as pa  # here and below, since every run imports this module, and most have no evals
    import pyarrow.parquet as pq

    assert survey.folder is not None, "a survey that was loaded from its folder"
    path = survey.folder / "catalog.parquet"
    if label not in survey.labels or not path.is_file():
        return label in survey.labels
    kind = pq.read_schema(path).field(label).type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def readout_problems(run: Run, method: Method) -> list[str]:
    """Readouts of evaluations that the method does not have, as `evals: rule, got value`."""
    known = method.readouts()
    return [
        f"evals.{number}.readout: must be one of {', '.join(known)}, got {knn.readout!r}"
        for number, knn in enumerate(run.evals)
        if known and knn.readout is not None and knn.readout not in known
    ]


class Evals:
    """A run's evaluations; all ranks together.

    Args:
        run: The run.
        method: As it is trained.
        survey: The run's survey.
        device: Where the method is.
        me: This rank.
        say: Takes lines for the screen.
        whole: Inside, the method has all its weights on every rank: `Sharded.whole`.
    """

    def __init__(
        self,
        run: Run,
        method: Method,
        survey: Survey,
        device: torch.device,
        me: Ranks,
        say: Callable[..., None],
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._run, self._method, self._survey, self._device, self._me, self._say = run, method, survey, device, me, say
        self._whole = whole
        self._view = run.views.eval_view(survey, device) if run.evals else None
        self._labels: dict[str, np.ndarray] = {}
        self._spent, self._began = 0.0, time.monotonic()

    def due(self, step: int) -> list[KNN]:
        """The evaluations that this step ends with."""
        last = step == self._run.train.steps
        return [knn for knn in self._run.evals if last or step % knn.every_steps == 0]

    def results(self, step: int) -> dict[str, float]:
        """Evaluate, where it is due.

        Returns:
            For the log: `eval/NAME`, NaN where it could not be found; `eval/seconds` of this step, and `eval/share`, the share
            of the time since the start that went into evaluations. Empty where nothing is due.
        """
        due = self.due(step)
        if not due:
            return {}
        begin, states = time.monotonic(), random_states()
        with self._whole(), evaluating(self._method):
            found = self._scores(due)
        set_random_states(*states)
        seconds = time.monotonic() - begin
        self._spent += seconds
        share = self._spent / max(time.monotonic() - self._began, 1e-9)
        told = ", ".join(f"{knn.name} R2 {found[f'eval/{knn.name}']:.3f}" for knn in due)
        self._say(f"step {step}: {told} on held-out samples; {seconds:.1f} s, evals take {share:.1%} of the time")
        return {**found, "eval/seconds": seconds, "eval/share": share}

    def _scores(self, due: list[KNN]) -> dict[str, float]:
        """Score by `eval/NAME`."""
        unknown = {f"eval/{knn.name}": math.nan for knn in due}
        train = self._run.data.split
        wanted = {train: max(knn.references for knn in due)}
        wanted |= {split: max(knn.samples for knn in due if knn.split == split) for split in {k.split for k in due}}
        mine = self._together(lambda: {split: self._embedded(split, count) for split, count in sorted(wanted.items())})
        if mine is None:
            return unknown
        references = gather_objects(mine[train])
        own = self._together(lambda: [self._predicted(knn, references, mine[knn.split]) for knn in due])
        if own is None:
            return unknown
        answers = zip(*gather_objects(own), strict=True)
        return {f"eval/{knn.name}": _score(parts, knn.samples) for knn, parts in zip(due, answers, strict=True)}

    def _embedded(self, split: str, count: int) -> Embedded:
        """This rank's share of the first samples of a split, embedded."""
        from armillary.engine.evaluate.embedding.embed import Pipeline, embed_readouts, open_batches

        assert self._survey.folder is not None and self._view is not None
        count, rank, world = min(count, self._survey.count(split)), self._me.rank, self._me.world
        share = range(count * rank // world, count * (rank + 1) // world)
        if not share:
            return {}
        batch = self._run.micro_batch
        batches = open_batches(self._survey.folder, split, self._view, batch, self._device, [share])
        return embed_readouts(Pipeline(self._view, self._method.encode), batches)

    def _predicted(self, knn: KNN, references: list[Embedded], held_out: Embedded) -> tuple[np.ndarray, np.ndarray]:
        """Labels of this rank's share of the held-out samples, NaN where unknown, and what the neighbours say."""
        from armillary.engine.evaluate.probes import probes

        there = {name for part in references for name in part}
        wanted = [knn.readout] if knn.readout else [*self._method.readouts(), *sorted(there)]
        name = next((name for name in wanted if name in there), None)
        if name is None:
            raise ValueError(f"no training sample has the embedding {wanted[0] if wanted else ''!r}")
        rows, vectors = (np.concatenate(x) for x in zip(*(p[name] for p in references if name in p), strict=True))
        # Shares of ranks follow each other, so these are the first samples whatever the number of ranks.
        rows, vectors = rows[: knn.references], vectors[: knn.references]
        vectors, labels, _ = probes.labelled(vectors, self._label(knn.label)[rows])
        if name not in held_out:
            return np.empty(0), np.empty(0)
        own_rows, own = held_out[name]
        return self._label(knn.label)[own_rows], probes.KNN(knn.neighbours, knn.metric).predict(vectors, labels, own)

    def _label(self, name: str) -> np.ndarray:
        """[rows of the catalogue] float64."""
        if name not in self._labels:
            from armillary.engine.data.format.catalog import read_catalog

            self._labels[name] = read_catalog(self._survey, [name])[name].to_numpy().astype(np.float64)
        return self._labels[name]

    def _together(self, action: Callable[[], Any]) -> Any:
        """Do something on every rank; None on all, and a warning, where it fails on one."""
        value, problem = None, ""
        try:
            value = action()
        except (ValueError, OSError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problems := [said for said in gather_objects(problem) if said]:
            self._say(f"WARNING: the evaluation of this step is left out: {problems[0]}", loud=True)
            return None
        return value


def _score(parts: tuple[tuple[np.ndarray, np.ndarray], ...], samples: int) -> float:
    """R2 of what the ranks found, over the first samples whose label is known; NaN where these are fewer than two."""
    from armillary.engine.evaluate.probes.scores import r2

    true, predicted = (np.concatenate(x)[:samples] for x in zip(*parts, strict=True))
    known = np.isfinite(true)
    return r2(true[known], predicted[known]) if known.sum() > 1 else math.nan
