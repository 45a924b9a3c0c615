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

Under TRITON_INTERPRET=1 a kernel is no JITFunction, so one helper process without it compiles for all tests of this
process. What it found is kept below the user's cache folder under the very key that Triton gives to a compilation: the
source of the kernel, of all that it calls and of all of Triton, signature, constants, options, architecture, version of
ptxas. So a run compiles only what has changed. It says nothing of speed, occupancy, races or miscompilation.
"""

import atexit
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory that one block may ask for
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "armillary" / "compiled-kernels"
KEPT_S = 30 * 24 * 3600  # results that nobody asked for in this time are removed
PATIENCE_S = 600


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        registers: Registers a thread.
        stack: Bytes of stack a thread; anything above 0 means that registers spill.
        local: Bytes of local memory a thread.
        shared: Bytes of shared memory a block.
        spills: Bytes that registers spill, loads and stores together.
        ptx: The assembly, to search for instructions (wgmma, cp.async, ld.global.v4, ...).
        log: What ptxas said.
    """

    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    ptx: str
    log: str

    def __repr__(self) -> str:  # without the assembly: it is what a failing assertion prints
        return (
            f"Resources(registers={self.registers}, stack={self.stack}, local={self.local}, shared={self.shared}, "
            f"spills={self.spills} bytes)"
        )


def resources(
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object] | None = None,
    *,
    divisible: Sequence[str] = (),
    architectures: Sequence[int] = ARCHITECTURES,
    **options: object,
) -> dict[int, Resources]:
    """Compile a kernel and return what it uses, by architecture.

    Args:
        kernel: "module:name" of a `triton.jit` function; autotune and heuristics around it are taken off.
        signature: Triton type of each runtime argument: "*bf16", "*fp32", "*u8", "i32", "i64", "fp32", ...
        constexprs: Value of each constexpr argument; a string "tl.x" stands for that attribute of triton.language. A
            runtime argument that is None or 1 at launch is a constexpr too.
        divisible: Integer arguments to be taken as divisible by 16. Pointers always are.
        architectures: Compute capabilities, 80 for 8.0.
        options: num_warps (4), num_stages (3), enable_fp_fusion (True), as at launch.

    Raises:
        RuntimeError: It does not compile, and the message ends with the compiler's; or ptxas serializes its wgmma
            instructions (C7515), so that loads and products of sm_90 no longer run at the same time.
    """
    job = {
        "kernel": kernel,
        "signature": dict(signature),
        "constexprs": dict(constexprs or {}),
        "divisible": sorted(divisible),
        "options": options,
        "architectures": list(architectures),
    }
    found = _asked(json.dumps(job, sort_keys=True))
    for sm, used in found.items():
        if "serialized" in used.log:
            raise RuntimeError(f"{kernel}: ptxas serializes wgmma on sm_{sm}:\n{used.log}")
    return found


@functools.cache
def _asked(job: str) -> dict[int, Resources]:
    return _helper().compile(job)


@functools.cache
def _helper() -> "Helper":
    return Helper(CACHE)


class Helper:
    """A process without TRITON_INTERPRET that compiles one job after the other; ends with this one.

    Args:
        cache: Folder of results.
    """

    def __init__(self, cache: Path) -> None:
        self.log = tempfile.TemporaryFile("w+")
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # as imported here
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        atexit.register(self.close)

    def compile(self, job: str) -> dict[int, Resources]:
        """What the kernel of a job uses, by architecture."""
        assert self.process.stdin and self.process.stdout
        answer = ""
        if self.process.poll() is None:
            self.process.stdin.write(job + "\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], PATIENCE_S)[0]:
                answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            answer = json.dumps({"error": f"the compiler died or hangs: {self.log.read()}"})
            self.close()
            _helper.cache_clear()  # the next job gets a new one
        found = json.loads(answer)
        if "error" in found:
            raise RuntimeError(f"{json.loads(job)['kernel']} does not compile:\n{found['error'][-3000:]}")
        return {int(sm): Resources(**used) for sm, used in found.items()}

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()  # closes the pipes
        self.log.close()
        atexit.unregister(self.close)


def _serve(cache: Path) -> None:
    """Answer each line of the standard input, a job, by one line of JSON; what the compiler prints goes to the log."""
    import traceback

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.iterdir():
        if time.time() - old.stat().st_mtime > KEPT_S:
            old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch  # only what is complete goes to the cache
        for line in sys.stdin:
            try:
                answer = {sm: asdict(used) for sm, used in _compile_here(json.loads(line), cache).items()}
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


def _compile_here(job: dict, cache: Path) -> dict[int, Resources]:
    import importlib

    import triton
    import triton.language as tl
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
        fn=fn, signature=signature, constexprs=constexprs, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    return {sm: _used(source, sm, job["options"], cache) for sm in job["architectures"]}


def _used(source, sm: int, options: dict, cache: Path) -> Resources:
    """From the cache, or compiled now."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    target = GPUTarget("cuda", sm, 32)
    backend = make_backend(target)
    key = get_cache_key(source, backend, backend.parse_options(dict(options)), get_cache_invalidating_env_vars())
    key += Path(__file__).read_text()  # how the results are read
    kept = cache / hashlib.sha256(key.encode()).hexdigest()
    try:
        found = Resources(**json.loads(zlib.decompress(kept.read_bytes())))  # damage shows in the checksum
        kept.touch()
        return found
    except (OSError, TypeError, ValueError, zlib.error):
        pass
    said = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(said):
        compiled = triton.compile(source, target=target, options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    count = {k: int(n) for k, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said.getvalue()))
    used = count["REG"], count["STACK"], count["LOCAL"], compiled.metadata.shared, spills
    found = Resources(*used, compiled.asm["ptx"], said.getvalue())
    written = kept.with_suffix(f".{os.getpid()}")
    written.write_bytes(zlib.compress(json.dumps(asdict(found)).encode()))
    written.replace(kept)
    return found


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
