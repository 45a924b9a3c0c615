"""Ten deaths a ZeRO stage, many of them inside a save, must not change one bit of a run's last checkpoint.

    python tests/soak.py [--stages 1 2 3] [--kills 10] [--seed 0]
    python tests/soak.py --exits 200 [--stages 1 2 3]

For each stage a two-rank run goes through once undisturbed. Its twin is killed with SIGKILL again and again, one rank or
both, at a random moment of a step or at a chosen point of a save, and started again by the same command. Prints one line
a death and exits with 1 where the last checkpoints differ.

With `--exits` nothing is killed: so many two-rank runs of two steps a stage must all leave with exit code 0. Their ranks are
forked, so that the imports are paid once, and end as any Python process does.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
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


def environment_of(folder: Path) -> dict[str, str]:
    """What two ranks share; a port of their own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOY_OUT": str(folder), "TOY_SURVEY": str(folder / "survey"),
        "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
    }  # fmt: skip


def leave(folder: Path, stage: int, runs: int) -> bool:
    """Let many runs end by themselves; True where every rank's exit code is 0."""
    import fork_server

    codes: Counter[int] = Counter()
    for number in range(runs):
        arguments = ["--name", f"exit{stage}", "--train.zero-stage", str(stage), "--train.steps", "2"]
        common = environment_of(folder)
        ranks = [
            fork_server.start(SCRIPT, arguments, common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)
        ]
        said = [rank.communicate(120)[0] for rank in ranks]
        codes.update(rank.wait() for rank in ranks)
        for rank, text in zip(ranks, said, strict=True):
            if rank.returncode:
                print(f"ZeRO-{stage}: run {number + 1}: exit code {rank.returncode}\n{text}", flush=True)
        shutil.rmtree(folder / f"exit{stage}")
    print(f"ZeRO-{stage}: exit codes of {runs} runs of two ranks: {dict(codes)}", flush=True)
    return set(codes) == {0}


def launch(folder: Path, name: str, stage: int, **environment: str) -> list[subprocess.Popen]:
    """Start two ranks, each in a session of its own."""
    common = environment_of(folder) | {"STEP_SECONDS": "0.03", **environment}
    fields = {
        "--name": name, "--train.zero-stage": str(stage), "--train.steps": str(STEPS),
        "--checkpoint.every-steps": str(EVERY), "--checkpoint.verify": None,
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT)]
    for key, value in fields.items():
        command += [key] if value is None else [key, value]
    return [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]


def end(processes: list[subprocess.Popen], seconds: float) -> list[int]:
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
        print("".join(p.stderr.read() for p in processes if p.stderr))
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
