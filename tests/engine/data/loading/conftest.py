"""A survey whose images tell their rows, and a look at what a test leaves behind."""

import gc
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from toy_shards import pack

from armillary.engine.data.loading import index_folder


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("survey") / "s")


def tars_open() -> set[str]:
    """The tars that this process has open."""
    return {file.path for file in psutil.Process().open_files() if file.path.endswith(".tar")}


@pytest.fixture
def nothing_is_left(tmp_path_factory, monkeypatch):
    """No thread, descriptor or index folder of ours outlives a test.

    What was open before it is another test file's, which ran in the same process, and the folders of other runs are not looked at.
    """
    memory = tmp_path_factory.mktemp("memory")
    monkeypatch.setattr(index_folder, "MEMORY", memory)
    threads, tars = set(threading.enumerate()), tars_open()

    def ours():
        names = {t.name for t in set(threading.enumerate()) - threads if t.name.startswith("armillary")}
        return names | (tars_open() - tars) | set(os.listdir(memory))

    yield
    end = time.monotonic() + 10
    while (left := ours()) and time.monotonic() < end:
        gc.collect()  # slow, and what is gone without it is gone
        time.sleep(0.05)
    assert not left
