"""Toy surveys and runs, and a place where real processes run them."""

from pathlib import Path

import pytest
from toy_site import Site


@pytest.fixture
def survey(tmp_path) -> Path:
    """A survey's description, without shards."""
    import toy

    return toy.toy_survey(tmp_path / "survey")


@pytest.fixture
def run(tmp_path, survey):
    """A run that can start."""
    import toy

    return toy.toy_run(tmp_path / "runs", survey)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """One site for all tests: reference runs are shared."""
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.stop(site.live)


@pytest.fixture(scope="session")
def reference(site):
    """Uninterrupted two-rank run under ZeRO-2: (name, how it ended)."""
    ended = site.go("--name", "reference", at_once=False)
    assert ended.code == 0, ended.output
    return "reference", ended
