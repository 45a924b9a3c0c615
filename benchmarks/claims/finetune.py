"""What a trained encoder is worth to who has few labels: R2 of a label against their number, fine-tuned and from scratch.

    python benchmarks/claims/finetune.py RUN --data SURVEY
    python benchmarks/claims/finetune.py --summary

Ways to learn the label from the same images: the encoder of RUN fine-tuned whole, by low-rank additions (LoRA), a head on it alone, and the
same network from scratch. The validation split chooses each way's learning rate with 200 labels, then its number of steps with each number of
labels, on a draw of labels that is not reported; the test split is judged once for each of three seeds. A seed draws its labels
from the training split, the same for all ways, so differences are paired. One process. With `--seeds` and no number after it nothing is
judged on the test split: for trials of settings. `--summary` reads the rows of `--label` back: means over seeds and differences with 95 %
intervals by Student's t, and whether a way beats the network from scratch; `--figure FILE` draws the curve.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import append_rows, csv_option

from armillary.engine.data.format.survey import Survey
from armillary.engine.data.loading.loader import SequentialLoader
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.evaluate.probes.scores import r2
from armillary.engine.weights.init_weights import init_encoder
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.engine.zero.optim import AdamW, build_groups
from armillary.models.method import Batch, BatchKey
from armillary.models.supervised.finetune import FineTune, FineTuneMethod

WAYS = {
    "fine-tuned": (dict(trained="whole", layer_decay=0.75), (5e-4, 2e-3)),
    "LoRA": (dict(trained="lora", layer_decay=1.0), (2e-3, 1e-2)),
    "head": (dict(trained="head"), (3e-3, 1e-2)),
    "scratch": (dict(trained="whole", layer_decay=1.0, image_from=None), (5e-4, 2e-3)),
}
"""Settings of each way, and the learning rates that the validation split chooses from."""

CHOSEN_WITH, CHOSEN_SEED, BATCH = 200, 100, 32


@dataclass(frozen=True)
class Images:
    """Images of a split: rows of the catalogue [N] and fluxes [N, C, H, W]."""

    row: torch.Tensor
    image: torch.Tensor

    def drawn(self, count: int, seed: int) -> Images:
        """Some of them; more with the same seed hold the fewer."""
        chosen = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(self.row))[:count])
        return Images(self.row[chosen], self.image[chosen])


def images(folder: Path, split: str, known: np.ndarray) -> Images:
    """Images of a split whose label is known, by row of the catalogue."""
    rows, found = [], []
    for batch in SequentialLoader(folder, split=split, batch=256, device="cpu", modalities=("image",)):
        valid, keep = batch.get("valid"), torch.from_numpy(known[batch["row"].numpy()])
        rows.append(batch["row"][keep])
        found.append((batch["image"] if valid is None else batch["image"].masked_fill(~valid, 0.0))[keep])
    return Images(torch.cat(rows), torch.cat(found))


def train(method: FineTuneMethod, view: object, seen: Images, steps: int, lr: float, seed: int) -> None:
    """Train on images, drawn anew for each step."""
    optimizer, draw = AdamW(build_groups(method), clip_norm=1.0), np.random.default_rng(seed)
    method.train()
    for step in range(steps):
        chosen = torch.from_numpy(draw.choice(len(seen.row), min(BATCH, len(seen.row)), replace=False))
        position = torch.arange(len(chosen)) + step * BATCH
        batch = Batch(row=seen.row[chosen], image=seen.image[chosen], position=position)
        warm, fall = min(1.0, (step + 1) / 20), 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.set_step(step, {"learning_rate": lr * warm * fall, "weight_decay": 0.05})
        made = view(batch, BatchKey(seed, 0, step * BATCH, BATCH))  # type: ignore[operator]
        method(made, {}).total.backward()
        optimizer.clip_local()
        optimizer.step()
        optimizer.zero_grad()
    method.eval()


def score(method: FineTuneMethod, view: object, seen: Images, label: np.ndarray) -> float:
    """R2 of the label."""
    said = []
    for rows, image in zip(seen.row.split(256), seen.image.split(256), strict=True):
        said.append(method.encode(view(Batch(row=rows, image=image)))["prediction"][:, 0])  # type: ignore[operator]
    return r2(label[seen.row.numpy()], torch.cat(said).numpy())


def scores_of(path: Path, label: str) -> dict[tuple[str, int], dict[str, float]]:
    """R2 of a label by seed of each way and number of labels, in a CSV."""
    scores: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["label"] == label:
                scores[row["way"], int(row["labels"])][row["seed"]] = float(row["r2"])
    return scores


def draw(path: Path, label: str, figure_file: Path) -> None:
    """The curve: a point a seed, lines through the means."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "finetune"  # the same rows, the same file
    from matplotlib import pyplot as plt

    scores = scores_of(path, label)
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for place, way in enumerate(WAYS):
        counts = sorted(count for name, count in scores if name == way)
        values = [list(scores[way, count].values()) for count in counts]
        if not counts:
            continue
        (line,) = axes.plot(counts, [np.mean(v) for v in values], label=way, lw=1.5, color=f"C{place}")
        for count, of_seeds in zip(counts, values, strict=True):
            beside = count * 1.05 ** (place - (len(WAYS) - 1) / 2)
            axes.plot([beside] * len(of_seeds), of_seeds, "o", ms=4, color=line.get_color(), alpha=0.6)
    axes.set(xscale="log", xlabel="labelled galaxies", ylabel=f"R2 of {label.replace('_', ' ')}, test galaxies")
    counts = sorted({count for _, count in scores})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(figure_file, metadata={"Date": None})


