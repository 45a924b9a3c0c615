"""What each part of stage 2 is worth to a tiny random language model: experts, gate, period, tokens, neighbours; one table.

    make demo-galaxy-walker
    python benchmarks/galaxy_walker/ffn_ablation.py -o runs/demo-galaxy-walker

The demo's survey and its first stage's runs `neighbours` and `shuffled` are read; another folder with these three will do. Each
variant is the preset `smoke` of stage 2 with one flag changed, shorter and without questions, in as many seeds, a process a run. A
run that has ended well is not repeated, so the same command goes on where an earlier one was ended. At the end the task
`ablation` holds all against the first variant: FOLDER/ffn-ablation/report.html, and rows of CSV.

Nothing in the model is pretrained and its width is 64. What it can show is whether a part changes what is learnt; a published
number it cannot reproduce. Settings were fixed before the runs and not tuned; the baseline of R2 is the mean, 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import append_rows, csv_option

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("redshift", "log_mstar")
GEOMETRY = ("--views.geometry", "geometry-neighbours.parquet")
ADAPTER = "--method.adapter"

VARIANTS: dict[str, tuple[str, ...]] = {
    "mixture": GEOMETRY,
    "euclidean": (*GEOMETRY, f"{ADAPTER}.use", "euclidean"),
    "spherical": (*GEOMETRY, f"{ADAPTER}.use", "spherical", f"{ADAPTER}.start", "None"),
    "hyperbolic": (*GEOMETRY, f"{ADAPTER}.use", "hyperbolic", f"{ADAPTER}.start", "None"),
    "even-gate": (*GEOMETRY, f"{ADAPTER}.gate", "even"),
    "every-block": (*GEOMETRY, f"{ADAPTER}.every", "1"),
    "no-adapters": (*GEOMETRY, f"{ADAPTER}.every", "0"),
    "released": (*GEOMETRY, f"{ADAPTER}.experts", "published", f"{ADAPTER}.start", "None"),
    "no-geometry": (),
    "shuffled": ("--views.geometry", "geometry-shuffled.parquet"),
}


def command(folder: Path, variant: str, seed: int, steps: int) -> list[str]:
    """The command line of one run."""
    flags = [str(folder / word) if word.endswith(".parquet") else word for word in VARIANTS[variant]]
    fixed = f"--preset smoke --device cpu --telemetry.no-tensorboard --train.steps {steps} --seed {seed}"
    places = ["--data.path", folder / "survey", "--out", folder / "ffn-ablation", "--name", f"{variant}-{seed}"]
    recipe = ROOT / "recipes" / "galaxy_walker_stage2.py"
    words = [sys.executable, recipe, *fixed.split(), *places, "--views.targets", *TARGETS, "--views.questions", *flags]
    return [str(word) for word in words]


def run(words: list[str], log: Path) -> None:
    """Run a command on one thread; what it says goes to a file.

    Raises:
        RuntimeError: It did not end well.
    """
    with log.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        raise RuntimeError(f"{' '.join(words)}: exit code {code}, see {log}")


def armillary(*words: object) -> list[str]:
    """A command line of `armillary`."""
    return [sys.executable, "-m", "armillary.engine.cli", *map(str, words)]


def train(folder: Path, variant: str, seed: int, steps: int) -> Path:
    """Train one run, if it has not been; returns its folder."""
    place = folder / "ffn-ablation" / f"{variant}-{seed}"
    if not any((place / "export").glob("*.safetensors")):
        start = time.perf_counter()
        run(command(folder, variant, seed, steps), place.with_suffix(".log"))
        print(f"{place.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return place


def main() -> None:
    """Make tokens, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder with survey/, neighbours/ and shuffled/")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    csv_option(parser, "ffn_ablation")
    args = parser.parse_args()
    out = args.out / "ffn-ablation"
    out.mkdir(exist_ok=True)
    for name in ("neighbours", "shuffled"):
        tokens = args.out / f"geometry-{name}.parquet"
        if not tokens.is_file():
            words = ("embed", args.out / name, "--data", args.out / "survey", "--readout", "geometry", "-o", tokens)
            run(armillary(*words), out / f"embed-{name}.log")
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train, args.out, v, seed, args.steps) for seed in args.seeds for v in args.variants]
        first, *others = [str(job.result()) for job in jobs]
    survey = ("--data", str(args.out / "survey"), "--device", "cpu", "-o", str(out))
    run(armillary("evaluate", first, "--compare", *others, "--tasks", "ablation", *survey), out / "evaluate.log")
    rows = [
        {"benchmark": "ffn_ablation", "device": "cpu", "steps": args.steps, "seeds": len(args.seeds),
         "variant": m["features"], "label": m["target"], "metric": m["metric"], "value": m["value"], "error": m["error"],
         "samples": m["samples"]}
        for m in json.loads((out / "metrics.json").read_text())["measures"]
    ]  # fmt: skip
    append_rows(args.csv, rows)
    print(
        *(f"{r['value']:+.3f} ± {r['error']:.3f}  {r['metric']:14} {r['label']:9} {r['variant']}" for r in rows),
        sep="\n",
    )
    print(f"report: {out / 'report.html'}; appended {len(rows)} rows to {args.csv}")


if __name__ == "__main__":
    main()
