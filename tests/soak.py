"""Ten deaths a ZeRO stage, many of them inside a save, must not change one bit of a run's last checkpoint.

    python tests/soak.py [--stages 1 2 3] [--kills 10] [--seed 0]
    python tests/soak.py --exits 200 [--stages 1 2 3]

For each stage a two-rank run goes through once undisturbed. Its twin is killed with SIGKILL again and again, one rank or
both, at a random moment of a step or at a chosen point of a save, and started again by the same command. Prints one line
a death and exits with 1 where the last checkpoints differ.

With `--exits` nothing is killed: so many two-rank runs of two steps a stage must all leave with exit code 0. Ranks are forked, so
that the imports are paid once, and end as any Python process does.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "support" / "toy.py"
STEPS, EVERY = 60, 3
POINTS = ("shard", "state", "latest")

sys.path.insert(0, str(SCRIPT.parent))
sys.path.insert(0, str(ROOT))

import fork_server  # noqa: E402


def places(folder: Path) -> dict[str, str]:
    """Where the toy finds its survey and writes its runs."""
    return {"TOY_OUT": str(folder), "TOY_SURVEY": str(folder / "survey")}


def leave(folder: Path, stage: int, runs: int) -> bool:
    """Let many runs end by themselves; True where every rank's exit code is 0."""
    codes: Counter[int] = Counter()
    for number in range(runs):
        arguments = ["--name", f"exit{stage}", "--train.zero-stage", str(stage), "--train.steps", "2"]
        ranks = fork_server.start(SCRIPT, arguments, **places(folder))
        said = [rank.communicate(120)[0] for rank in ranks]
        codes.update(rank.wait() for rank in ranks)
        for rank, text in zip(ranks, said, strict=True):
            if rank.returncode:
                print(f"ZeRO-{stage}: run {number + 1}: exit code {rank.returncode}\n{text}", flush=True)
        shutil.rmtree(folder / f"exit{stage}")
    print(f"ZeRO-{stage}: exit codes of {runs} runs of two ranks: {dict(codes)}", flush=True)
    return set(codes) == {0}


def launch(folder: Path, name: str, stage: int, **environment: str) -> list[fork_server.Rank]:
    """Start two ranks."""
    arguments = ["--name", name, "--train.zero-stage", str(stage), "--train.steps", str(STEPS)]
    arguments += ["--checkpoint.every-steps", str(EVERY)]
    return fork_server.start(SCRIPT, arguments, **places(folder), STEP_SECONDS="0.03", **environment)


def end(processes: list[fork_server.Rank], seconds: float) -> list[int]:
    """Exit codes, after SIGKILL for whoever is still there in the end."""
    limit = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and time.monotonic() < limit:
        time.sleep(0.05)
    for p in processes:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
    return [p.wait() for p in processes]


def newest(folder: Path, name: str) -> int:
    """Step of the newest checkpoint."""
    pointer = folder / name / "checkpoints" / "latest"
    return int(pointer.read_text().removeprefix("step-")) if pointer.is_file() else 0


def kill_in_a_save(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """Die at a chosen point of one of the next saves."""
    step = newest(folder, name) + EVERY * draw.randint(1, 2)
    point = draw.choice(POINTS)
    rank = draw.choice((0, 1)) if point == "shard" else 0
    codes = end(launch(folder, name, stage, FAULT=f"kill@{point},{step}", FAULT_RANK=str(rank)), 90)
    assert -signal.SIGKILL in codes, f"no death at {point} of step {step}: {codes}"
    return f"rank {rank} before {point} of step {step}"


def kill_any_time(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """Die a random moment after training has gone on."""
    before = newest(folder, name)
    processes = launch(folder, name, stage)
    while newest(folder, name) == before and all(p.poll() is None for p in processes):
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.3))
    victims = draw.choice(([0], [1], [0, 1]))
    for v in victims:
        os.killpg(processes[v].pid, signal.SIGKILL)
    end(processes, 30)
    return f"ranks {victims} some time after step {newest(folder, name)}"


def soak(folder: Path, stage: int, kills: int, draw: random.Random) -> bool:
    """One stage; True where the last checkpoints are equal."""
    import toy

    calm, tried = f"calm{stage}", f"tried{stage}"
    assert end(launch(folder, calm, stage), 120) == [0, 0], "the undisturbed run failed"
    for number in range(kills):
        if newest(folder, tried) >= STEPS - 2 * EVERY:
            print(f"ZeRO-{stage}: {number} deaths, then too near the end for more")
            break
        kill = kill_in_a_save if number % 2 else kill_any_time
        print(f"ZeRO-{stage}: death {number + 1}: {kill(folder, tried, stage, draw)}", flush=True)
    processes = launch(folder, tried, stage)
    codes = end(processes, 120)
    if codes != [0, 0]:
        print("".join(p.communicate()[0] for p in processes))
        return False
    last = f"step-{STEPS:08d}"
    digests = {toy.digest(folder / name / "checkpoints" / last) for name in (calm, tried)}
    print(f"ZeRO-{stage}: last checkpoints {'equal' if len(digests) == 1 else 'DIFFER'}", flush=True)
    return len(digests) == 1


def main() -> int:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exits", type=int, help="runs that end by themselves, in place of kills")
    asked = parser.parse_args()
    import toy

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        toy.toy_survey(folder / "survey")
        if asked.exits is not None:
            return 0 if all([leave(folder, stage, asked.exits) for stage in asked.stages]) else 1
        draw = random.Random(asked.seed)
        return 0 if all([soak(folder, stage, asked.kills, draw) for stage in asked.stages]) else 1


if __name__ == "__main__":
    sys.exit(main())
