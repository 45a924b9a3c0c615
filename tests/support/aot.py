"""Compile Triton kernels ahead of time for GPUs that are not here, and read what they use.

    from aot import ARCHITECTURES, SHARED_LIMIT, resources

    @pytest.mark.parametrize("sm", ARCHITECTURES)
    def test_compiles_without_spilling(sm):
        used = resources(
            "armillary.kernels.pixels.decode:_kernel",
            {"x_ptr": "*bf16", "n": "i32"},           # every runtime argument, by name
            {"BLOCK": 1024, "ACC": "tl.float32"},     # every constexpr one
            divisible=("n",),                         # integers that a launch would find divisible by 16
            num_warps=4,
        )[sm]
        assert used.stack == used.local == 0, used
        assert used.shared <= SHARED_LIMIT[sm], used

The work happens in one fresh process for all architectures, once for each set of arguments: under TRITON_INTERPRET=1 a
kernel is no JITFunction. It says nothing of speed, occupancy, races or miscompilation.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory that one block may ask for


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        registers: Registers a thread.
        stack: Bytes of stack a thread; anything above 0 means that registers spill.
        local: Bytes of local memory a thread.
        shared: Bytes of shared memory a block.
        ptx: The assembly, to search for instructions (wgmma, cp.async, ld.global.v4, ...).
    """

    registers: int
    stack: int
    local: int
    shared: int
    ptx: str

    def __repr__(self) -> str:  # without the assembly: it is what a failing assertion prints
        return (
            f"Resources(registers={self.registers}, stack={self.stack}, local={self.local}, shared={self.shared} bytes)"
        )


def resources(
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object] | None = None,
    *,
    divisible: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    architectures: Sequence[int] = ARCHITECTURES,
) -> dict[int, Resources]:
    """Compile a kernel and return what it uses, by architecture.

    Args:
        kernel: "module:name" of a `triton.jit` function; autotune and heuristics around it are taken off.
        signature: Triton type of each runtime argument: "*bf16", "*fp32", "*u8", "i32", "i64", "fp32", ...
        constexprs: Value of each constexpr argument; a string "tl.x" stands for that attribute of triton.language. A
            runtime argument that is None or 1 at launch is a constexpr too.
        divisible: Integer arguments to be taken as divisible by 16. Pointers always are.
        num_warps: As at launch.
        num_stages: As at launch.
        architectures: Compute capabilities, 80 for 8.0.

    Raises:
        RuntimeError: It does not compile; the message ends with the compiler's.
    """
    job = {
        "kernel": kernel,
        "signature": dict(signature),
        "constexprs": dict(constexprs or {}),
        "divisible": sorted(divisible),
        "options": {"num_warps": num_warps, "num_stages": num_stages},
        "architectures": list(architectures),
    }
    return _compile_elsewhere(json.dumps(job, sort_keys=True))


@functools.cache
def _compile_elsewhere(job: str) -> dict[int, Resources]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # as imported here
    with tempfile.TemporaryDirectory() as cache:  # a cubin from an older compiler run must not pass for this one
        environment["TRITON_CACHE_DIR"] = cache
        run = subprocess.run(
            [sys.executable, __file__], input=job, capture_output=True, text=True, env=environment, timeout=600
        )
    if run.returncode:
        raise RuntimeError(f"{json.loads(job)['kernel']} does not compile:\n{run.stderr[-3000:]}")
    return {int(sm): Resources(**used) for sm, used in json.loads(run.stdout.splitlines()[-1]).items()}


def _compile_here(job: dict) -> dict[int, Resources]:
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job["kernel"].split(":")
    fn = getattr(importlib.import_module(module), name)
    while not isinstance(fn, triton.JITFunction):
        fn = fn.fn
    constexprs = {
        k: getattr(tl, v[3:]) if isinstance(v, str) and v.startswith("tl.") else v for k, v in job["constexprs"].items()
    }
    given = job["signature"] | dict.fromkeys(constexprs, "constexpr")
    if set(given) != set(fn.arg_names):
        raise TypeError(f"{job['kernel']} takes {fn.arg_names}, described were {sorted(given)}")
    signature = {k: given[k] for k in fn.arg_names}
    aligned = [i for i, (k, kind) in enumerate(signature.items()) if kind[0] == "*" or k in job["divisible"]]
    source = ASTSource(
        fn=fn,
        signature=signature,
        constexprs=constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    used = {}
    for sm in job["architectures"]:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=job["options"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
        count = {k: int(n) for k, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        used[sm] = Resources(
            count["REG"], count["STACK"], count["LOCAL"], compiled.metadata.shared, compiled.asm["ptx"]
        )
    return used


if __name__ == "__main__":
    print(json.dumps({sm: asdict(used) for sm, used in _compile_here(json.load(sys.stdin)).items()}))
