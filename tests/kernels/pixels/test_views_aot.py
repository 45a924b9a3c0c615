"""The kernels of the views compile for every architecture we claim, without spilling."""

import pytest
from aot import ARCHITECTURES, resources

from armillary.kernels.pixels import blur, noise

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
} | dict.fromkeys(("height", "width", "taps"), "i32")
BLUR_KERNEL = "armillary.kernels.pixels.blur:_blur_kernel"
CASES = {
    "noise": (
        ("armillary.kernels.pixels.noise:_add_noise_kernel", NOISE, {"BLOCK": noise.BLOCK}),
        {"enable_fp_fusion": False},
    ),
    "blur_columns": ((BLUR_KERNEL, BLUR | {"step": "i32"}, {"BLOCK": blur.BLOCK}), {}),
    "blur_rows": ((BLUR_KERNEL, BLUR, {"step": 1, "BLOCK": blur.BLOCK}), {}),
}


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spilling(case, sm):
    described, options = CASES[case]
    used = resources(*described, num_warps=4, **options)[sm]
    assert used.stack == used.local == 0, used
    assert used.registers <= 128 and used.shared <= 48 * 1024, used
    if case == "noise":
        # Fused multiply-adds or approximate square roots would part the GPU's bits from the CPU's.
        assert "fma.rn" not in used.ptx and ".approx" not in used.ptx
