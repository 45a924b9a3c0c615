"""The same survey from a Dask cluster, also where a worker is killed midway."""

import os
import signal
import sys
import threading
import time

import pytest
from mixed import Mixed

from armillary.engine.data.building.build import build
from armillary.engine.data.building.cluster import Cluster
from armillary.engine.data.inspect.check import check_survey

distributed = pytest.importorskip("distributed")
pytestmark = [
    pytest.mark.slow,
    # what Dask says about itself, and about workers that are killed
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore:.*:UserWarning"),
]


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the workers import `mixed`
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as running:
        yield running


def pack(folder, source, **options):
    return build(source, folder, name="s", samples_per_shard=8, progress=False, **options)


def the_same(one, other):
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    for name in names:
        if name != "survey.json":  # which holds the date
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_killed_worker_changes_nothing(cluster, tmp_path):
    source = Mixed(200)
    pack(tmp_path / "here", source)
    victim = list(cluster.workers.values())[0].process.process.pid
    finished = threading.Event()

    def kill():
        while not list((tmp_path / "there").glob("*.tar")) and not finished.is_set():
            time.sleep(0.005)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        pack(tmp_path / "there", source, dask=cluster.scheduler_address)
    finally:
        finished.set()
        killer.join()
    the_same(tmp_path / "here", tmp_path / "there")
    assert not check_survey(tmp_path / "there")


def test_no_scheduler_and_no_workers(tmp_path, monkeypatch):
    from armillary.engine.data.building import cluster as module

    monkeypatch.setattr(module, "CONNECT_S", 0.5)
    with pytest.raises(OSError, match="no Dask scheduler at tcp://127.0.0.1:9"):
        Cluster(Mixed(1), "tcp://127.0.0.1:9")
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=None, silence_logs=50) as empty,
        pytest.raises(OSError, match="has no workers; start some"),
    ):
        Cluster(Mixed(1), empty.scheduler_address)
