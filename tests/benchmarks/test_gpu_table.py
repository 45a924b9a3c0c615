"""The tables of the GPU benchmark: what is met and missed, shares of the limits, the latest run of each operation."""

from pathlib import Path

import pytest


def rows_of_a_gpu(run: str = "1", faster: float = 1.0) -> list[dict]:
    """Rows as a run on a GPU would add them; the numbers are made up."""
    common = {"run": run, "status": "ok", "device": "a GPU"}
    case = {**common, "kind": "case", "forward_gb": 1.0, "backward_gb": 2.0, "forward_gflop": 500.0}
    case |= {"backward_gflop": 1000.0, "output_gb": 0.0}

    def ways(operation: str, shape: str, **ms: float) -> list[dict]:
        return [
            {**case, "operation": operation, "shape": shape, "variant": name.replace("_", " ")}
            | {"forward_ms": 0.3 * t, "backward_ms": 0.7 * t, "whole_ms": t, "peak_mib": 100 * t}
            for name, t in ms.items()
        ]

    decode = {**case, "operation": "decode", "shape": "B", "variant": "triton", "forward_ms": 0.5, "output_gb": 1.2}
    step = {**common, "kind": "step", "operation": "step", "shape": "ViT-L", "batch": 96, "gflop_per_image": 500.0}
    step |= {"loss": 10.0, "grad_norm": 2.0}
    return [
        {**common, "kind": "limits", "operation": "limits", "variant": "", "copy_gb_s": 3000.0, "gemm_tflop_s": 800.0},
        *ways("geometry_ffn", "M", triton=3.5 / faster, eager=5.25, compiled=3.85, three_plain_FFNs=3.4),
        *ways("prototype_loss", "V", triton=1.0, eager=10.0),
        decode,
        {**step, "variant": "eager", "ms_per_image": 2.6},
        {**step, "variant": "triton", "ms_per_image": 2.0 / faster},
        {**step, "variant": "compiled", "ms_per_image": 2.3},
    ]


def add(folder: Path, rows: list[dict]) -> None:
    from gpu.run import Run

    run = Run("cuda", False, folder, 0.0)
    run.id = rows[0]["run"]
    run.add(rows)


def test_targets_are_met_or_missed_as_the_rows_say(tmp_path):
    from gpu.table import read_rows, targets

    add(tmp_path, rows_of_a_gpu())
    got = [(t.measured, t.met) for t in targets(read_rows(tmp_path))]
    # 5.25 / 3.5, 3.85 / 3.5, 3.5 / 3.4 - 1, 1 / 10, 1.2 GB in 0.5 ms of 3 TB/s, 2.3 / 2, 500 GFLOP in 2 ms of 800 TFLOP/s
    assert got == [
        ("1.50x", True), ("1.10x", False), ("2.9 %", True), ("0.100", True), ("80 %", True), ("1.15x", True), ("31 %", False),
    ]  # fmt: skip


def test_shares_of_the_limits(tmp_path):
    from gpu.table import read_rows

    add(tmp_path, rows_of_a_gpu())
    ours = next(row for row in read_rows(tmp_path) if row["operation"] == "geometry_ffn")
    # 500 and 1000 GFLOP at 800 TFLOP/s are 0.625 and 1.25 ms, more than 1 and 2 GB at 3 TB/s
    assert ours["limit"] == "GEMM" and float(ours["forward_percent"]) == pytest.approx(100 * 0.625 / 1.05, rel=1e-4)
    assert float(ours["whole_percent"]) == pytest.approx(100 * 1.875 / 3.5, rel=1e-4)


def test_the_table_holds_each_operations_latest_run(tmp_path):
    from gpu.table import write_table

    add(tmp_path, rows_of_a_gpu("1"))
    add(tmp_path, [row for row in rows_of_a_gpu("2", faster=1.25) if row["operation"] in ("limits", "geometry_ffn")])
    table = write_table(tmp_path)
    assert "1.88x | met" in table and "1.50x" not in table  # of the second run
    assert "| ViT-L step: faster than torch.compile | at least 1.1x | 1.15x | met |" in table  # of the first
    assert "a GPU" in table.splitlines()[0] and "copy 3,000 GB/s" in table and "Failed" not in table


def test_a_step_that_computes_something_else_has_failed(tmp_path):
    rows = rows_of_a_gpu()
    rows[-2]["grad_norm"] = 2.1
    add(tmp_path, rows)
    from gpu.table import read_rows, targets, write_table

    status = {row["variant"]: row["status"] for row in read_rows(tmp_path) if row["kind"] == "step"}
    assert status["triton"].startswith("FAILED: grad_norm of the first step is 2.1") and status["compiled"] == "ok"
    assert [t.met for t in targets(read_rows(tmp_path))][-2:] == [None, None]
    assert "- step ViT-L triton: FAILED" in write_table(tmp_path)
