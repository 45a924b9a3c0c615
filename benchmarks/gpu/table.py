"""The Markdown table of a folder of results, made from the rows of its CSV and nothing else."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from armillary.engine.atomic_file import write_text

__all__ = ["Target", "latest", "read_rows", "targets", "write_table"]

PHASES = ("teacher", "student", "heads+losses", "backward", "clip", "optimizer", "copy")
ENGINE_COLUMNS = (("images_per_s", "{:,.0f}"), ("ms_per_image", "{:.2f}"), ("peak_mib", "{:,.0f}"), ("loss", "{:.3f}"))
Row = dict[str, str]


class Target(NamedTuple):
    """A figure to be reached: what, the bound as text, what was measured, and whether that meets it.

    `measured` and `met` are None where a row that they need is missing.
    """

    what: str
    bound: str
    measured: str | None
    met: bool | None


def read_rows(folder: Path) -> list[Row]:
    """Rows of gpu.csv, oldest first."""
    with open(folder / "gpu.csv", newline="") as f:
        return list(csv.DictReader(f))


def latest(rows: Sequence[Row]) -> list[Row]:
    """For each operation, the rows of the last run that it was part of: figures are compared within a run."""
    last = {row["operation"]: row["run"] for row in rows if row["kind"] != "tune"}
    return [row for row in rows if row["kind"] != "tune" and row["run"] == last[row["operation"]]]


def number(row: Row | None, column: str) -> float | None:
    """A cell as a number; None where it is empty, or the row is missing or no measurement."""
    if row is None or row["status"] != "ok" or not row.get(column):
        return None
    return float(row[column])


def ratio(above: Row | None, below: Row | None, column: str) -> float | None:
    """Quotient of two rows' cells; None where one is missing."""
    a, b = number(above, column), number(below, column)
    return a / b if a is not None and b else None


def whole(row: Row | None) -> str:
    """Column with the time of a row's whole: of both passes, or of the forward pass where there is no other."""
    return "whole_ms" if row is not None and row.get("whole_ms") else "forward_ms"


