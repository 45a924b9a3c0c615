"""Whole runs that meet each other, damaged files and notebooks: nothing is lost, and the message says how to go on."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

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


def test_trainings_follow_each_other_in_one_process(site):
    ended = site.go(script=Path(__file__).parents[2] / "support" / "notebook.py", world=0)
    assert re.findall(r"(\w+) ended with (\d+)", ended.output) == [
        ("first", "0"),
        ("second", "0"),
        ("third", "0"),
        ("threaded", "0"),
    ], ended.output
