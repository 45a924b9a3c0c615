"""One switch: with no GPU the kernels run under Triton's interpreter."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported

KERNELS = Path(__file__).with_name("kernels")
REAL_DATA = os.environ.get("ARMILLARY_REAL_DATA")


def pytest_collection_modifyitems(config, items):
    if "triton.runtime.interpreter" in sys.modules and not GPU:
        speed_up_interpreter(sys.modules["triton.runtime.interpreter"])
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if KERNELS in item.path.parents:
            item.add_marker(pytest.mark.kernel)
        if "compile" in item.originalname:  # so are called those that compile a kernel ahead of time
            item.add_marker(pytest.mark.aot)
    if hasattr(config, "workerinput"):
        items.sort(key=longest_first(items))


def longest_first(items):
    """Order of files for several workers: those that start ranks, then those with slow tests, then the others.

    A worker takes one file after the other, so that at the end only short ones are left and no worker waits long for
    another; tests that measure time run beside tests that use one core each.
    """
    kinds = {}
    for item in items:
        kind = 0 if "dist" in item.keywords else 1 if "slow" in item.keywords else 2
        kinds[item.path] = min(kind, kinds.get(item.path, kind))
    return lambda item: kinds[item.path]


def speed_up_interpreter(interpreter):
    """Take three costs out of Triton's interpreter that are most of its time; nothing else about it changes.

    Every launch replaces triton.language by the interpreter's own functions and puts it back, and every call of a device
    function looks for what is still to be replaced: here it is replaced once. Every operation builds a table of NumPy's
    dtypes anew: here one is kept. Every sum and product of integers is computed a second time to see whether it overflows,
    and what was seen is dropped unless the interpreter debugs: here it is not computed.
    """
    names = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "tl", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in names):
        return  # another version of Triton
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    tl, dtypes = interpreter.tl, {}
    replace_all, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype

    def replace_missing(fn):
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if not modules or any(tl.core.is_builtin(module.load) for module in modules):
            replace_all(fn)
        return interpreter._LangPatchScope()  # with nothing to put back

    def numpy_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        key = "pointer" if isinstance(element, tl.pointer_type) else element.name
        if key not in dtypes:
            dtypes[key] = dtype_of(dtype)
        return dtypes[key]

    interpreter._patch_lang, interpreter._get_np_dtype = replace_missing, numpy_dtype


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
