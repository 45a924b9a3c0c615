"""One switch: with no GPU the kernels run under Triton's interpreter."""

import os
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported

REAL_DATA = os.environ.get("ARMILLARY_REAL_DATA")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real galaxies (ARMILLARY_REAL_DATA); its tests skip where it is absent."""
    if not REAL_DATA:
        pytest.skip("real galaxies: set ARMILLARY_REAL_DATA to the folder that holds them")
    return Path(REAL_DATA)


@pytest.fixture
def poison_empty(monkeypatch):
    """torch.empty and torch.empty_like give NaN, so a kernel that leaves an element unwritten fails."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args, real=real, **kwargs):
            out = real(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, poisoned)