def summary(path: Path, label: str) -> list[str]:
    """What the rows of a CSV say of a label, a line each."""
    scores, said = scores_of(path, label), []
    for (way, count), by_seed in scores.items():
        values = np.array(list(by_seed.values()))
        text = f"{count:>5} labels  {way:<10}  R2 {values.mean():+.3f} ± {values.std(ddof=1):.3f} (sd of {len(values)} seeds)"
        if way != "scratch" and (shared := sorted(by_seed.keys() & scores["scratch", count].keys()))[1:]:
            gaps = np.array([by_seed[seed] - scores["scratch", count][seed] for seed in shared])
            half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
            verdict = (
                "better than scratch" if gaps.mean() > half else "worse than scratch" if gaps.mean() < -half else ""
            )
            text += f"; minus scratch {gaps.mean():+.3f} ± {half:.3f}: {verdict or 'no difference found'}"
        said.append(text)
    return said


def main(arguments: Iterable[str] | None = None) -> None:
    """Measure, and write a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    csv_option(parser, "finetune")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--label", default="redshift")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--lr", type=float, help="of every way, where the validation split has chosen it before")
    args = parser.parse_args(None if arguments is None else list(arguments))
    if args.summary:
        print(*summary(args.csv, args.label), sep="\n")
        if args.figure is not None:
            draw(args.csv, args.label, args.figure)
        return
    if args.run is None or args.data is None:
        parser.error("a run and --data are needed, or --summary")
    torch.set_num_threads(1)

    survey, source = Survey.load(args.data), TrainedEncoder.open(args.run)
    # A label may depend on the flux, which self-distillation is made to forget.
    crops = replace(source.run.views, n_global=1, n_local=0, local_size=0, flux_jitter=0.0, sky_noise_max=0.0)
    views = ObjectViews(image=crops, targets=(args.label,))
    inputs, view, still = views.input_spec(survey), views.build(survey, "cpu"), views.eval_view(survey, "cpu")
    labels = _labels(args.data, args.label)
    seen = {split: images(args.data, split, np.isfinite(labels)) for split in ("train", "validation", "test")}
    if len(seen["train"].row) < max(args.labels):
        parser.error(f"--labels: must be at most the {len(seen['train'].row)} of the training split")

    def measure(way: str, lr: float, steps: int, count: int, seed: int, split: str) -> float:
        torch.manual_seed(seed)
        config = FineTune(encoder=replace(source.run.method.vit, drop_path=0.0), image_from=args.run)
        method = replace(config, **WAYS[way][0]).build(inputs)
        if way != "scratch":
            init_encoder(method, "image", source, views, survey)
        train(method, view, seen["train"].drawn(count, seed), steps, lr, seed)
        return score(method, still, seen[split], labels)

    for way in args.ways:
        tried: dict[tuple[float, int, int], float] = {}

        def chosen(lr: float, steps: int, count: int, way: str = way, tried: dict = tried) -> float:
            if (lr, steps, count) not in tried:
                tried[lr, steps, count] = measure(way, lr, steps, count, CHOSEN_SEED, "validation")
                print("validation", way, count, lr, steps, f"{tried[lr, steps, count]:.4f}", flush=True)
            return tried[lr, steps, count]

        rates = WAYS[way][1] if args.lr is None else (args.lr,)
        lr = max(rates, key=lambda lr: chosen(lr, args.steps[0], CHOSEN_WITH)) if len(rates) > 1 else rates[0]
        for count in args.labels:
            trials = len(args.steps) > 1 or not args.seeds
            steps = max(args.steps, key=lambda steps: chosen(lr, steps, count)) if trials else args.steps[0]
            for seed in args.seeds:
                begin = time.perf_counter()
                value = measure(way, lr, steps, count, seed, "test")
                row = {"label": args.label, "way": way, "labels": count, "seed": seed, "lr": lr, "steps": steps}
                row |= {"r2": f"{value:.4f}", "seconds": f"{time.perf_counter() - begin:.1f}"}
                print(*row.values(), flush=True)
                append_rows(args.csv, [row])


def _labels(folder: Path, name: str) -> np.ndarray:
    from armillary.engine.data.format.catalog import read_catalog

    return read_catalog(folder, [name])[name].to_numpy().astype(np.float64)


if __name__ == "__main__":
    main()