def by_shape(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows of the operations by operation and shape, then by variant."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "case":
            found.setdefault((row["operation"], row["shape"]), {})[row["variant"]] = row
    return found


def _target(limit: str, what: str, bound: float, value: float | None, unit: str, digits: int) -> Target:
    text = f"{limit} {bound:g}{unit}"
    if value is None:
        return Target(what, text, None, None)
    return Target(what, text, f"{value:.{digits}f}{unit}", value >= bound if limit == "at least" else value <= bound)


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """The project's targets for one H100, with what these rows say of them."""
    for (operation, shape), ways in by_shape(rows).items():
        ours = ways.get("triton")
        if operation == "geometry_ffn":
            name = f"geometry experts {shape}".strip()
            yield _target(
                "at least", f"{name}: faster than eager", 1.4, ratio(ways.get("eager"), ours, "whole_ms"), "x", 2
            )
            if "compiled" in ways:
                against = ratio(ways["compiled"], ours, "whole_ms")
                yield _target("at least", f"{name}: faster than torch.compile", 1.15, against, "x", 2)
            if PLAIN in ways:
                over = ratio(ours, ways[PLAIN], "whole_ms")
                over = None if over is None else 100 * (over - 1)
                yield _target("at most", f"{name}: more than {PLAIN} of the same products", 5, over, " %", 1)
        if operation in ("decode", "decode_views") and ours is not None:
            share = number(ours, "output_percent")
            yield _target("at least", f"{operation} {shape}: rate of its output over the copy rate", 70, share, " %", 0)
        if operation == "prototype_loss":
            share = ratio(ours, ways.get("eager"), "peak_mib")
            yield _target("at most", f"prototype loss {shape}: memory over eager's", 0.125, share, "", 3)
    step = {row["variant"]: row for row in rows if row["kind"] == "step"}
    if step:
        against = ratio(step.get("compiled"), step.get("triton"), "ms_per_image")
        yield _target("at least", "ViT-L step: faster than torch.compile", 1.1, against, "x", 2)
        share = number(step.get("triton"), "gemm_percent")
        yield _target("at least", "ViT-L step: matrix products over the measured bf16 rate", 55, share, " %", 0)


PLAIN = "three plain FFNs"


def write_table(folder: Path) -> str:
    """Write gpu.md beside gpu.csv and return it."""
    rows = latest(read_rows(folder))
    parts = [
        _heading(rows),
        _targets(rows),
        _cases(rows),
        _step(rows),
        _profile(rows),
        _spectra(rows),
        _engine(rows),
        _troubles(rows),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text(folder / "gpu.md", text)
    return text


def _heading(rows: Sequence[Row]) -> str:
    machine = rows[-1]
    runs = sorted({(row["date"][:10], row["commit"]) for row in rows})
    when = ", ".join(f"{date} at {commit}" for date, commit in runs)
    limits = next((row for row in rows if row["kind"] == "limits"), None)
    copy, gemm = number(limits, "copy_gb_s"), number(limits, "gemm_tflop_s")
    text = f"# {machine['device']}\n\nMade by `python benchmarks/gpu` from gpu.csv. torch {machine['torch']}, triton {machine['triton']}, {when}."
    if copy is None or gemm is None:
        return text + " **Nothing was timed.**"
    return text + f" Limits, measured: copy {copy:,.0f} GB/s (read and written), bf16 products {gemm:,.0f} TFLOP/s."


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _targets(rows: Sequence[Row]) -> str:
    lines = []
    for target in targets(rows):
        met = {True: "met", False: "missed", None: ""}[target.met]
        lines.append([target.what, target.bound, target.measured or "not measured", met])
    return "## Targets\n\n" + _table(["", "bound", "measured", ""], lines) if lines else ""


def _cases(rows: Sequence[Row]) -> str:
    lines = []
    for (operation, shape), ways in by_shape(rows).items():
        for variant, row in ways.items():
            if row["status"] != "ok":
                continue
            ours = ways.get("triton")
            times = [_time(row, name) for name in ("forward", "backward", "whole")]
            faster = "" if row is ours else _cell(ratio(row, ours, whole(row)), "{:.2f}x")
            share = " / ".join(
                f"{value:.0f}"
                for name in ("forward", "backward")
                if (value := number(row, f"{name}_percent")) is not None
            )
            lines.append(
                [
                    operation,
                    shape,
                    variant,
                    *times,
                    _cell(number(row, "predicted_ms"), "{:.2f}"),
                    faster,
                    f"{share} {row.get('limit', '')}".strip(),
                    _cell(number(row, "peak_mib"), "{:,.0f}"),
                    _cell(number(row, "saved_mib"), "{:,.0f}"),
                    _cell(number(row, "error"), "{:.1e}"),
                ]
            )
    if not lines:
        return ""
    head = ["operation", "shape", "variant", "forward ms", "backward ms", "whole ms", "predicted ms", "ours is faster"]
    head += ["% of limit, forward / backward", "peak MiB", "saved MiB", "error"]
    text = (
        "## Operations\n\nMedians with 20th and 80th percentiles. Memory is above that of the inputs; saved is what lies "
        "between the passes. Predictions are from bytes and FLOP, before anything was run."
    )
    return f"{text}\n\n{_table(head, lines)}"


def _time(row: Row, name: str) -> str:
    found = [number(row, f"{name}_ms{suffix}") for suffix in ("", "_p20", "_p80")]
    if None in found:
        return ""
    return "{:.3f} ({:.3f} to {:.3f})".format(*found)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _step(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] != "step" or row["status"] != "ok":
            continue
        ms, batch = number(row, "ms_per_image"), number(row, "batch")
        lines.append(
            [
                row["variant"],
                row["batch"],
                _cell(None if ms is None else ms * (batch or 0), "{:.1f}"),
                _cell(number(row, "predicted_ms"), "{:.0f}"),
                _cell(None if not ms else 1e3 / ms, "{:.0f}"),
                _cell(number(row, "gemm_percent"), "{:.0f}"),
                *(_cell(number(row, f"{phase}_ms"), "{:.3f}") for phase in PHASES),
                _cell(number(row, "peak_mib"), "{:,.0f}"),
            ]
        )
    if not lines:
        return ""
    head = ["variant", "batch", "ms a step", "predicted", "images/s", "% of GEMM rate"]
    head += [f"{phase}, ms an image" for phase in PHASES] + ["peak MiB"]
    return f"## Step of DINOv2, ViT-L/12, bf16\n\n{_table(head, lines)}"


def _profile(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["shape"],
            row["calls"],
            _cell(number(row, "device_ms"), "{:.2f}"),
            _cell(number(row, "time_percent"), "{:.1f}"),
        ]
        for row in rows
        if row["kind"] == "profile" and number(row, "device_ms") is not None
    ]
    text = "Kernels that take most of the time of the step with ours, a step, by torch.profiler."
    head = ["kernel", "calls", "ms", "% of the device's time"]
    return f"## Profile of that step\n\n{text}\n\n{_table(head, lines)}" if lines else ""


def _spectra(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["kind"] == "spectra" and (ms := number(row, "ms_per_spectrum")) is not None:
            each = _cell(ms, "{:.3f}"), _cell(1e3 / ms, "{:,.0f}"), _cell(number(row, "peak_mib"), "{:,.0f}")
            lines.append([row["variant"], row["batch"], *each, _cell(number(row, "loss"), "{:.4f}")])
    head = ["precision", "batch", "ms a spectrum", "spectra/s", "peak MiB", "loss of the third step"]
    return f"## Step of SpecFormer\n\n{_table(head, lines)}" if lines else ""


def _engine(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["shape"],
            *(_cell(number(row, column), form) for column, form in ENGINE_COLUMNS),
            row.get("same_bits") or "",
        ]
        for row in rows
        if row["kind"] == "engine" and row["status"] == "ok"
    ]
    head = ["recipe of ViT-L/12", "images/s", "ms an image", "peak MiB", "last loss", "same bits"]
    text = "Medians over the steps after the first eight, loader included."
    return f"## The engine\n\n{text}\n\n{_table(head, lines)}" if lines else ""


def _troubles(rows: Sequence[Row]) -> str:
    lines = [
        f"- {row['operation']} {row.get('shape', '')} {row['variant']}: {row['status']}"
        for row in rows
        if row["status"] != "ok"
    ]
    return "## Failed or not run\n\n" + "\n".join(lines) if lines else ""
