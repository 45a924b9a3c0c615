"""Trainings by `deepspeed --hostfile` on two machines: the launcher is ended, a cable is pulled."""

import re
import shutil

import pytest
from machines import NODES, ROOT, until

EXAMPLE = ROOT / "examples" / "hostfile"


@pytest.fixture(scope="module")
def launch(machines, runs):
    """Starts a run by `examples/hostfile/train.sh`, in a copy that names these machines and asks for one thread a rank."""
    folder = machines.folder / "hostfile"
    shutil.copytree(EXAMPLE, folder)
    (folder / "hosts").write_text("".join(f"{node} slots=1\n" for node in NODES))
    given = (folder / "deepspeed_env").read_text()
    assert "OMP_NUM_THREADS=12" in given and "GLOO_SOCKET_IFNAME=eth0" in given
    (folder / "deepspeed_env").write_text(given.replace("=12", "=1") + "DS_ACCELERATOR=cpu\n")

    def start(name, *options):
        return machines.start("n1", [folder / "train.sh", *runs.command(name, *options)], runs.log(name))

    return start


def test_a_launcher_that_is_told_to_end_lets_the_ranks_save(undisturbed, launch, machines, runs):
    launcher = launch("ended")
    runs.reaches("ended", 3)
    (pid,) = machines.pids("n1", "bin/deepspeed --hostfile")
    machines.signal("n1", "TERM", pid)
    assert launcher.wait(30) == 1  # DeepSpeed's, whatever its ranks leave with
    assert until(lambda: not runs.left("n1") and not runs.left("n2"), 30)
    assert (runs.folder("ended") / "checkpoints" / "latest").exists(), runs.said("ended")
    assert launch("ended").wait(300) == 0, runs.said("ended")
    assert "continuing " in runs.said("ended")
    assert runs.same_bits("ended", undisturbed)


def test_a_cable_that_is_back_after_ten_seconds_costs_those_and_one_that_is_not_ends_the_run(launch, machines, runs):
    launcher = launch("cut", "--train.steps", "4000", "--train.timeout-minutes", "0.5", "--checkpoint.every-steps", "2")
    runs.reaches("cut", 3)
    machines.unplug("n2")
    until(lambda: False, 10)
    cut_at = runs.steps("cut")
    machines.plug("n2")
    assert until(lambda: runs.steps("cut") > cut_at + 1, 20) and launcher.poll() is None, runs.said("cut")

    machines.unplug("n2")
    try:
        ended = until(lambda: launcher.poll() is not None, 75)  # the time-out's 30 s, ssh's 15 and DeepSpeed's own
        assert ended and launcher.returncode != 0, runs.said("cut")
        assert until(lambda: not runs.left("n1") and not runs.left("n2"), 60)
    finally:
        machines.plug("n2")
    said = runs.said("cut")
    assert "cut: other ranks are gone" in said and "train.timeout_minutes = 0.5" in said, said
    saved = int(re.search(r"the same command continues from step-(\d+)", said)[1])
    assert launch("cut", "--train.steps", str(saved + 2)).wait(300) == 0, runs.said("cut")
    assert runs.steps("cut") == saved + 2
