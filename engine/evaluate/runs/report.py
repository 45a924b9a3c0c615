"""One self-contained HTML page about a run: verdict, figures, pictures, training curves, provenance.

Nothing is loaded from elsewhere: pictures are data URIs, charts are inline SVG. What is missing (labels, logs, a second
split) is left out, and the page says so.

Shape legend: M samples of the shown split, D embedding dimensions, C bands, H x W pixels.
"""

from __future__ import annotations

import datetime
import html
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from armillary.engine.atomic_file import write_text
from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.page import figures, pictures
from armillary.engine.evaluate.page.run_log import RunLog
from armillary.engine.evaluate.page.style import CSS
from armillary.engine.evaluate.probes.probes import nearest
from armillary.engine.evaluate.runs import report_run
from armillary.engine.evaluate.runs.evaluation import COSINE, TRAINED, UNTRAINED, LabelResult, MethodResult, Verdict

__all__ = ["Gallery", "layout_map", "page", "run_header", "write_report"]

MAP_SAMPLES = 3000
INPUT_COLUMNS = 8
COLOUR_OF = {TRAINED: 0, UNTRAINED: 1}


@dataclass(frozen=True)
class Gallery:
    """Samples of the shown split, with pictures.

    Attributes:
        split: Which split they are from.
        vector: [M, D] embeddings of the trained encoder.
        label: [M] label, NaN where unknown; None where the survey has none.
        picture: M colour pictures [H, W, 3] uint8.
        inputs: By title, pictures [S, S, 3] uint8 of what the model sees of the first samples.
    """

    split: str
    vector: np.ndarray
    label: np.ndarray | None
    picture: Sequence[np.ndarray]
    inputs: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the lengths against each other."""
        lengths = {len(self.vector), len(self.picture), *([] if self.label is None else [len(self.label)])}
        if len(lengths) != 1 or not len(self.vector):
            raise ValueError(
                f"gallery: need as many embeddings as pictures and labels, one or more, got {len(self.vector)}, "
                f"{len(self.picture)} and {'no' if self.label is None else len(self.label)}"
            )


def write_report(path: Path, verdict: Verdict, survey: Survey, logbook: RunLog, gallery: Gallery) -> None:
    """Write the page.

    Args:
        path: HTML file.
        verdict: Numbers and what follows from them.
        survey: What was embedded.
        logbook: The run's record and logs.
        gallery: Pictures and embeddings to show.
    """
    name = verdict.result.label if verdict.result else ""
    sections = [
        _verdict(verdict),
        _comparison(verdict.result) if verdict.result else "",
        _predictions(verdict.result) if verdict.result else "",
        _map(gallery, name),
        _neighbours(gallery, name),
        _data(survey, gallery, name),
        _inputs(gallery),
        report_run.training(logbook),
        report_run.throughput(logbook),
        report_run.provenance(survey, logbook),
    ]
    text = page(f"{verdict.run} on {verdict.survey}", run_header(verdict.run, survey, logbook), sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def page(title: str, header: str, sections: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: For the browser's tab.
        header: HTML of the head.
        sections: HTML of the body, in order.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>"
        f"{header}<main>{''.join(sections)}</main>"
        f"<footer>Written {_now()} by armillary. This page needs no network.</footer></body></html>\n"
    )


def layout_map(vector: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Two-dimensional map of embeddings.

    t-SNE on directions (the cosine geometry of the search); principal components where there are few samples, or where
    all embeddings are alike.

    Args:
        vector: [M, D].
        seed: Of the layout.

    Returns:
        [M, 2] float, and the method's name.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = vector / np.maximum(np.linalg.norm(vector, axis=1, keepdims=True), 1e-12)
    if len(vector) >= 50 and len(np.unique(unit.round(6), axis=0)) >= 50:
        kept = PCA(min(32, *unit.shape), random_state=seed).fit_transform(unit)
        layout = TSNE(init="pca", perplexity=min(30, len(unit) / 4), random_state=seed, n_jobs=2).fit_transform(kept)
        return layout.astype(np.float64), "t-SNE"
    centred = unit - unit.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    flat = np.zeros((len(vector), 2))
    flat[:, : len(axes)] = centred @ axes.T
    return flat, "principal components"


def run_header(title: str, survey: Survey, logbook: RunLog, more: Mapping[str, str] | None = None) -> str:
    """Head of a page about a run: its name, its command and the facts of its training.

    Args:
        title: The heading.
        survey: What was evaluated on.
        logbook: The run's record.
        more: Further facts, after the survey.
    """
    record = logbook.record
    facts: dict[str, str] = {"Survey": _contents(survey), **(more or {})}
    if steps := logbook.series.get("step"):
        facts["Steps trained"] = f"{int(steps[1][-1]):,}"
    if commit := record.get("commit"):
        facts["Commit"] = str(commit)[:12] + ("+changes" if "+changes" in str(commit) else "")
    versions = record.get("versions") or {}
    if "torch" in versions:
        facts["Versions"] = ", ".join(
            f"{k} {versions[k]}" for k in ("armillary", "torch", "deepspeed") if versions.get(k)
        )
    if device := record.get("device") or record.get("run", {}).get("device"):
        facts["Device"] = str(device)
    facts["Evaluated"] = _now()
    cells = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    command = record.get("command")
    shown = shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")
    line = f'<p class="quiet"><code>{html.escape(shown)}</code></p>' if shown else ""
    return (
        f'<header><div class="brand">Armillary</div><h1>{html.escape(title)}</h1>'
        f"{line}<dl class='facts'>{cells}</dl></header>"
    )


def _contents(survey: Survey) -> str:
    """Name, size and modalities of a survey in a line."""
    count = f"{survey.name}, {survey.count():,}"
    if survey.spectrum is None:
        return f"{count} cutouts in {''.join(survey.bands)}"
    return f"{count} {'pairs of ' + ''.join(survey.bands) + ' cutout and spectrum' if survey.bands else 'spectra'}"


def _verdict(verdict: Verdict) -> str:
    head, items = "", []
    result, collapse = verdict.result, verdict.collapse
    if result:
        best = result.methods[0]
        s = best.scores
        second = [("NMAD", f"{s.nmad:.4f}")]
        if s.outlier_threshold is not None:
            second.append((f"outliers beyond {s.outlier_threshold:g}", f"{s.outliers:.1%}"))
        second.append(("bias", f"{s.bias:+.4f}"))
        head = (
            f'<div class="headline"><div><div class="big">{_number(s.r2, ".3f")}'
            f"<small> ± {_number(s.r2_se, '.3f')}</small></div>"
            f'<div class="label">R² of {html.escape(result.label)}, {best.probe} on the frozen encoder</div></div>'
            + "".join(f'<div><div class="second">{v}</div><div class="label">{k}</div></div>' for k, v in second)
            + "</div>"
        )
        if s.note:
            items.append(("note", "Note", s.note))
        for aim in result.aims:
            d = aim.difference
            items.append(
                (
                    "yes" if aim.reached else "no",
                    "Aim reached" if aim.reached else "Aim missed",
                    f"R² minus that of the {aim.against}, same probe: {_number(d.value, '+.3f')} ± "
                    f"{_number(d.se, '.3f')}; the aim is {aim.margin:+.2f} or more. 95% of paired bootstraps lie between "
                    f"{_number(d.low, '+.3f')} and {_number(d.high, '+.3f')}.",
                )
            )
    else:
        items.append(("note", "No label", verdict.missing))
    if collapse.collapsed:
        items.append(("no", "Collapsed", "; ".join(collapse.reasons) + "."))
    else:
        use = ""
        if collapse.prototypes_in_use is not None and collapse.prototypes:
            use = f" {collapse.prototypes_in_use:.0f} of {collapse.prototypes:.0f} prototypes are in use."
        twins = "no two embeddings are equal" if not collapse.duplicates else f"{collapse.duplicates} are duplicates"
        items.append(
            (
                "yes",
                "No collapse",
                f"Effective rank {collapse.effective_rank:.1f} of {collapse.dimensions} over {collapse.samples:,} "
                f"embeddings; {twins}.{use}",
            )
        )
    counted = [a.reached for a in result.aims] if result else []
    overall = f'<p class="overall">{sum(counted)} of {len(counted)} aims reached.</p>' if counted else ""
    lines = "".join(f'<li class="{kind}"><b>{title}</b><span>{html.escape(t)}</span></li>' for kind, title, t in items)
    return f'<h2>Verdict</h2><section class="card">{head}{overall}<ul class="verdict">{lines}</ul></section>'


def _comparison(result: LabelResult) -> str:
    methods = result.methods
    colours = [COLOUR_OF.get(m.features, 2) for m in methods]
    dots = figures.interval_chart([m.scores.r2 for m in methods], [m.scores.r2_se for m in methods], colours)
    threshold = methods[0].scores.outlier_threshold
    rows, group = [], ""
    for number, (method, dot) in enumerate(zip(methods, dots, strict=True)):
        s = method.scores
        if method.features != group:
            group = method.features
            rows.append(f'<tr class="group"><td colspan="6">{html.escape(group[0].upper() + group[1:])}</td></tr>')
        outliers = "" if threshold is None else f"<td>{_with_error(100 * s.outliers, 100 * s.outliers_se, '.1f')}</td>"
        rows.append(
            f"<tr{' class=head' if number == 0 else ''}><td>{html.escape(method.probe)}</td>"
            f'<td>{_with_error(s.r2, s.r2_se, ".3f")}</td><td class="dot">{dot}</td>'
            f"<td>{_with_error(s.nmad, s.nmad_se, '.4f')}</td>{outliers}"
            f"<td>{_with_error(s.bias, s.bias_se, '+.4f')}</td></tr>"
        )
    outlier_head = "" if threshold is None else f"<th>outliers &gt; {threshold:g}, %</th>"
    dz = "(predicted − true) / (1 + true)" if result.redshift else "predicted − true"
    dropped = f" {result.dropped:,} samples without it were left out." if result.dropped else ""
    return (
        f"<h2>How well is {html.escape(result.label)} predicted?</h2>"
        f'<p class="quiet">Every probe is fitted on {result.train:,} training samples and judged on {result.test:,} test '
        f"samples.{dropped} Residuals are {dz}; NMAD is 1.4826 times their median absolute deviation. Errors are bootstrap "
        "standard errors over test samples.</p>"
        '<section class="card"><div class="scroll"><table><thead><tr><th>Probe on frozen features</th><th>R²</th>'
        f'<th class="dot"></th><th>NMAD</th>{outlier_head}<th>bias</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div></section>"
    )


def _predictions(result: LabelResult) -> str:
    rivals = [m for m in result.methods if m.features != result.methods[0].features and m.probe == COSINE.name]
    shown: list[MethodResult] = [result.methods[0], *rivals[:1]]
    best = max(result.methods, key=lambda m: np.nan_to_num(m.scores.r2, nan=-np.inf))
    if best not in shown:
        shown.append(best)
    cards = "".join(
        f'<div class="card"><h3>{html.escape(m.features[0].upper() + m.features[1:])}, {html.escape(m.probe)}</h3>'
        f"{figures.prediction_chart(result.true, m.predicted, m.scores, label=result.label, redshift=result.redshift)}</div>"
        for m in shown
    )
    return (
        f"<h2>Predicted against true {html.escape(result.label)}</h2>"
        '<p class="quiet">Each dot is a test galaxy, warmer where they crowd. The line in the lower panel is the running '
        f'median, dashes mark the outlier threshold.</p><div class="grid">{cards}</div>'
    )


def _map(gallery: Gallery, name: str) -> str:
    count = min(len(gallery.vector), MAP_SAMPLES)
    points, method = layout_map(gallery.vector[:count])
    label = None if gallery.label is None else gallery.label[:count]
    sheet = pictures.picture_map(points, gallery.picture[:count])
    coloured = f", coloured by {html.escape(name)}" if name and label is not None else ""
    return (
        "<h2>Map of the embeddings</h2>"
        f'<p class="quiet">{method} of {count:,} {html.escape(gallery.split)} embeddings{coloured}; beside it the galaxies '
        "that lie there, one in each occupied cell.</p>"
        f'<div class="grid"><div class="card">{figures.point_map(points, label, label=name)}</div>'
        f'<div class="card"><img class="sheet" alt="Galaxies at their place in the map" '
        f'src="{pictures.data_uri(sheet)}"></div></div>'
    )


def _neighbours(gallery: Gallery, name: str, queries: int = 6, shown: int = 8) -> str:
    if len(gallery.vector) < 3:
        return ""
    count = len(gallery.vector)
    shown = min(shown, count - 1)
    order = np.arange(count)
    if gallery.label is not None and np.isfinite(gallery.label).any():
        order = np.argsort(np.where(np.isfinite(gallery.label), gallery.label, np.inf))
        order = order[: np.isfinite(gallery.label).sum()]
    chosen = order[np.linspace(0, len(order) - 1, min(queries, len(order)) + 2).astype(int)[1:-1]]
    found, distance = nearest(gallery.vector, gallery.vector[chosen], shown + 1)
    rows = []
    for query, index, far in zip(chosen, found, distance, strict=True):
        others = [(i, d) for i, d in zip(index, far, strict=True) if i != query][:shown]
        cells = [_picture(gallery, query, name, "query")]
        cells += [_picture(gallery, i, name, "", f"{1 - d:.3f}") for i, d in others]
        rows.append(f'<div class="row neighbours" style="--n:{shown + 1}">{"".join(cells)}</div>')
    value = f"{html.escape(name)} and " if name else ""
    return (
        '<h2>Nearest neighbours</h2><p class="quiet">The outlined galaxy is the query; to its right the galaxies whose '
        f"embeddings point in the most similar direction, with {value}cosine similarity. "
        f'All are from the {html.escape(gallery.split)} split.</p><div class="sky">{"".join(rows)}</div>'
    )


def _picture(gallery: Gallery, index: int, name: str, kind: str, note: str = "") -> str:
    value = ""
    if gallery.label is not None and np.isfinite(gallery.label[index]):
        value = f"{'z' if name == 'redshift' else html.escape(name)} {gallery.label[index]:.3f}"
    source = pictures.data_uri(gallery.picture[index])
    text = "<br>".join(t for t in (value, note) if t)
    caption = f"<figcaption>{text}</figcaption>" if text else ""
    return f'<figure class="{kind}"><img alt="" src="{source}">{caption}</figure>'


def _data(survey: Survey, gallery: Gallery, name: str, shown: int = 96) -> str:
    count = min(shown, len(gallery.picture))
    chosen = np.arange(count)
    order = ""
    if gallery.label is not None and np.isfinite(gallery.label).any():
        chosen = chosen[np.argsort(np.where(np.isfinite(gallery.label[:count]), gallery.label[:count], np.inf))]
        order = f", in order of {html.escape(name)}"
    sheet = pictures.mosaic([gallery.picture[int(i)] for i in chosen], 12 if count > 24 else 6)
    height, width = survey.height, survey.width
    side = f"{width} x {height} pixels"
    if survey.pixel_scale_arcsec:
        side += f" ({width * survey.pixel_scale_arcsec:.0f} x {height * survey.pixel_scale_arcsec:.0f} arcsec)"
    stretch = (
        "Display pictures, as they are."
        if survey.unit == "count"
        else f"Colours are {_composite(survey)} with an asinh stretch (Lupton et al. 2004)."
    )
    return (
        f'<h2>The data</h2><p class="quiet">{count} cutouts of the {html.escape(gallery.split)} split{order}, {side}. '
        f'{stretch}</p><div class="sky"><img class="sheet" alt="Cutouts of the survey" '
        f'src="{pictures.data_uri(sheet)}"></div>'
    )


def _composite(survey: Survey) -> str:
    bands = [survey.bands[i] for i in (len(survey.bands) - 1, len(survey.bands) // 2, 0)]
    return ", ".join(f"{html.escape(b)} as {c}" for b, c in zip(bands, ("red", "green", "blue"), strict=True))


def _inputs(gallery: Gallery) -> str:
    if not gallery.inputs:
        return ""
    cards = ""
    for title, row in gallery.inputs.items():
        sheet = pictures.mosaic(list(row), min(len(row), INPUT_COLUMNS))
        enlarge = max(1, 900 // sheet.shape[1])
        cards += f'<div class="card"><h3>{html.escape(title)}</h3><img class="sheet" style="image-rendering:pixelated" '
        cards += f'alt="{html.escape(title)}" src="{pictures.data_uri(sheet, enlarge=min(enlarge, 3))}"></div>'
    return (
        '<h2>What the encoder sees</h2><p class="quiet">Model inputs after crop and stretch, each channel from its 1% to '
        f'its 99.7% quantile.</p><div class="stack">{cards}</div>'
    )


def _number(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "\u2212") if np.isfinite(value) else "undefined"


def _with_error(value: float, error: float, form: str) -> str:
    if not np.isfinite(value):
        return '<span class="se">undefined</span>'
    spread = f' <span class="se">± {error:{form.lstrip("+")}}</span>' if np.isfinite(error) else ""
    return _number(value, form) + spread


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
