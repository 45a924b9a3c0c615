"""Whole runs that meet each other, damaged files and notebooks: nothing is lost, and the message says how to go on."""

import os
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import toy

from armillary.engine.user_code import trust

pytestmark = [pytest.mark.dist, pytest.mark.slow]
trust("toy")


def test_two_jobs_do_not_share_a_folder(site):
    """The second refuses and names the first; the first goes on; when it is gone, the same command continues it."""
    first = site.start("--name", "shared", "--train.steps", "400", STEP_SECONDS="0.05")
    while not (site.runs / "shared" / "metrics.jsonl").exists():
        assert all(p.poll() is None for p in first), site.wait(first).output
        time.sleep(0.05)
    second = site.go("--name", "shared", "--train.steps", "400")
    assert second.code == 2
    assert re.search(r"out: .*shared: in use by .*process \d+ on ", second.output), second.output
    for p in first:
        os.kill(p.pid, signal.SIGTERM)
    assert site.wait(first).code == 75
    done = len(site.metrics("shared"))
    assert site.go("--name", "shared", "--train.steps", str(done + 1)).code == 0
    assert [line["step"] for line in site.metrics("shared")] == list(range(1, done + 2))


def test_a_damaged_checkpoint_costs_no_more_than_the_steps_since_the_last_whole_one(site, reference):
    name, _ = reference
    shutil.copytree(site.runs / name, site.runs / "damaged")
    shard = site.checkpoint("damaged", 8) / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    ended = site.go("--name", "damaged", "--train.steps", "9")
    assert ended.code == 4 and "shard-00001.safetensors: its SHA-256 differs" in ended.output
    (advice,) = re.findall(r"the newest whole one is step-00000004: delete (\S+) to go on from there", ended.output)
    shutil.rmtree(advice)
    again = site.go("--name", "damaged")
    assert again.code == 0, again.output
    assert toy.digest(site.checkpoint("damaged", 8)) == toy.digest(site.checkpoint(name, 8))


def test_a_closed_terminal_a_full_disk_and_a_lost_pointer_cost_nothing(site, reference):
    """SIGHUP saves and stops; a disk that is full between two saves ends with 4; without `latest` the newest is taken."""
    name = "harmed"
    running = site.start("--name", name, STEP_SECONDS="0.3")
    while not (site.runs / name / "checkpoints" / "latest").exists():
        assert all(p.poll() is None for p in running), site.wait(running).output
        time.sleep(0.02)
    os.kill(running[1].pid, signal.SIGHUP)
    stopped = site.wait(running)
    assert stopped.code == 75 and "the same command continues" in stopped.output
    full = site.go("--name", name, "--telemetry.every-steps", "1", FAULT="quota@6")
    assert full.code == 4 and "No space left" in full.output and "Traceback" not in full.output
    (site.runs / name / "checkpoints" / "latest").unlink()
    again = site.go("--name", name)
    assert again.code == 0, again.output
    assert toy.digest(site.checkpoint(name, 8)) == toy.digest(site.checkpoint(reference[0], 8))
    assert [line["step"] for line in site.metrics(name)] == list(range(1, 9))


def test_ranks_whose_launcher_died_keep_their_folder(site, reference):
    name = "orphans"
    launcher = site.start("--name", name, launcher=True, STEP_SECONDS="0.5")
    while not (site.runs / name / ".lock").exists():
        assert launcher[0].poll() is None, site.wait(launcher).output
        time.sleep(0.05)
    ranks = psutil.Process(launcher[0].pid).children(recursive=True)
    launcher[0].kill()
    try:
        second = site.go("--name", name)
        assert second.code == 2 and f"{name}: in use by" in second.output, second.output
        assert not psutil.wait_procs(ranks, 100)[1]  # they end as if it lived
    finally:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        site.wait(launcher)
    assert toy.digest(site.checkpoint(name, 8)) == toy.digest(site.checkpoint(reference[0], 8))


def test_trainings_follow_each_other_in_one_process(site):
    ended = site.go(script=Path(__file__).parents[2] / "support" / "notebook.py", world=0)
    assert re.findall(r"(\w+) ended with (\d+)", ended.output) == [
        ("first", "0"),
        ("second", "0"),
        ("third", "0"),
        ("threaded", "0"),
    ], ended.output
