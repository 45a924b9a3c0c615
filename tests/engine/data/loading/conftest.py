"""A survey whose images tell their rows, and a look at what a test leaves behind."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest
from toy_shards import pack

from armillary.engine.data.loading import index_folder


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("survey") / "s")


@pytest.fixture
def nothing_is_left(tmp_path_factory, monkeypatch):
    """No thread, descriptor or index folder of ours outlives a test; the folders of other runs are not looked at."""
    memory = tmp_path_factory.mktemp("memory")
    monkeypatch.setattr(index_folder, "MEMORY", memory)

    def ours():
        threads = {t.name for t in threading.enumerate() if t.name.startswith("armillary")}
        tars = {
            os.readlink(f"/proc/self/fd/{n}")
            for n in os.listdir("/proc/self/fd")
            if Path(f"/proc/self/fd/{n}").exists()
        }
        return threads | {t for t in tars if t.endswith(".tar")} | set(os.listdir(memory))

    yield
    end = time.monotonic() + 10
    while (left := ours()) and time.monotonic() < end:
        gc.collect()  # slow, and what is gone without it is gone
        time.sleep(0.05)
    assert not left
