"""What a trained encoder is worth to who has few labels: R2 of a label against their number, fine-tuned and from scratch.

    python benchmarks/claims/finetune.py RUN --data SURVEY

Three ways to learn the label from the same images, with the same steps: the encoder of RUN fine-tuned whole, a head on it alone, and
the same network from scratch. Each way's learning rate (of two) is chosen with 200 labels on the validation split, with a seed that is not
reported; the test split is judged once for each of three seeds. Labels are the first N of the training split. One process.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

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
    "head": (dict(trained="head"), (2e-3, 1e-2)),
    "scratch": (dict(trained="whole", layer_decay=1.0, image_from=None), (5e-4, 2e-3)),
}
"""Settings of each way, and the learning rates that the validation split chooses from."""

CHOSEN_WITH, CHOSEN_SEED, BATCH = 200, 100, 64


@dataclass(frozen=True)
class Images:
    """Images of a split: rows of the catalogue [N] and fluxes [N, C, H, W]."""

    row: torch.Tensor
    image: torch.Tensor


def images(folder: Path, split: str, most: int) -> Images:
    """The first images of a split."""
    rows, found = [], []
    for batch in SequentialLoader(folder, split=split, batch=256, device="cpu", modalities=("image",)):
        valid = batch.get("valid")
        rows.append(batch["row"])
        found.append(batch["image"] if valid is None else batch["image"].masked_fill(~valid, 0.0))
        if sum(map(len, rows)) >= most:
            break
    return Images(torch.cat(rows)[:most], torch.cat(found)[:most])


def train(method: FineTuneMethod, view: object, seen: Images, steps: int, lr: float, seed: int) -> None:
    """Train on images, drawn anew for each step."""
    optimizer, draw = AdamW(build_groups(method)), np.random.default_rng(seed)
    method.train()
    for step in range(steps):
        chosen = torch.from_numpy(draw.choice(len(seen.row), min(BATCH, len(seen.row)), replace=False))
        position = torch.arange(len(chosen)) + step * BATCH
        batch = Batch(row=seen.row[chosen], image=seen.image[chosen], position=position)
        warm, fall = min(1.0, (step + 1) / 20), 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.set_step(step, {"learning_rate": lr * warm * fall, "weight_decay": 0.05})
        made = view(batch, BatchKey(seed, 0, step * BATCH, BATCH))  # type: ignore[operator]
        method(made, {}).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    method.eval()


def score(method: FineTuneMethod, view: object, seen: Images, truth: np.ndarray) -> float:
    """R2 of the label."""
    said = []
    for rows, image in zip(seen.row.split(256), seen.image.split(256), strict=True):
        said.append(method.encode(view(Batch(row=rows, image=image)))["prediction"][:, 0])  # type: ignore[operator]
    known = np.isfinite(truth)
    return r2(truth[known], torch.cat(said).numpy()[known])


def main(arguments: Iterable[str] | None = None) -> None:
    """Measure, and write a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    csv_option(parser, "finetune")
    parser.add_argument("--label", default="redshift")
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(1)

    survey, source = Survey.load(args.data), TrainedEncoder.open(args.run)
    crops = replace(source.run.views, n_global=1, n_local=0, local_size=0)
    views = ObjectViews(image=crops, targets=(args.label,))
    inputs, view, still = views.input_spec(survey), views.build(survey, "cpu"), views.eval_view(survey, "cpu")
    labels = _labels(args.data, args.label)
    train_images = images(args.data, "train", max(args.labels))
    held_out = {split: images(args.data, split, 2000) for split in ("validation", "test")}

    def measure(way: str, lr: float, count: int, seed: int, split: str) -> float:
        torch.manual_seed(seed)
        config = FineTune(encoder=replace(source.run.method.vit, drop_path=0.0), image_from=args.run)
        method = replace(config, **WAYS[way][0]).build(inputs)
        if way != "scratch":
            init_encoder(method, "image", source, views, survey)
        train(method, view, Images(train_images.row[:count], train_images.image[:count]), args.steps, lr, seed)
        return score(method, still, held_out[split], labels[held_out[split].row.numpy()])

    for way, (_, rates) in WAYS.items():
        lr = max(rates, key=lambda lr: measure(way, lr, CHOSEN_WITH, CHOSEN_SEED, "validation"))
        for count, seed in itertools.product(args.labels, args.seeds):
            begin = time.perf_counter()
            value = measure(way, lr, count, seed, "test")
            row = {"way": way, "labels": count, "seed": seed, "lr": lr, "steps": args.steps, "r2": f"{value:.4f}"}
            row["seconds"] = f"{time.perf_counter() - begin:.1f}"
            print(*row.values(), flush=True)
            if args.csv:
                append_rows(args.csv, [row])


def _labels(folder: Path, name: str) -> np.ndarray:
    from armillary.engine.data.format.catalog import read_catalog

    return read_catalog(folder, [name])[name].to_numpy().astype(np.float64)


if __name__ == "__main__":
    main()
