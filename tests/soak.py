"""Deaths, lost and damaged files, full disks and second jobs: none may change one bit of a run.

    python tests/soak.py [--stages 1 2 3] [--kills 16] [--seed 0] [--harms flip_bits fill_the_disk ...]
    python tests/soak.py --exits 200 [--stages 1 2 3]

For each stage a two-rank run goes through once undisturbed and keeps a checkpoint of every step. Its twin meets every harm of `HARMS` in
turn, at random moments, and is started again by the same command: SIGKILL of one rank, of both, or of the launcher; SIGTERM and
SIGHUP, also repeated in the save; a death at a chosen point of a save; `latest` lost or garbled; a bit flipped in each file of a checkpoint, which must be
refused by name, and the advice followed; a disk that is full in a save or between two; a second job, which must be refused. After
each harm the twin's newest checkpoint is compared with the undisturbed run's of the same step. Prints a table and exits with 1
where any differs, or an end is another than the documented one.

With `--exits` nothing is killed: so many two-rank runs of two steps a stage must all leave with exit code 0. Ranks are forked, so
that the imports are paid once, and end as any Python process does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "support" / "toy.py"
STEPS, EVERY = 120, 3
LIMIT = 240.0
"""Seconds that anything may take to end: other work may share the machine."""
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


def command(name: str, stage: int) -> list[str]:
    """Arguments of the run."""
    arguments = ["--name", name, "--train.zero-stage", str(stage), "--train.steps", str(STEPS)]
    every, keep = (EVERY, 3) if name.startswith("tried") else (1, STEPS)
    arguments += ["--checkpoint.every-steps", str(every), "--checkpoint.keep", str(keep)]
    return [*arguments, "--telemetry.every-steps", "1"]


def launch(folder: Path, name: str, stage: int, seconds: float = 0.03, **environment: str) -> list[fork_server.Rank]:
    """Start two ranks, with so many seconds a step."""
    return fork_server.start(SCRIPT, command(name, stage), **places(folder), STEP_SECONDS=str(seconds), **environment)


def end(processes: list[fork_server.Rank]) -> list[int]:
    """Exit codes, after SIGKILL for whoever is still there in the end."""
    limit = time.monotonic() + LIMIT
    while any(p.poll() is None for p in processes) and time.monotonic() < limit:
        time.sleep(0.05)
    for p in processes:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
    return [p.wait() for p in processes]


def newest(folder: Path, name: str) -> int:
    """Step of the newest checkpoint."""
    checkpoints = (folder / name / "checkpoints").glob("step-*")
    return max((int(path.name.removeprefix("step-")) for path in checkpoints), default=0)


def kill_in_a_save(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """Die at a chosen point of one of the next saves."""
    step = newest(folder, name) + EVERY * draw.randint(1, 2)
    point = draw.choice(POINTS)
    rank = draw.choice((0, 1)) if point == "shard" else 0
    codes = end(launch(folder, name, stage, FAULT=f"kill@{point},{step}", FAULT_RANK=str(rank)))
    assert -signal.SIGKILL in codes, f"no death at {point} of step {step}: {codes}"
    return f"rank {rank} before {point} of step {step}"


def under_way(
    folder: Path, name: str, stage: int, draw: random.Random, seconds: float = 0.03
) -> list[fork_server.Rank]:
    """Ranks that have saved a checkpoint, at a random moment after it; with so many seconds a step."""
    before = newest(folder, name)
    processes = launch(folder, name, stage, seconds)
    while newest(folder, name) == before and all(p.poll() is None for p in processes):
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.3))
    return processes


def kill_any_time(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """Die a random moment after training has gone on."""
    processes = under_way(folder, name, stage, draw)
    victims = draw.choice(([0], [1], [0, 1]))
    for v in victims:
        os.killpg(processes[v].pid, signal.SIGKILL)
    end(processes)
    return f"SIGKILL to ranks {victims}"


def kill_the_launcher(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """The launcher dies; its ranks go on by themselves, and own the folder while they do."""
    environment = fork_server.environments(0, places(folder) | {"STEP_SECONDS": "1"})[0]
    program = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    program += ["--master_port", environment["MASTER_PORT"], str(SCRIPT), *command(name, stage)]
    before, launcher = newest(folder, name), fork_server.popen(program, environment)
    while newest(folder, name) == before and launcher.poll() is None:
        time.sleep(0.05)
    started = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    codes = end(launch(folder, name, stage))
    time.sleep(draw.uniform(0, 1))
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, 30)
    launcher.communicate()
    assert codes == [2, 2], f"a job beside the ranks of a dead launcher ended with {codes}"
    return "SIGKILL to the launcher; its ranks go on, and another job is refused by name"


def ask_to_stop(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """SIGTERM, or a closed terminal; several times, as impatient schedulers do, so that some fall into the save."""
    processes, number = under_way(folder, name, stage, draw), draw.choice((signal.SIGTERM, signal.SIGHUP))
    for _ in range(20):
        for p in processes:
            with suppress(ProcessLookupError):  # saved, and gone
                os.kill(p.pid, number)
        time.sleep(0.01)
    codes = end(processes)
    # Once a rank has saved and put the former handlers back, a further signal ends it as it does any process.
    assert set(codes) <= {75, -number}, f"{number.name} ended with {codes}"
    return f"20 x {number.name} in .2 s, into the save: saved"


def lose_latest(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """A killed run whose `latest` is gone, or nothing that can be read."""
    kill_any_time(folder, name, stage, draw)
    pointer = folder / name / "checkpoints" / "latest"
    text = pointer.read_text()
    pointer.unlink()
    if garbled := draw.choice((True, False)):
        pointer.write_bytes(draw.randbytes(40))
    return f"`latest` ({text}) {'garbled' if garbled else 'lost'}"


def flip_bits(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """A bit turns round in each file of the newest checkpoint: refused by name with exit code 4; then the advice is followed."""
    kill_any_time(folder, name, stage, draw)
    checkpoint = folder / name / "checkpoints" / f"step-{newest(folder, name):08d}"
    files = sorted(checkpoint.iterdir())
    for path in files:
        whole = path.read_bytes()
        bit = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        processes = launch(folder, name, stage)
        codes = end(processes)
        said = "".join(p.communicate()[0] for p in processes)
        assert codes == [4, 4] and checkpoint.name in said and "Traceback" not in said, f"{path.name}: {codes}\n{said}"
        assert f"delete {checkpoint}" in said, said
        if path != files[-1]:
            path.write_bytes(whole)
    shutil.rmtree(checkpoint)
    return f"a bit flipped in each of {len(files)} files: refused by name, the damaged folder deleted as advised"


def fill_the_disk(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """No room in a save, or from a step between two saves on: exit code 4."""
    step = newest(folder, name) + EVERY + draw.choice((0, 1, 2))
    kind = draw.choice(("full", "quota")) if step % EVERY == 0 else "quota"
    codes = end(launch(folder, name, stage, FAULT=f"{kind}@{step}"))
    assert codes == [4, 4], f"a full disk ended with {codes}"
    return f"disk full {'in the save of' if kind == 'full' else 'from'} step {step}{'' if kind == 'full' else ' on'}: exit 4"


def start_a_second_job(folder: Path, name: str, stage: int, draw: random.Random) -> str:
    """A job in the folder of another is refused with exit code 2, and the first goes on until it is killed."""
    processes = under_way(folder, name, stage, draw, seconds=1)
    codes = end(launch(folder, name, stage))
    alive = [p.poll() is None for p in processes]
    for p in processes:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
    end(processes)
    assert codes == [2, 2], f"a second job ended with {codes}"
    assert all(alive), "the first job did not outlive the second"
    return "a second job: refused with exit 2; the first goes on, then SIGKILL"


Harm = Callable[[Path, str, int, random.Random], str]
HARMS: tuple[Harm, ...] = (
    kill_any_time,
    kill_in_a_save,
    lose_latest,
    ask_to_stop,
    flip_bits,
    fill_the_disk,
    start_a_second_job,
    kill_the_launcher,
)


def soak(folder: Path, stage: int, harms: Sequence[Harm], draw: random.Random) -> bool:
    """One stage; True where every checkpoint of the twin that was looked at has the bits of the undisturbed run's."""
    import toy

    calm, tried = f"calm{stage}", f"tried{stage}"
    begin = time.monotonic()
    assert end(launch(folder, calm, stage)) == [0, 0], "the undisturbed run failed"
    same = []

    def judge(what: str) -> None:
        step = newest(folder, tried)
        digests = (
            {toy.digest(folder / run / "checkpoints" / f"step-{step:08d}") for run in (calm, tried)} if step else {""}
        )
        same.append(len(digests) == 1)
        verdict = "no checkpoint yet" if not step else "same bits" if same[-1] else "OTHER BITS"
        print(f"ZeRO-{stage} | {time.monotonic() - begin:5.0f} s | {what} | step {step} | {verdict}", flush=True)

    for number, harm in enumerate(harms):
        if newest(folder, tried) >= STEPS - 2 * EVERY:
            print(f"ZeRO-{stage}: {number} harms, then too near the end for more")
            break
        judge(harm(folder, tried, stage, draw))
    processes = launch(folder, tried, stage)
    codes = end(processes)
    if codes != [0, 0]:
        print("".join(p.communicate()[0] for p in processes))
        return False
    judge("the same command to the end")
    assert newest(folder, tried) == STEPS, "the run ended before its last step"
    return all(same)


def main() -> int:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kills", type=int, default=2 * len(HARMS), help="harms a stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--harms", nargs="+", choices=[harm.__name__ for harm in HARMS], help="only these, in turn")
    parser.add_argument("--exits", type=int, help="runs that end by themselves, in place of kills")
    asked = parser.parse_args()
    import toy

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        toy.toy_survey(folder / "survey")
        if asked.exits is not None:
            return 0 if all([leave(folder, stage, asked.exits) for stage in asked.stages]) else 1
        draw = random.Random(asked.seed)
        chosen = [harm for harm in HARMS if not asked.harms or harm.__name__ in asked.harms]
        harms = list(itertools.islice(itertools.cycle(chosen), asked.kills))
        return 0 if all([soak(folder, stage, harms, draw) for stage in asked.stages]) else 1


if __name__ == "__main__":
    sys.exit(main())
