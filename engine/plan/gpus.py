"""GPUs by their makers' data sheets: what a run's cost is predicted from, and what its MFU refers to."""

from __future__ import annotations

from dataclasses import dataclass

from armillary.engine.config.run import Run
from armillary.kernels.mlp.fp8_linear import CAPABILITY, fp8_problem
from armillary.models.rules import fields_named

__all__ = ["GPUS", "Gpu", "fp8_problems", "gpu_named"]


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of a node. Rates are dense, as printed; none is reached.

    Attributes:
        title: As the driver names it; the first entry of `GPUS` whose title stands in a device's name as words is meant.
        memory_gib: Memory a program sees.
        bf16_tflops: Tensor cores.
        tf32_tflops: Tensor cores on float32 rounded to 10 bits.
        fp32_tflops: Without tensor cores.
        memory_tbs: Memory bandwidth, TB/s.
        link_gbs: To the other GPUs of its node, GB/s in one direction: NVLink, or PCIe where there is none.
        node_gbits: Network of a node of eight as they are commonly sold, Gb/s in one direction.
        watts: Board power.
        capability: Compute capability, 90 for 9.0.
        multiprocessors: Multiprocessors.
    """

    title: str
    memory_gib: float
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_tbs: float
    link_gbs: float
    node_gbits: float
    watts: float
    capability: int
    multiprocessors: int

    @property
    def fp8_tflops(self) -> float:
        """Tensor cores on 8-bit floats, float32 sums: by the same data sheets twice the rate of bf16; 0 where there are none."""
        return 2 * self.bf16_tflops if self.capability >= CAPABILITY else 0.0


GPUS = {
    "b200": Gpu("B200", 179.0, 2250.0, 1125.0, 75.0, 8.0, 900, 3200, 1000, 100, 148),
    "h200": Gpu("H200", 140.4, 989.4, 494.7, 66.9, 4.8, 450, 3200, 700, 90, 132),
    "h100-pcie": Gpu("H100 PCIe", 79.6, 756.0, 378.0, 51.0, 2.0, 64, 1600, 350, 90, 114),
    "h100-nvl": Gpu("H100 NVL", 93.6, 835.0, 417.5, 60.0, 3.9, 300, 1600, 400, 90, 132),
    "h100": Gpu("H100", 79.6, 989.4, 494.7, 66.9, 3.35, 450, 3200, 700, 90, 132),
    "gh200": Gpu("GH200", 95.6, 989.4, 494.7, 66.9, 4.0, 450, 3200, 700, 90, 132),
    "l40s": Gpu("L40S", 44.5, 362.1, 183.0, 91.6, 0.864, 32, 400, 350, 89, 142),
    "l40": Gpu("L40", 44.5, 181.0, 90.5, 90.5, 0.864, 32, 400, 300, 89, 142),
    "l4": Gpu("L4", 22.5, 121.0, 60.0, 30.3, 0.3, 32, 200, 72, 89, 58),
    "a100-40": Gpu("A100", 39.4, 311.9, 156.0, 19.5, 1.555, 300, 1600, 400, 80, 108),
    "a100-80": Gpu("A100", 79.2, 311.9, 156.0, 19.5, 2.039, 300, 1600, 400, 80, 108),
    "a40": Gpu("A40", 44.4, 149.7, 74.8, 37.4, 0.696, 32, 400, 300, 86, 84),
    "a10": Gpu("A10", 22.2, 125.0, 62.5, 31.2, 0.6, 32, 200, 150, 86, 72),
    "rtx4090": Gpu("RTX 4090", 23.5, 165.2, 82.6, 82.6, 1.008, 32, 200, 450, 89, 128),
}
"""Source: NVIDIA's data sheets (A100, A10, A40, L4, L40, L40S, H100, H200, DGX B200, GH200) and the Ada whitepaper (RTX 4090); the
network of a node is that of DGX and HGX machines, and for cards on PCIe an assumption."""


def fp8_problems(run: Run, capability: int) -> list[str]:
    """Fields of a run that ask a GPU of this compute capability for 8-bit products that it has not."""
    if not (problem := fp8_problem(capability)):
        return []
    return [f"method.{name}: {problem}" for name, value in fields_named(run.method, "products") if value == "fp8"]


def gpu_named(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ValueError: It is not in the table.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"--gpu: must be one of {', '.join(sorted(GPUS))}, got {name!r}")
    return GPUS[name.lower()]
