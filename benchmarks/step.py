"""Time of a training step by phase, ms a sample, appended to a CSV.

    python benchmarks/step.py                                    # DINOv2: ViT-S/12 on two CPU threads, fp32 and bf16
    python benchmarks/step.py --device cuda --model vitl --batch 72 --precision bf16
    python benchmarks/step.py --method specformer --batch 4      # 768 wide, 6 blocks, 7,781 pixels
    python benchmarks/step.py --method astroclip --batch 8       # frozen ViT-S/12 and SpecFormer: run, and read from disk
    python benchmarks/step.py --method mmae --batch 16           # recipes/mmae.py's improved preset: all tokens, and the shown
    python benchmarks/step.py --method galaxy_walker --batch 16  # stage 2 on the tiny random model; also tokens/s and memory
    python benchmarks/step.py --method mosaic --batch 128        # recipes/mosaic.py's improved: all hidden tokens asked for, and half

DINOv2: 2 x 144 + 8 x 60 pixel crops, 65,536 prototypes, drop path 0.3. AstroCLIP: one 144 pixel crop and one spectrum a
pair; `--tokens recomputed` runs the frozen encoders in every step, `cached` reads their tokens from a token cache in a
temporary folder, checks and converts them, as the phase `read`; both alternate step by step where both are asked for.
MMAE: one 64 pixel crop and one spectrum a pair; hidden tokens left out, as it trains, against all of them computed, as
methods do that set hidden ones to 0.
MOSAIC: 153 numbers and 115 errors a galaxy in 24 tokens; every hidden token asked for, as improved trains, against half of them.
Random inputs and weights, new ones in each step. Medians and percentiles are over steps after the warm-up. Other work on
the same cores shows in them, so repeat, and compare within a run; processor time, of all threads, suffers less from it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from common import append_rows, csv_option, device_name, summary
from step_methods import (
    MODELS,
    CachedCLIP,
    CLIPSubject,
    DINOv2Subject,
    GalaxyWalkerSubject,
    MMAESubject,
    MOSAICSubject,
    SpecFormerSubject,
)
from step_training import Subject, Training, phase_columns

from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.mmae.token_drop import TokenDropMMAE
from armillary.models.mosaic.masking import Masking
from armillary.models.mosaic.mosaic import MOSAIC
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.specformer.specformer_pretraining import SpecFormerPretraining


def subjects(args: argparse.Namespace, folder: Path) -> dict[str, Subject]:
    """What to time, by the words that tell it from others."""
    if args.method == "dinov2":
        config = DINOv2(vit=MODELS[args.model], head=Head(prototypes=args.prototypes), centering=args.centering)
        return {args.model: DINOv2Subject(config)}
    if args.method == "specformer":
        return {"specformer": SpecFormerSubject(SpecFormerPretraining())}
    if args.method == "galaxy_walker":
        return {"galaxy_walker": GalaxyWalkerSubject()}
    if args.method == "mmae":
        whole = TokenDropMMAE(image_mask=(0.0, 0.0), spectrum_mask=(0.0, 0.0), image_drop=0.0, spectrum_drop=0.0)
        return {"mmae all": MMAESubject(whole), "mmae shown": MMAESubject(TokenDropMMAE())}
    if args.method == "mosaic":
        half = MOSAIC(masking=Masking(asked=0.5))
        return {"mosaic all": MOSAICSubject(MOSAIC()), "mosaic half": MOSAICSubject(half)}
    recomputed = CLIPSubject(MODELS[args.model], SpecFormer())
    cached = CachedCLIP(
        recomputed, folder, args.warmup + args.repeats, args.batch, args.tokens_dtype, threads=args.threads
    )
    both: dict[str, Subject] = {"recomputed": recomputed, "cached": cached}
    return {f"{args.model} {name}": both[name] for name in args.tokens}


def columns(args: argparse.Namespace, name: str, subject: Subject) -> dict[str, object]:
    """Columns of a row that say what was timed."""
    if args.method == "dinov2":
        return {"model": name, "centering": args.centering, "prototypes": args.prototypes}
    if args.method in ("specformer", "galaxy_walker"):
        return {"model": name}
    model, tokens = name.split()
    if isinstance(subject, CachedCLIP):
        tokens = f"{tokens} {args.tokens_dtype}"
        return {"model": model, "tokens": tokens, "gb_per_pair": subject.gigabytes_per_pair}
    return {"model": model, "tokens": tokens}


def token_columns(training: Training, batch: int, ms: float) -> dict[str, object]:
    """Tokens of a galaxy's prompt, tokens a second, and the greatest memory of this process so far."""
    prepared = training.prepared(0)
    tokens = prepared["input_ids"].shape[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    print(f"galaxy_walker: {tokens} tokens a galaxy, {1e3 * tokens / ms:.0f} tokens/s, {peak:.2f} GiB at most")
    return {"tokens": tokens, "tokens_per_s": 1e3 * tokens / ms, "peak_gib": peak}


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = ("dinov2", "specformer", "astroclip", "mmae", "mosaic", "galaxy_walker")
    parser.add_argument("--method", choices=methods, default="dinov2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=MODELS, default="vits", help="image encoder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--centering", choices=("softmax", "sinkhorn"), default="softmax")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--tokens", choices=("recomputed", "cached"), nargs="+", default=["recomputed", "cached"])
    parser.add_argument("--tokens-dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    csv_option(parser, "step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    for precision in args.precision:
        with tempfile.TemporaryDirectory(prefix="armillary-step-") as folder:
            measure(args, precision, device, Path(folder) / "tokens")


def measure(args: argparse.Namespace, precision: str, device: torch.device, folder: Path) -> None:
    """Time one precision; the subjects take turns."""
    timed = subjects(args, folder)
    trainings = {}
    steps, processor = ({name: [] for name in timed} for _ in range(2))
    for name, subject in timed.items():
        torch.manual_seed(0)
        trainings[name] = Training(subject, precision, device, args.batch)
    for number in range(args.warmup + args.repeats):
        for name, training in trainings.items():
            begin = time.process_time()
            seconds = training.step()
            if number >= args.warmup:
                steps[name].append(seconds)
                processor[name].append(1e3 * (time.process_time() - begin) / args.batch)
    rows = []
    for name, subject in timed.items():
        unit = subject.unit
        row: dict[str, object] = {
            "benchmark": f"{args.method} step",
            "device": device_name(device),
            **columns(args, name, subject),
            "precision": precision,
            "batch": args.batch,
            "steps": args.repeats,
            f"gflop_per_{unit}": trainings[name].method.flops_per_sample() / 1e9,
            **phase_columns(steps[name], args.batch, subject),
        }
        if isinstance(subject, GalaxyWalkerSubject):
            row |= token_columns(trainings[name], args.batch, float(row["ms_per_galaxy"]))  # type: ignore[arg-type]
        if device.type == "cpu":
            row[f"processor_ms_per_{unit}"] = summary(processor[name]).median
        rows.append(row)
        total = f"ms_per_{unit}"
        spread = f"(20-80 %: {row[f'{total}_p20']:.0f} to {row[f'{total}_p80']:.0f})"
        busy = f", {row[f'processor_{total}']:.0f} ms of processor time" if device.type == "cpu" else ""
        print(f"{name} {precision}: {row[total]:.0f} ms a {unit} {spread}{busy}")
        print("  " + ", ".join(f"{phase} {row[f'{phase}_ms']:.1f}" for phase in subject.phases))
    if len(rows) == 2:
        ratios = [rows[0][c] / rows[1][c] for c in rows[0] if c in (f"ms_per_{unit}", f"processor_ms_per_{unit}")]
        print(f"  {' over '.join(timed)}: {', in processor time '.join(f'{r:.2f}' for r in ratios)}")
    append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
