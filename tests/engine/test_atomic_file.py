import errno
import json
import multiprocessing
import os
import signal
import time

import pytest

from armillary.engine import atomic_file
from armillary.engine.atomic_file import atomic_open, atomic_path, write_bytes, write_json, write_text

WRITERS = {
    "bytes": (lambda path: write_bytes(path, b"\0new"), b"\0new"),
    "text": (lambda path: write_text(path, "5 Å\n"), "5 Å\n".encode()),
    "json": (lambda path: write_json(path, {"a": [1]}), json.dumps({"a": [1]}, indent=1).encode()),
}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("there", [False, True], ids=["absent", "replaced"])
def test_writes_a_whole_file(tmp_path, kind, there):
    write, expected = WRITERS[kind]
    if there:
        (tmp_path / "x").write_bytes(b"old and longer than the new one")
    write(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == expected and names(tmp_path) == ["x"]


def test_a_library_writes_to_the_path_that_it_is_given(tmp_path):
    with atomic_path(tmp_path / "x") as path:
        path.write_text("by itself")
        assert path.parent == tmp_path and path.name.startswith(".x.") and not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "by itself" and names(tmp_path) == ["x"]


def test_a_folder_appears_with_all_that_is_in_it(tmp_path):
    with atomic_path(tmp_path / "x") as path:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "y").write_text("y")
    assert (tmp_path / "x" / "inner" / "y").read_text() == "y" and names(tmp_path) == ["x"]
    with pytest.raises(OSError), atomic_path(tmp_path / "x") as path:  # a folder is not replaced
        path.mkdir()
        (path / "z").write_text("z")
    assert names(tmp_path / "x") == ["inner"] and names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_an_error_inside_leaves_nothing_and_keeps_the_old_file(tmp_path, error, folder):
    (tmp_path / "x").write_text("old")
    with pytest.raises(type(error)), atomic_path(tmp_path / "x") as path:
        if folder:
            path.mkdir()
        (path / "y" if folder else path).write_text("half")
        raise error
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_a_full_disk_is_an_error_and_keeps_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space left")))
    with pytest.raises(OSError, match="no space left"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_a_full_device_is_noticed_when_the_file_is_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path, mode, open=open: open("/dev/full", mode))
    with pytest.raises(OSError) as caught, atomic_open(tmp_path / "x") as file:
        file.write(b"lost")
    assert caught.value.errno == errno.ENOSPC and names(tmp_path) == []


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace

    def recorded_sync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    write_text(tmp_path / "x", "new")
    file, *rest = done
    assert file.startswith(f"{tmp_path}/.x.") and rest == ["rename", str(tmp_path)]


def _die_inside(path, before_rename):
    if before_rename:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with atomic_open(path) as file:
        file.write(b"half")
        if not before_rename:
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("before_rename", [False, True], ids=["while-writing", "before-the-rename"])
def test_a_killed_writer_keeps_the_old_file_and_a_later_one_clears_up(tmp_path, before_rename):
    (tmp_path / "x").write_text("old")
    process = multiprocessing.get_context("fork").Process(target=_die_inside, args=(tmp_path / "x", before_rename))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "x").read_text() == "old"
    (leftover,) = tmp_path.glob(".*")
    write_text(tmp_path / "x", "new")
    assert leftover.exists()  # it might be that of a process which this one cannot see
    past = time.time() - 2 * atomic_file.IDLE
    os.utime(leftover, (past, past))
    living = tmp_path / f".x.{atomic_file.HOST}-{os.getppid()}.tmp"
    foreign = tmp_path / f".x.elsewhere-{process.pid}.tmp"
    for other in (living, foreign):
        other.touch()
        os.utime(other, (past, past))
    atomic_file._clear_leftovers.cache_clear()
    write_text(tmp_path / "x", "newer")
    assert not leftover.exists() and living.exists() and foreign.exists()
