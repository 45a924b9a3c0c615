"""The kernels of the views compile for every architecture we claim, without spilling. Needs no GPU.

In a fresh process: under TRITON_INTERPRET=1 a kernel is not a JITFunction and cannot be compiled.
"""

import json
import os
import subprocess
import sys

import pytest

ARCHITECTURES = (80, 90, 100)
NOISE = {"image_ptr": "*fp32", "sigma_ptr": "*fp32", "stream_ptr": "*i32", "seed": "i64"} | dict.fromkeys(
    ("channels", "pixels", "quads"), "i32"
)
BLUR = {
    "in_ptr": "*fp32",
    "in_plane_ptr": "*i64",
    "out_ptr": "*fp32",
    "out_plane_ptr": "*i64",
    "weight_ptr": "*fp32",
    "radius_ptr": "*i32",
} | dict.fromkeys(("height", "width", "taps", "step"), "i32")
CASES = {
    "noise": {"kernel": "armillary.kernels.pixels.noise:_add_noise_kernel", "signature": NOISE, "constants": {}},
    "blur_columns": {"kernel": "armillary.kernels.pixels.blur:_blur_kernel", "signature": BLUR, "constants": {}},
    "blur_rows": {"kernel": "armillary.kernels.pixels.blur:_blur_kernel", "signature": BLUR, "constants": {"step": 1}},
}

WORKER = r"""
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
report = {}
for name, case in json.loads(sys.argv[1]).items():
    module, kernel = case["kernel"].split(":")
    constants = case["constants"] | {"BLOCK": importlib.import_module(module).BLOCK}
    signature = case["signature"] | dict.fromkeys(constants, "constexpr")
    attrs = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(signature) if p.endswith("_ptr")}
    source = ASTSource(getattr(importlib.import_module(module), kernel), signature, constants, attrs)
    for sm in json.loads(sys.argv[2]):
        options = {"num_warps": 4} | ({"enable_fp_fusion": False} if name == "noise" else {})
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(built.asm["cubin"]); f.flush()
            text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
        report[f"{name} sm_{sm}"] = {m: int(n) for m, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)} | {
            "SHARED": built.metadata.shared, "FMA": len(re.findall(r"\bfma\.rn", built.asm["ptx"])),
            "APPROXIMATE": len(re.findall(r"\.approx", built.asm["ptx"]))}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def usage():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-c", WORKER, json.dumps(CASES), json.dumps(ARCHITECTURES)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spilling(case, sm, usage):
    used = usage[f"{case} sm_{sm}"]
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= 128 and used["SHARED"] <= 48 * 1024, used


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_noise_rounds_as_on_the_cpu(sm, usage):
    # Fused multiply-adds or approximate square roots would part the GPU's bits from the CPU's.
    used = usage[f"noise sm_{sm}"]
    assert used["FMA"] == used["APPROXIMATE"] == 0, used
