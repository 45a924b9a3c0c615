"""Makes the toy method importable by its plain name, as its processes know it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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
