"""Index folders in memory: gone at the end, also those of killed processes, and no one else's."""

import fcntl
import os
import shutil
import time

import pytest

from armillary.engine.data.loading import index_folder as module
from armillary.engine.data.loading.index_folder import index_folder, remove_leftovers


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", tmp_path)
    return tmp_path


def left(memory, name, seconds):
    """A folder with 8 KiB in it, made so long ago."""
    folder = memory / name
    folder.mkdir()
    (folder / "0.idx").write_bytes(bytes(8192))
    os.utime(folder, (time.time() - seconds,) * 2)
    return folder


def test_a_folder_is_locked_while_it_is_used_and_then_gone(memory):
    with index_folder() as folder:
        assert folder.parent == memory
        (folder / "0.idx").write_text("x")
        os.utime(folder, (0, 0))
        assert remove_leftovers() == 0 and folder.exists()
    assert not list(memory.iterdir())


def test_only_what_a_killed_process_left_is_removed(memory, caplog):
    dead = left(memory, "armillary-index-dead", 120)
    kept = [left(memory, "armillary-index-new", 0), left(memory, "armillary-index-used", 120), left(memory, "x", 120)]
    lock = os.open(kept[1], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert remove_leftovers() == 8192 and "8192 bytes of memory" in caplog.text
    assert not dead.exists() and all(folder.exists() for folder in kept)
    os.close(lock)
    assert remove_leftovers() == 8192 and not kept[1].exists()


def test_another_users_folder_is_left(memory, monkeypatch):
    folder = left(memory, "armillary-index-theirs", 120)
    monkeypatch.setattr(os, "getuid", lambda: 1 + folder.stat().st_uid)
    assert remove_leftovers() == 0 and folder.exists()


def test_full_memory_sends_the_files_to_disk(memory, monkeypatch):
    usage = shutil.disk_usage(memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with index_folder() as folder:
        assert folder.parent != memory
