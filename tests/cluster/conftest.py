"""Two machines, a Slurm on them, a survey and a run that nothing disturbs; each is made once, and all are gone at the end."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import machines as site
import pytest
import slurm_on_machines
from machines import ROOT, Machines, until
from processes import losses, metrics, tensor_files
from slurm_on_machines import Slurm

from armillary.engine.data.building.build import build
from armillary.engine.data.simulate.survey import SimulatedSurvey

STEPS = 32
MODEL = ("--preset", "smoke", "--device", "cpu", "--train.global-batch", "16", "--train.micro-batch", "4",
         "--method.vit.dim", "48", "--method.vit.depth", "2", "--schedule.learning-rate.warmup-steps", "2",
         "--schedule.teacher-temperature.warmup-steps", "4", "--telemetry.every-steps", "1")  # fmt: skip
START_SECONDS = 300
"""Within which a run starts: in 15 s on two idle cores, in 60 s on two that ten others share."""


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@dataclass
class Runs:
    """Runs of a small model on the machines, by name; what they say is in a file beside the others."""

    machines: Machines
    survey: Path

    def command(self, name: str, *options: str) -> list[str]:
        """A recipe and its options, for a launcher."""
        steps = () if "--train.steps" in options else ("--train.steps", str(STEPS))
        places = ("--data.path", str(self.survey), "--out", str(self.machines.home), "--name", name)
        return ["recipes/dinov2_vitl.py", *MODEL, *places, *steps, *options]

    def folder(self, name: str) -> Path:
        return self.machines.home / name

    def log(self, name: str) -> Path:
        return self.machines.folder / "logs" / f"{name}.log"

    def said(self, name: str) -> str:
        """What a run has said so far."""
        return self.log(name).read_text() if self.log(name).exists() else ""

    def steps(self, name: str) -> int:
        """Steps that a run has logged."""
        return len(metrics(self.folder(name))) if (self.folder(name) / "metrics.jsonl").exists() else 0

    def reaches(self, name: str, step: int) -> None:
        """Wait until a run is that far."""
        assert until(lambda: self.steps(name) >= step, START_SECONDS), self.said(name)[-3000:]

    def left(self, machine: str) -> list[int]:
        """Ranks that live in a machine."""
        return self.machines.pids(machine, "recipes/dinov2_vitl.py --")

    def same_bits(self, name: str, other: str) -> bool:
        """Whether two finished runs have the same losses, weights, moments, averages, buffers and random states."""
        one, two = ((losses(self.folder(n)), tensor_files(self.folder(n), STEPS)) for n in (name, other))
        return len(one[0]) == STEPS and len(one[1]) == 2 and one == two


@pytest.fixture(scope="session")
def machines():
    if (why := site.missing()) is not None:
        pytest.skip(why)
    with Machines() as made:
        yield made


@pytest.fixture(scope="session")
def runs(machines):
    survey = machines.folder / "survey"
    build(SimulatedSurvey(90, seed=5, size=32), survey, name="simulated", samples_per_shard=16, progress=False)
    logs = machines.folder / "logs"
    logs.mkdir()
    os.chown(logs, site.UID, site.UID)  # Slurm writes there as the user
    yield Runs(machines, survey)
    if kept := os.environ.get("ARMILLARY_CLUSTER_LOGS"):
        shutil.copytree(logs, kept, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def slurm(machines):
    if (why := slurm_on_machines.missing()) is not None:
        pytest.skip(why)
    return Slurm(machines)


class Jobs:
    """Jobs of `examples/train.sbatch`."""

    SCRIPT = ROOT / "examples" / "train.sbatch"

    def __init__(self, slurm: Slurm, runs: Runs) -> None:
        self.slurm, self.runs = slurm, runs

    def submit(self, name: str, *options: str, ranks_a_node: int = 1) -> str:
        """Submit a run; returns the job's number."""
        return self.submit_words(name, self.runs.command(name, *options), ranks_a_node)

    def submit_words(self, name: str, words: list[str], ranks_a_node: int = 1) -> str:
        """Submit what Python shall run in each task, with the script's numbers of tasks and GPUs replaced."""
        small = [f"--ntasks-per-node={ranks_a_node}", "--gpus-per-node=0", "--cpus-per-task=1"]
        return self.slurm.submit(self.SCRIPT, self.runs.log(name), small, words)

    def ends(self, job: str, state: str, name: str, seconds: float = START_SECONDS) -> None:
        """Wait until a job has ended as it should."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert until(lambda: self.slurm.state(job) in over, seconds), self.runs.said(name)[-3000:]
        assert self.slurm.state(job) == state, self.runs.said(name)[-3000:]


@pytest.fixture(scope="session")
def jobs(slurm, runs):
    return Jobs(slurm, runs)


@pytest.fixture(scope="session")
def undisturbed(jobs, runs):
    """Name of a run of 32 steps on both machines, by `sbatch examples/train.sbatch`."""
    jobs.ends(jobs.submit("undisturbed"), "COMPLETED", "undisturbed")
    assert re.search("step 0 of 32, 2 x cpu", runs.said("undisturbed"))
    return "undisturbed"
