"""A folder has one owner at a time, who is named, and whom a crash frees."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from armillary.engine.exclusive import LOCK, InUse, exclusive, exclusive_file

OWNER = """
import sys, time
from armillary.engine import exclusive
with getattr(exclusive, sys.argv[2])(sys.argv[1]):
    print("owned", flush=True)
    time.sleep(60)
"""


def start_owner(path, how="exclusive"):
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(path), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owned\n"
    return process


def test_the_second_is_refused_and_told_of_the_first_whom_a_crash_frees(tmp_path):
    first = start_owner(tmp_path)
    try:
        with pytest.raises(InUse, match=rf"in use by .*process {first.pid} on .*; wait for it or choose"):
            with exclusive(tmp_path):
                pass
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        first.stdout.close()
    assert (tmp_path / LOCK).exists()  # left by the crash
    with exclusive(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        with pytest.raises(InUse), exclusive(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_one_writer_whom_a_crash_frees(tmp_path):
    file = tmp_path / "embeddings.parquet"
    first = start_owner(file, "exclusive_file")
    try:
        with pytest.raises(InUse, match=rf"embeddings.parquet: in use by .*process {first.pid} on "):
            with exclusive_file(file):
                pass
        with exclusive_file(tmp_path / "others.parquet"):  # beside it
            pass
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        first.stdout.close()
    with exclusive_file(file):
        file.write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings.parquet"]


def test_a_file_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/below: cannot be written"), exclusive_file(tmp_path / "file" / "below"):
        pass


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(FileNotFoundError), exclusive(tmp_path / "nowhere"):
        pass


def test_an_owner_that_removes_its_folder_leaves_nothing(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    with exclusive(folder):
        (folder / LOCK).unlink()
        folder.rmdir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "process", "refused"),
    [("elsewhere", 1, True), ("here", 2**22 + 1, False), ("here", os.getpid(), True)],
    ids=["of another host", "ended", "running"],
)
def test_a_file_system_without_locks_goes_by_the_file(tmp_path, monkeypatch, host, process, refused):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    (tmp_path / LOCK).write_text(json.dumps({"host": host, "process": process, "command": "a build"}))
    if refused:
        with pytest.raises(InUse, match="'a build'.*if that process is gone, delete"), exclusive(tmp_path):
            pass
    else:
        with exclusive(tmp_path):
            pass
