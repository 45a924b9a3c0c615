"""Reading from storage that fails, hangs or is slow."""

import errno
import logging
import os
import shutil
import threading
import time
from collections import Counter
from itertools import islice

import pytest
import torch
from mixed import Mixed

from armillary.engine.data.building.build import build
from armillary.engine.data.loading import retry, shard_files
from armillary.engine.data.loading.loader import Loader
from armillary.engine.data.loading.retry import Retry
from armillary.engine.data.loading.stream import Prefetcher

QUICK = Retry(times=3, first_pause_s=0.001, longest_pause_s=0.002)


class Whole(Mixed):
    def read(self, index):
        return super().read(5 * index)


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storage") / "survey"
    build(Whole(40, True, True, False), folder, name="s", samples_per_shard=8, progress=False)
    return folder


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(shard_files, "Retry", lambda: QUICK)


class Storage:
    """Stands in for os.pread: fails at some reads, by how often the same bytes were asked for before."""

    def __init__(self, fail=lambda tries: None, pause=0.0):
        self.fail, self.pause, self.real = fail, pause, os.pread
        self.tries = Counter()
        self.lock = threading.Lock()

    def __call__(self, file, size, offset):
        with self.lock:  # several threads read, in any order
            where = os.readlink(f"/proc/self/fd/{file}"), offset
            tries = self.tries[where]
            self.tries[where] += 1
        time.sleep(self.pause)
        if code := self.fail(tries):
            raise OSError(code, os.strerror(code))
        return self.real(file, size, offset)


def batches(survey, count=6, **options):
    with Loader(survey, micro_batch=4, device="cpu", reader="webdataset", **options) as loader:
        return list(islice(loader, count))


def test_errors_that_pass_change_nothing(survey, monkeypatch, caplog):
    expected = batches(survey)
    storage = Storage(lambda tries: (errno.EIO, errno.ESTALE, None)[min(tries, 2)])
    monkeypatch.setattr(os, "pread", storage)
    with caplog.at_level(logging.WARNING):
        found = batches(survey)
    assert max(storage.tries.values()) >= 3 and "trying again in" in caplog.text
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_error_that_does_not_pass_ends_with_the_place(survey, monkeypatch):
    storage = Storage(lambda tries: errno.EIO)
    monkeypatch.setattr(os, "pread", storage)
    with pytest.raises(OSError, match="Input/output error") as caught:
        batches(survey)
    notes = "\n".join(caught.value.__notes__)
    assert "given up after 4 tries" in notes and "start the same command" in notes
    assert "position" in notes and "the loader stopped at epoch 0, position" in notes


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOENT, errno.EBADF])
def test_other_errors_end_at_once(survey, monkeypatch, code):
    storage = Storage(lambda tries: code)
    monkeypatch.setattr(os, "pread", storage)
    with pytest.raises(OSError) as caught:
        batches(survey)
    assert caught.value.errno == code and not any("tries" in note for note in caught.value.__notes__)


def test_dali_goes_on_sample_by_sample(survey, monkeypatch, caplog):
    pipeline = pytest.importorskip("nvidia.dali").Pipeline
    expected = batches(survey)
    real, calls = pipeline.run, []

    def run(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("Critical error in pipeline: read failed")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(pipeline, "run", run)
    with caplog.at_level(logging.WARNING), Loader(survey, micro_batch=4, device="cpu", reader="dali") as loader:
        found = list(islice(loader, 6))
    assert "reading the rest of this segment sample by sample" in caplog.text
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_shard_that_dali_cannot_open_is_named(survey, tmp_path, caplog):
    pytest.importorskip("nvidia.dali")
    shutil.copytree(survey, tmp_path / "survey")
    with Loader(tmp_path / "survey", micro_batch=4, device="cpu", reader="dali") as loader:
        files = loader._source.files
        for shard in range(len(files.records)):
            files.lines(shard)  # the index is known, the tar is not open
        (gone,) = sorted((tmp_path / "survey").glob("train-*.tar"))[:1]
        gone.unlink()
        with pytest.raises(FileNotFoundError, match=gone.name):
            list(islice(loader, 12))


def test_storage_that_hangs_ends_with_an_error(survey, monkeypatch):
    monkeypatch.setattr(os, "pread", Storage(pause=0.3))
    with pytest.raises(TimeoutError, match=r"no batch came for 0.1 s.*the run goes on from its last checkpoint"):
        batches(survey, timeout_s=0.1)


def test_a_slow_disk_shows_as_waiting(survey, monkeypatch):
    monkeypatch.setattr(os, "pread", Storage(pause=0.02))
    with Loader(survey, micro_batch=4, device="cpu", reader="webdataset", threads=1) as loader:
        next(loader)
        waited, start = loader.wait_seconds, time.perf_counter()
        list(islice(loader, 5))
        share = (loader.wait_seconds - waited) / (time.perf_counter() - start)
    assert share > 0.5


def test_depth_grows_only_where_the_consumer_waits():
    def items(pause):
        for i in range(30):
            time.sleep(pause)
            yield i

    starved = Prefetcher(items(0.005), 2, "t", deepest=8)
    assert list(starved) == list(range(30)) and starved.depth == 8
    fed = Prefetcher(items(0.0), 2, "t", deepest=8)
    out = []
    for item in fed:
        out.append(item)
        while len(fed._ready) < 2 and not fed._ended:  # a consumer that is slower, however busy the machine is
            time.sleep(0.001)
    assert out == list(range(30)) and fed.depth == 2


def test_pauses_double_and_end(monkeypatch):
    pauses = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)

    def read():
        raise OSError(errno.ETIMEDOUT, "timed out")

    with pytest.raises(OSError, match="timed out"):
        Retry(times=5, first_pause_s=1, longest_pause_s=5).call(read, "a file")
    assert pauses == [1, 2, 4, 5, 5]
    for wrong in ({"times": -1}, {"first_pause_s": 0}, {"first_pause_s": 2, "longest_pause_s": 1}):
        with pytest.raises(ValueError, match="retry: needs"):
            Retry(**wrong)
