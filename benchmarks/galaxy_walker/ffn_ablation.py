"""What each part of stage 2 is worth to a tiny random language model: experts, gate, period, tokens, neighbours; one table.

    make demo-galaxy-walker
    python benchmarks/galaxy_walker/ffn_ablation.py -o runs/demo-galaxy-walker

The demo's survey and its first stage's runs `neighbours` and `shuffled` are read; another folder with these three will do. Each
variant is the preset `smoke` of stage 2 with one setting changed, shorter, with images of four tokens, and without questions (nearly
all simulated galaxies have the same answers), in as many seeds, a forked process a run. What has been trained is not trained again,
so the same command goes on where an earlier one was ended. All are held against the first variant as the task `ablation` does:
FOLDER/ffn-ablation/report.html, and rows of CSV.

Nothing in the model is pretrained and its width is 64. What it can show is whether a part changes what is learnt; a published
number it cannot reproduce. Settings were fixed before the runs and not tuned; the mean has an R2 of 0.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import append_rows, csv_option

from armillary.engine import cli
from armillary.engine.atomic_file import atomic_open
from armillary.engine.config.config_json import to_json
from armillary.engine.config.run import Run
from armillary.engine.config.schedule import Constant, Cosine, Schedules
from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.ablation.task import compare
from armillary.engine.evaluate.ablation.variants import RunResult, settings_of
from armillary.engine.evaluate.embedding.embed import embed_readouts, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.page.html import header, write_page
from armillary.engine.train.trainer import train
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.galaxy_walker.adapter import GeometryAdapter
from armillary.recipes.galaxy_walker_stage2 import SMOKE

ADAPTER = SMOKE.method.adapter
ADAPTERS = {
    "mixture": ADAPTER,
    "euclidean": replace(ADAPTER, use=("euclidean",)),
    "spherical": replace(ADAPTER, use=("spherical",), start=None),
    "hyperbolic": replace(ADAPTER, use=("hyperbolic",), start=None),
    "even gate": replace(ADAPTER, gate="even"),
    "every block": replace(ADAPTER, every=1),
    "no adapters": replace(ADAPTER, every=0),
    "released experts": GeometryAdapter(every=ADAPTER.every, experts="published", start=None),
}
TOKENS = ("no geometry tokens", "shuffled neighbours")
VARIANTS = (*ADAPTERS, *TOKENS)


def tokens(folder: Path, variant: str) -> Path | None:
    """File of a variant's geometry tokens."""
    runs = {"no geometry tokens": None, "shuffled neighbours": folder / "geometry-shuffled.parquet"}
    return runs.get(variant, folder / "geometry-neighbours.parquet")


def recipe(folder: Path, variant: str, seed: int, steps: int) -> Run:
    """The record of one run."""
    views = replace(SMOKE.views, geometry=tokens(folder, variant), targets=("redshift", "log_mstar"), questions=())
    return replace(
        SMOKE,
        name=f"{variant.replace(' ', '-')}-{seed}",
        seed=seed,
        device="cpu",
        out=folder / "ffn-ablation",
        method=replace(SMOKE.method, adapter=ADAPTERS.get(variant, ADAPTER), image_side=56),
        views=views,
        data=replace(SMOKE.data, path=folder / "survey"),
        schedule=Schedules(learning_rate=Cosine(end=0.0, warmup_steps=steps // 6), weight_decay=Constant(0.01)),
        train=replace(SMOKE.train, steps=steps),
        checkpoint=replace(SMOKE.checkpoint, every_steps=steps),
        telemetry=replace(SMOKE.telemetry, tensorboard=False),
    )


def predictions(run: Run) -> np.ndarray:
    """[M, n] predictions of a run on the test split; trained where it has not been."""
    place = run.out / run.name
    file = place / "test.npy"
    if not file.is_file():
        start = time.perf_counter()
        folder = train(run)
        encoder = Encoder.load(TrainedEncoder.open(folder), Survey.load(run.data.path), torch.device("cpu"))
        pipeline = encoder.pipeline("properties")
        rows, values = embed_readouts(
            pipeline, open_batches(run.data.path, "test", pipeline.view, 64, torch.device("cpu"))
        )["properties"]
        with atomic_open(file) as opened:
            np.save(opened, values[rows.argsort()])
        print(f"{run.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return np.load(file)


def truth(survey: Path, targets: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    """[M] labels of the test split."""
    table = pq.read_table(survey / "catalog.parquet", columns=[*targets, "split"])
    test = table["split"].to_numpy(zero_copy_only=False) == "test"
    return {name: table[name].to_numpy()[test].astype(np.float64) for name in targets}


def main() -> None:
    """Make tokens, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder with survey/, neighbours/ and shuffled/")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    csv_option(parser, "ffn_ablation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out / "ffn-ablation"
    out.mkdir(exist_ok=True)
    for name in ("neighbours", "shuffled"):
        file = args.out / f"geometry-{name}.parquet"
        words = ("embed", args.out / name, "--data", args.out / "survey", "--readout", "geometry", "-o", file)
        if not file.is_file() and (code := cli.main([*map(str, words)])):
            sys.exit(code)
    runs = [recipe(args.out, variant, seed, args.steps) for seed in args.seeds for variant in args.variants]
    # A process trains once, with all imports behind it, those of transformers too.
    runs[0].method.build(runs[0].views.input_spec(Survey.load(args.out / "survey")))
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        found = pool.map(predictions, runs, chunksize=1)
    targets = SMOKE.views.targets
    results = [
        RunResult(run.name, run.seed, settings_of(to_json(run)), dict(zip(targets, values.T, strict=True)), {})
        for run, values in zip(runs, found, strict=True)
    ]
    outcome = compare(results, truth(args.out / "survey", targets))
    print(*outcome.lines, sep="\n")
    head = header("Parts of stage 2", "A tiny random model; settings as in benchmarks/galaxy_walker/ffn_ablation.py.")
    write_page(out / "report.html", "Parts of stage 2", head, outcome.sections)
    rows = [
        {"benchmark": "ffn_ablation", "device": "cpu", "steps": args.steps, "seeds": len(args.seeds), "variant": m.features,
         "label": m.target, "metric": m.metric, "value": m.value, "error": m.error, "samples": m.samples}
        for m in outcome.measures
    ]  # fmt: skip
    append_rows(args.csv, rows)
    print(
        *(f"{m.value:+.3f} ± {m.error:.3f}  {m.metric:14} {m.target:9} {m.features}" for m in outcome.measures),
        sep="\n",
    )
    print(f"report: {out / 'report.html'}; appended {len(rows)} rows to {args.csv}")


if __name__ == "__main__":
    main()
