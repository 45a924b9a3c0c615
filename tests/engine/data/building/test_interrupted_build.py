"""Builds that stop: killed, out of room, beside another; they continue to the same bytes."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from noise_sky import Sky, contents, run

from armillary.engine.data.building import packing
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.check import check_survey
from armillary.engine.data.sources.surveys.images import Pictures
from armillary.engine.exclusive import LOCK, InUse, exclusive


class Stop(Exception):
    pass


def interrupt(folder, monkeypatch, at):
    """Let a build fail at its `at`-th shard."""
    calls = []

    def fail(source, task):
        calls.append(task)
        if len(calls) == at:
            raise Stop
        return packing.pack(source, task)

    monkeypatch.setattr("armillary.engine.data.building.build.pack", fail)
    with pytest.raises(Stop):
        run(Sky(), folder)
    monkeypatch.undo()


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interrupted_build_continues_to_the_same_bytes(tmp_path, monkeypatch, at):
    run(Sky(), tmp_path / "whole")
    interrupt(tmp_path / "out", monkeypatch, at)
    assert check_survey(tmp_path / "out")[0].what == "the build of this survey is not finished"
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert len(before) == at - 1
    (tmp_path / "out" / ".train-000009.tar.1.tmp").write_text("left by a killed process")
    run(Sky(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == t for name, t in before.items())  # kept, not redone


def test_damaged_pieces_of_an_interrupted_build_are_redone(tmp_path, monkeypatch):
    run(Sky(), tmp_path / "whole")
    interrupt(tmp_path / "out", monkeypatch, 4)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    shards[0].write_bytes(b"short")
    shards[1].with_suffix(".idx").unlink()
    record = tmp_path / "out" / ".build" / f"{shards[2].stem}.parquet"
    record.write_bytes(record.read_bytes()[:40])
    run(Sky(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_interrupted_build_of_something_else_is_refused(tmp_path, monkeypatch):
    interrupt(tmp_path, monkeypatch, 2)
    with pytest.raises(FileExistsError, match=r"unfinished build of something else \(samples_per_shard 8, now 9\)"):
        run(Sky(), tmp_path, samples_per_shard=9)
    with pytest.raises(FileExistsError, match="samples 30, now 31"):
        run(Sky(31), tmp_path)
    run(Sky(), tmp_path)


def test_two_builds_in_one_folder(tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(InUse, match=rf"in use by .*\(process {os.getpid()} on .*; wait for it or choose"),
    ):
        run(Sky(), tmp_path)
    run(Sky(), tmp_path)
    assert not (tmp_path / LOCK).exists()


@pytest.fixture
def file_limit():
    """Sets how large a file of this process may grow: writing beyond it fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_cleanly_and_the_build_continues(tmp_path, file_limit):
    run(Sky(), tmp_path / "whole", samples_per_shard=20)
    file_limit(10_000)
    with pytest.raises(OSError, match="cannot write: File too large; make room and run the same build again") as caught:
        run(Sky(), tmp_path / "out", samples_per_shard=20)
    file_limit(resource.RLIM_INFINITY)
    assert Path(caught.value.filename).name == "train-000000.tar"
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".build"]
    run(Sky(), tmp_path / "out", samples_per_shard=20)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_no_room_for_the_catalogue_or_the_description(tmp_path, monkeypatch):
    run(Sky(), tmp_path / "whole")

    def save(survey, folder):
        with open("/dev/full", "wb", buffering=0) as f:
            f.write(b"x")

    with monkeypatch.context() as patch:
        patch.setattr(Survey, "save", save)
        with pytest.raises(OSError, match="No space left on device; make room"):
            run(Sky(), tmp_path / "out")
    run(Sky(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(pictures, tmp_path):
    run(Pictures(pictures), tmp_path / "one")
    run(Pictures(pictures), tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


SLOW = """
    import os, sys, time
    from armillary.engine.data.building.build import build
    from armillary.engine.data.sources.surveys.images import Pictures

    class Slow(Pictures):
        def read(self, index):
            time.sleep(0.02)
            if os.environ.get("DIE") and index == 17 and os.path.exists(os.path.join(sys.argv[2], "train-000000.tar")):
                os._exit(9)
            return super().read(index)

    if __name__ == "__main__":
        build(Slow(sys.argv[1]), sys.argv[2], name="sky", samples_per_shard=8, progress=False, processes=2)
"""


def script(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text(textwrap.dedent(SLOW))
    return path


def children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_kill_nine_leaves_no_worker_and_the_build_continues_to_the_same_bytes(pictures, tmp_path):
    run(Pictures(pictures), tmp_path / "whole")
    command = [sys.executable, str(script(tmp_path)), str(pictures), str(tmp_path / "out")]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    records = tmp_path / "out" / ".build"
    deadline = time.monotonic() + 120
    while len(list(records.glob("train-*.parquet"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    while not all(map(gone, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (tmp_path / "out" / "survey.json").exists()
    assert 2 <= len(list(records.glob("train-*.parquet"))) < 8
    run(Pictures(pictures), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_worker_that_dies_is_reported(pictures, tmp_path):
    command = [sys.executable, str(script(tmp_path)), str(pictures), str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "DIE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "a worker process died (killed, or out of memory)" in done.stderr
    assert (tmp_path / "out" / ".build" / "plan.json").exists()
