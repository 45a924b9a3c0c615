"""Start a training run from its recipe's command line.

A recipe ends in `main(RECIPE, smoke=SMOKE, ...)`. The command line chooses a preset and changes any field:

    deepspeed recipes/dinov2_vitl.py --preset smoke --optim.lr 1e-4

Exit codes: 0 done; 1 crashed, or stopped after saving because the survey cannot be read any more; 2 bad input, said before anything
starts; 3 stopped because losses or gradients stayed non-finite; 4 a checkpoint could not be written or read; 75 stopped by SIGTERM,
SIGINT or SIGHUP after saving (run it again); 130 interrupted by a second SIGINT, without saving.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from armillary.engine.atomic_file import require_writable
from armillary.engine.command_line import repeated
from armillary.engine.config.run import Run

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_CHECKPOINT",
    "EXIT_CRASHED",
    "EXIT_INTERRUPTED",
    "EXIT_NON_FINITE",
    "EXIT_STOPPED",
    "main",
    "run_to_exit_code",
    "start",
]

EXIT_CRASHED = 1
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_CHECKPOINT = 4
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # as shells call an end by SIGINT


def main(recipe: Run, **presets: Run) -> None:
    """Run a recipe from its file; ends the process with an exit code (see the module's description).

    Args:
        recipe: The recipe.
        presets: Variants that `--preset NAME` chooses.
    """
    code = start(recipe, presets, sys.argv[1:])
    if code == EXIT_STOPPED:  # all is saved: whoever asks twice shall read this code, too
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # what is left goes with the process: to search it for circles would take a second and a half
    sys.exit(code)


def start(recipe: Run, presets: dict[str, Run], arguments: Sequence[str], open_loader: Any = None) -> int:
    """`main` as a function: parse, check, train.

    Args:
        recipe: The recipe.
        presets: Variants by name.
        arguments: Command line without the program's name.
        open_loader: Replaces `trainer.open_loader`.

    Returns:
        Exit code.
    """
    from armillary.engine.zero.processes import launch_problems, take_slurm_ranks

    launch = take_slurm_ranks(os.environ) or launch_problems()
    if launch:
        print(f"{recipe.name}: this run cannot start:", *(f"  {p}" for p in launch), sep="\n", file=sys.stderr)
        return EXIT_BAD_INPUT
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--preset", choices=sorted(presets), default=None)
    own.add_argument("--restore", type=Path, default=None)
    own.add_argument("--init-from", type=Path, default=None)
    own.add_argument("--plan", action="store_true")
    own.add_argument("--gpu", default="h100")
    own.add_argument("--gpus", type=int, default=1)
    own.add_argument("--plan.out", dest="plan_out", type=Path, default=None)
    own.add_argument("--local_rank", "--local-rank", type=int, default=None)  # put there by launchers, also in RANK
    first = os.environ.get("RANK", "0") == "0"
    for flag in repeated(arguments) if first else []:
        print(f"{recipe.name}: {flag} is given more than once: the last one counts", file=sys.stderr)
    try:
        with _Muted(not first):
            chosen, rest = own.parse_known_args(list(arguments))
            run = _override(recipe if chosen.preset is None else presets[chosen.preset], presets, rest)
    except SystemExit as error:
        return _leave(int(error.code or 0), first)
    if chosen.plan:
        return _plan(run, chosen.gpu, chosen.gpus, chosen.plan_out)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if run.train.micro_batch == "auto":
        from armillary.engine.plan.auto import with_micro_batch

        try:
            run, chosen_batch = with_micro_batch(run, world)
        except (ValueError, OSError) as error:
            if first:
                print(f"{run.name}: this run cannot start:\n{_indent(str(error))}", file=sys.stderr)
            return _leave(EXIT_BAD_INPUT, first)
        if first:
            print(chosen_batch, flush=True)
    from armillary.engine.train.checks import problems

    found = problems(run, world, "smoke" in presets and chosen.preset != "smoke")
    for option in ("restore", "init_from"):
        path = getattr(chosen, option)
        fetched = option == "init_from" and str(path).startswith("hf:")
        if path is not None and not fetched and not path.exists():
            found.append(f"--{option.replace('_', '-')}: must be an existing file, got {path}")
    if found:
        if first:
            print(f"{run.name}: this run cannot start:", *(f"  {p}" for p in found), sep="\n", file=sys.stderr)
        return _leave(EXIT_BAD_INPUT, first)
    return run_to_exit_code(run, restore=chosen.restore, init_from=chosen.init_from, open_loader=open_loader)


def _plan(run: Run, gpu: str, gpus: int, out: Path | None) -> int:
    """Say what a run will need, and write it as a page."""
    from armillary.engine.plan.plan import plan_of
    from armillary.engine.plan.report import text, write_page

    try:
        for name in ("steps", "global_batch", "micro_batch"):
            value = getattr(run.train, name)
            if value != "auto" and value < 1:
                raise ValueError(f"train.{name}: must be at least 1, got {value}")
        if out is not None:
            require_writable(out)
        plan = plan_of(run, gpu, gpus)
    except (ValueError, OSError) as error:
        print(f"{run.name}: no plan can be made:\n{_indent(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(text(plan))
    if out is not None:
        write_page(plan, out)
        print(f"written to {out}")
    return 0


def run_to_exit_code(
    run: Run, *, restore: Path | None = None, init_from: Path | None = None, open_loader: Any = None
) -> int:
    """`trainer.train`, with every foreseen end turned into an exit code and a message without a traceback.

    Returns:
        Exit code, see the module's description.
    """
    from armillary.engine.train import trainer
    from armillary.engine.train.loop import NonFinite, Stopped
    from armillary.engine.train.supply import DataLost
    from armillary.engine.weights.checkpoint import latest
    from armillary.engine.weights.verify import CheckpointError
    from armillary.engine.zero.processes import lost_ranks

    me = trainer.ranks()
    loaders = {} if open_loader is None else {"open_loader": open_loader}
    code, message = 0, ""
    try:
        trainer.train(run, restore=restore, init_from=init_from, **loaders)
    except Stopped:
        code = EXIT_STOPPED
    except trainer.BadInput as error:
        code, message = EXIT_BAD_INPUT, f"{run.name}: this run cannot start:\n" + _indent(str(error))
    except NonFinite as error:
        code, message = EXIT_NON_FINITE, f"{run.name}: stopped: {error}"
    except DataLost as error:
        code, message = EXIT_CRASHED, f"{run.name}: stopped: {error}"
    except CheckpointError as error:
        code, message = EXIT_CHECKPOINT, f"{run.name}: {error}"
    except (Exception, KeyboardInterrupt) as error:
        code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_CRASHED
        saved = latest(run.folder / "checkpoints")
        goes_on = "the same command " + ("begins anew" if saved is None else f"continues from {saved.name}")
        if code == EXIT_INTERRUPTED:
            print(f"{run.name}: interrupted without saving; {goes_on}", file=sys.stderr)
        else:
            traceback.print_exc()
        if (advice := lost_ranks(error, run.train.timeout_minutes, run.train.step_timeout_minutes)) is not None:
            print(f"{run.name}: {advice}. Then {goes_on}", file=sys.stderr)
        sys.stderr.flush()
        if me.world > 1:
            # Communication that is under way would keep this process from ending, and with it the launcher and all ranks.
            os._exit(code)
    if message and me.rank == 0:
        print(message, file=sys.stderr, flush=True)
    elif message:
        time.sleep(2)  # the launcher kills everybody when the first rank leaves; rank 0 has something to say
    return code


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _override(base: Run, presets: dict[str, Run], arguments: list[str]) -> Run:
    import tyro

    options = "Besides the fields: "
    if presets:
        options += f"--preset {{{','.join(sorted(presets))}}} chooses a variant of the recipe; "
    options += (
        "--restore PATH continues a portable export; "
        "--init-from FILE starts from the encoder in a safetensors or public DINOv2 file; "
        "--plan --gpu NAME --gpus N says what the run will need on these GPUs and starts nothing (--plan.out PAGE.html)."
    )
    return tyro.cli(
        tyro.conf.AvoidSubcommands[Run], default=base, args=arguments, description=options, prog=Path(sys.argv[0]).name
    )


class _Muted:
    """Nothing is printed inside: every rank parses, one speaks."""

    def __init__(self, mute: bool):
        self.mute = mute

    def __enter__(self) -> None:
        if self.mute:
            self.kept = sys.stdout, sys.stderr
            sys.stdout = sys.stderr = open(os.devnull, "w")

    def __exit__(self, *_: object) -> None:
        if self.mute:
            sys.stdout.close()
            sys.stdout, sys.stderr = self.kept


def _leave(code: int, first: bool) -> int:
    """Let rank 0 speak before the launcher, seeing another rank gone, kills it."""
    if not first and code:
        time.sleep(5)
    return code
