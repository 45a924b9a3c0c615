"""A task of a study: similarity search within a modality and across modalities.

In a shared space every object's image is searched for with its spectrum and the reverse: its own partner is the one
right answer. Beyond that, answers should be like the query: nDCG with gains by closeness of a label, the query's own
object left out, which compares searches within and across modalities on equal terms.

Shape legend: M test samples, D embedding dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.page import figures, html
from armillary.engine.evaluate.probes.scores import MAD_TO_SIGMA, residuals
from armillary.engine.evaluate.search.index import Answers, Index
from armillary.engine.evaluate.search.pictures import Tile, draw_objects, tile_row
from armillary.engine.evaluate.search.retrieval import (
    PartnerRanks,
    bootstrap_error,
    closeness,
    gain_ndcg,
    nearest_other,
    rank_partners,
)
from armillary.engine.evaluate.study.study import FeatureSet, Measure, Outcome, Study

__all__ = ["SearchOptions", "search"]

TASK = "search"
RECALLS = (1, 5, 10)
DEPTH = 10  # answers that nDCG looks at
LEAST = 12  # test samples
DOTS = 1000  # of a scatter; each is a mark of the SVG, so that it takes the page's colours
NAMES = {f"ndcg@{DEPTH}": f"nDCG@{DEPTH}", "nmad@1": "NMAD@1"}


@dataclass(frozen=True)
class SearchOptions:
    """How to judge a search.

    Attributes:
        label: Label that answers should share with the query; empty for none.
        tolerance: Its difference at which an answer is worth nothing; of dz / (1 + z) where the label is "redshift".
        queries: Objects to show with their answers.
        answers: Answers to show of each.
        resamples: Bootstrap resamples of the queries.
    """

    label: str = "redshift"
    tolerance: float = 0.05
    queries: int = 4
    answers: int = 8
    resamples: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.tolerance > 0:
            raise ValueError(f"tolerance: must be positive, got {self.tolerance}")
        for name, least in (("queries", 0), ("answers", 1), ("resamples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class _Pair:
    """Queries of one feature set, answers of another, over the test samples that both have."""

    query: FeatureSet
    answer: FeatureSet
    rows: np.ndarray  # [M] of the catalogue
    queries: np.ndarray  # [M, D]
    answers: np.ndarray  # [M, D]
    named: bool  # by the sets' names in full, where modalities do not tell pairs apart

    @property
    def features(self) -> str:
        return f"{self.query.name} > {self.answer.name}"

    @property
    def title(self) -> str:
        if not self.query.space:
            return f"{self.query.name}, within"
        one, other = (f.name if self.named else f.modality for f in (self.query, self.answer))
        return f"{one} \u2192 {other}"

    @property
    def crosses(self) -> bool:
        return self.query.name != self.answer.name


@dataclass(frozen=True)
class _Found:
    """What one pair gave."""

    pair: _Pair
    ranks: PartnerRanks | None
    label: np.ndarray | None  # [M] NaN where unknown
    nearest: np.ndarray | None  # [M] label of the best answer that is another object
    measures: tuple[Measure, ...]


def search(study: Study, options: SearchOptions | None = None) -> Outcome:
    """Search the test split with itself, for all pairs of feature sets that share a space, and within every other set.

    Args:
        study: Embeddings and catalogue.
        options: How to judge; the defaults if absent.

    Returns:
        recall@1, 5, 10, MRR, median rank and nDCG@10 of partners across modalities, nDCG@10 and NMAD of the nearest
        answer's label for all, with bootstrap errors over queries; chance beside each as model "chance".

    Raises:
        ValueError: There are no embeddings to search, or fewer than 12 test samples have both of a pair.
    """
    options = options or SearchOptions()
    pairs = _pairs(study)
    if not pairs:
        raise ValueError("there are no embeddings, only predictions")
    missing = ""
    if options.label:
        try:
            study.label(options.label)
        except ValueError as error:
            missing = str(error)
    found = [_judge(study, pair, options, bool(options.label) and not missing) for pair in pairs]
    lines = [line for f in found if (line := _line(f))]
    sections = [_table(found, options, missing), _agreement(found, options), _panels(study, pairs, options)]
    measures = tuple(m for f in found for m in f.measures)
    return Outcome(TASK, measures, tuple(lines), tuple(s for s in sections if s))


def _pairs(study: Study) -> list[_Pair]:
    sets = [f for f in study.features.values() if not f.targets]
    modalities = [f.modality for f in sets if f.space]
    named = len(set(modalities)) < len(modalities)
    pairs = []
    for query in sets:
        for answer in sets:
            if query.name != answer.name and (not query.space or query.space != answer.space):
                continue
            wide = [f.embeddings.vector.shape[1] for f in (query, answer)]
            if wide[0] != wide[1]:
                raise ValueError(
                    f"{query.name} and {answer.name} are said to share the space {query.space!r}, but have "
                    f"{wide[0]} and {wide[1]} dimensions"
                )
            rows = study.rows(study.test_split, query.name, answer.name)
            if len(rows) < LEAST:
                both = " and ".join(dict.fromkeys((query.name, answer.name)))
                raise ValueError(f"{LEAST} test samples or more must have {both}, got {len(rows)}")
            vectors = [study.vectors(f.name, rows) for f in (query, answer)]
            pairs.append(_Pair(query, answer, rows, vectors[0], vectors[1], named))
    return pairs


def _judge(study: Study, pair: _Pair, options: SearchOptions, labelled: bool) -> _Found:
    measures: list[Measure] = []
    count = len(pair.rows)

    def add(
        target: str, metric: str, values: np.ndarray, chance: float, statistic: Callable[[np.ndarray], float] = _mean
    ) -> None:
        error = bootstrap_error(values, statistic, resamples=options.resamples, seed=study.seed)
        value, number = statistic(values), len(values)
        measures.append(Measure(TASK, pair.features, target, "", metric, value, error, number))
        measures.append(Measure(TASK, pair.features, target, "chance", metric, chance, samples=number))

    ranks = None
    if pair.crosses:
        ranks = rank_partners(pair.queries, pair.answers)
        for k in RECALLS:
            add("partner", f"recall@{k}", ranks.recall(k), k / count)
        harmonic = 1 / np.arange(1, count + 1)
        add("partner", "MRR", ranks.reciprocal(), float(harmonic.sum() / count))
        add("partner", "median rank", ranks.rank(), (count + 1) / 2, _median)
        discounts = 1 / np.log2(np.arange(2, DEPTH + 2))
        add("partner", f"ndcg@{DEPTH}", ranks.ndcg(DEPTH), float(discounts.sum() / count))
    label = nearest = None
    if labelled:
        label = study.label(options.label)[pair.rows]
        known = np.isfinite(label)
        if known.sum() > max(DEPTH, LEAST):
            label_known, redshift = label[known], options.label == "redshift"
            queries, answers = pair.queries[known], pair.answers[known]
            gains = closeness(label_known, options.tolerance, redshift=redshift)
            value, chance = gain_ndcg(queries, answers, gains, DEPTH)
            relevant = np.isfinite(value)
            if relevant.any():
                add(options.label, f"ndcg@{DEPTH}", value[relevant], float(chance[relevant].mean()))
            first = nearest_other(queries, answers, study.seed)
            nearest = np.full(count, np.nan)
            nearest[known] = label_known[first]
            away = residuals(label_known, label_known[first], redshift=redshift)
            add(options.label, "nmad@1", away, _chance_nmad(label_known, redshift, study.seed), _nmad)
        else:
            label = None
    return _Found(pair, ranks, label, nearest, tuple(measures))


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _median(values: np.ndarray) -> float:
    return float(np.median(values))


def _nmad(values: np.ndarray) -> float:
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))))


def _chance_nmad(label: np.ndarray, redshift: bool, seed: int) -> float:
    """NMAD where the answer is any other object, from 20,000 draws."""
    generator = np.random.default_rng(seed)
    query, step = generator.integers(0, len(label), 20_000), generator.integers(1, len(label), 20_000)
    return _nmad(residuals(label[query], label[(query + step) % len(label)], redshift=redshift))


def _value(found: _Found, target: str, metric: str, model: str = "") -> Measure | None:
    wanted = (target, metric, model)
    return next((m for m in found.measures if (m.target, m.metric, m.model) == wanted), None)


def _line(found: _Found) -> str:
    recall, chance = (_value(found, "partner", "recall@10", model) for model in ("", "chance"))
    if recall is None or chance is None:
        return ""
    return (
        f"{found.pair.title}: recall@10 {recall.value:.2f} \u00b1 {recall.error:.2f} against chance {chance.value:.3f} "
        f"(N = {recall.samples})"
    )


def _table(found: list[_Found], options: SearchOptions, missing: str) -> Markup:
    columns = [("partner", f"recall@{k}") for k in RECALLS] + [("partner", "MRR"), ("partner", "median rank")]
    labelled = any(f.label is not None for f in found)
    if labelled:
        columns += [(options.label, f"ndcg@{DEPTH}"), (options.label, "nmad@1")]
    if not any(f.ranks for f in found):
        columns = [c for c in columns if c[0] != "partner"]
    name = options.label
    head = [html.lines(NAMES.get(m, m), *([] if t == "partner" else [name])) for t, m in columns]
    rows = []
    for one in found:
        for model, title in (("", one.pair.title), ("chance", html.quiet("by chance"))):
            rows.append([title, *(_cell(_value(one, t, m, model)) for t, m in columns)])
    counts = sorted({len(f.pair.rows) for f in found})
    among = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    text = (
        f"Queries and candidates are {among} test samples. Across modalities the query's own partner is the one right "
        "answer: recall@k is how often it is among the first k, MRR the mean of one over its rank. Errors are bootstrap "
        "standard errors over queries; equal similarities count as a random order of them would."
    )
    if labelled:
        away = "|dz| / (1 + z)" if options.label == "redshift" else "a difference"
        text += (
            f" nDCG by {name} asks for answers like the query: gains fall from 1 at an equal {name} to 0 at {away} of "
            f"{options.tolerance:g}, the query's own object left out in every row; NMAD@1 is the scatter of the best such "
            f"answer's {name} around the query's."
        )
    if missing:
        text += f" Agreement of labels is left out: {missing}."
    return html.section("Similarity search", text, html.card(html.table(["Search", *head], [("", rows)])))


def _cell(measure: Measure | None) -> str:
    if measure is None:
        return ""
    form = ".1f" if measure.metric == "median rank" else ".3f"
    return html.number(measure.value, measure.error, form, quiet=not math.isfinite(measure.error))


def _agreement(found: list[_Found], options: SearchOptions) -> Markup:
    shown = [f for f in found if f.label is not None and f.nearest is not None]
    if not shown:
        return Markup()
    cards = []
    style: dict[str, Any] = {"s": 8, "linewidths": 0, "alpha": 0.6}
    for one in shown:
        assert one.label is not None and one.nearest is not None
        figure, axes = figures.canvas(4.0, 3.6)
        low, high = float(np.nanmin(one.label)), float(np.nanmax(one.label))
        axes.plot([low, high], [low, high], color=figures.MUTED, lw=1)
        axes.scatter(one.label[:DOTS], one.nearest[:DOTS], color=figures.SERIES[0 if one.pair.crosses else 1], **style)
        axes.set_xlabel(f"{options.label} of the query")
        axes.set_ylabel(f"{options.label} of the best answer")
        cards.append(html.card(figures.svg(figure), title=one.pair.title))
    text = f"Each dot is a query (the first {DOTS:,}) with the most similar other object; its own partner is left out."
    return html.section(f"Is the best answer at the same {options.label}?", text, html.grid(cards))


def _panels(study: Study, pairs: list[_Pair], options: SearchOptions) -> Markup:
    drawable = {"image": bool(study.survey.bands), "spectrum": study.survey.spectrum is not None}
    able = [p for p in pairs if drawable.get(p.query.modality) and drawable.get(p.answer.modality)]
    spaces = [p.query.space for p in able if p.crosses]
    shown = [p for p in able if not spaces or p.query.space == spaces[0]]
    if not shown or not options.queries:
        return Markup()
    title = "What the search finds"
    shards = [study.folder / shard.name for shard in study.survey.shards]
    if not (shards and all(path.is_file() for path in shards)):
        return html.section(title, "No pictures: the shards of the survey are not on this machine.")
    common = shown[0].rows
    for pair in shown[1:]:
        common = np.intersect1d(common, pair.rows)
    chosen = np.random.default_rng(study.seed).permutation(common)[: options.queries]
    label = None
    if options.label in study.survey.labels:
        column = study.catalogue[options.label].to_numpy()
        label = column if column.dtype.kind in "fiub" else None
    count = min(options.answers, min(len(p.rows) for p in shown) - 1)
    results = [_answers(pair, chosen, count) for pair in shown]
    wanted: dict[str, list[int]] = {}
    for pair, answers in zip(shown, results, strict=True):
        wanted.setdefault(pair.query.modality, []).extend(chosen.tolist())
        wanted.setdefault(pair.answer.modality, []).extend(pair.rows[answers.row].ravel().tolist())
    drawn = {m: draw_objects(study.folder, study.survey, m, rows) for m, rows in wanted.items()}

    def tile(modality: str, row: int, note: str, outlined: bool) -> Tile:
        value = ""
        if label is not None and np.isfinite(label[row]):
            value = f"{'z' if options.label == 'redshift' else options.label} {label[row]:.3f}"
        return Tile(drawn[modality].get(row, Markup()), (value, note), outlined)

    cards = []
    for number, query in enumerate(chosen.tolist()):
        body = []
        for pair, answers in zip(shown, results, strict=True):
            tiles = [tile(pair.query.modality, query, "query", True)]
            for place, similarity in zip(answers.row[number], answers.similarity[number], strict=True):
                row = int(pair.rows[place])
                own = row == query
                note = f"{similarity:.3f}" + (", partner" if own else "")
                tiles.append(tile(pair.answer.modality, row, note, own))
            body.append(html.subsection(pair.title, html.sky(tile_row(tiles, count + 1))))
        cards.append(html.card(*body))
    text = (
        f"Test objects drawn at random, each with its {count} best answers "
        "and their cosine similarity. The query is outlined, and so is its own partner where it is among the answers; within "
        "a modality the query is left out."
    )
    return html.section(title, text, html.stack(cards))


def _answers(pair: _Pair, chosen: np.ndarray, count: int) -> Answers:
    place = np.searchsorted(pair.rows, chosen)
    index = Index.build(pair.answers, kind="exact")
    return index.search(pair.queries[place], count, leave_out=None if pair.crosses else place)
