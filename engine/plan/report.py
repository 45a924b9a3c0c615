"""A plan in words, for a terminal and for a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from armillary.engine.plan.collectives import HIDDEN, NODE
from armillary.engine.plan.memory import GIB, Memory
from armillary.engine.plan.plan import RESERVE, Plan

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["text", "write_page"]

HINT = "These are predictions from counted operations and data sheets. Nothing was run on a GPU."


def text(plan: Plan) -> str:
    """The whole plan as lines."""
    parts = [
        ("", _head(plan)),
        ("memory of a GPU in GiB", _memory(plan)),
        ("a step", _step(plan)),
        ("the run", _whole(plan)),
    ]
    parts += [
        ("messages of a step", _messages(plan)),
        ("weak scaling", _scaling(plan)),
        ("assumptions", _assumptions(plan)),
    ]
    lines = [line for title, block in parts for line in (["", title] if title else []) + block]
    return "\n".join([*lines, "", HINT])


def _head(plan: Plan) -> list[str]:
    train, sizes = plan.run.train, plan.sizes
    return [
        f"{plan.run.name} on {plan.world} x {plan.gpu.title} ({plan.gpu.memory_gib:g} GiB), ZeRO-{train.zero_stage}, {train.precision}",
        f"batch {train.global_batch} = {plan.world} GPUs x {plan.passes} x {plan.run.micro_batch}; {train.steps} steps",
        f"parameters: {_millions(sizes.trained)} trained, {_millions(sizes.averaged)} of them with a teacher; "
        f"{_millions(sizes.frozen)} frozen, teachers included",
        *(f"note: {note}" for note in plan.notes),
    ]


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"


def memory_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of memory by kind, a column a variant."""
    kinds = list(plan.variants[0].memory.kinds)

    def row(name: str, of: list[str]) -> list[str]:
        return [name, *of]

    rows = [row(kind, [f"{v.memory.kinds[kind] / GIB:.2f}" for v in plan.variants]) for kind in kinds]
    rows.append(row("together", [f"{v.memory.total / GIB:.2f}" for v in plan.variants]))
    rows.append(
        row(
            f"fits {_limit(plan.variants[0].memory):.1f}",
            ["no" if v.memory.problems() else "yes" for v in plan.variants],
        )
    )
    rows.append(row("largest micro-batch", [str(v.largest) for v in plan.variants]))
    return ["", *(v.name for v in plan.variants)], rows


def _limit(memory: Memory) -> float:
    return (memory.free or 0) / GIB


def _memory(plan: Plan) -> list[str]:
    return aligned(*memory_rows(plan))


def step_rows(plan: Plan) -> list[list[str]]:
    """Rows of the table of what a step's time goes to."""
    total = sum(plan.shares.values())
    rows = [[name, f"{1e3 * value:.1f}", f"{value / total:.0%}"] for name, value in plan.shares.items()]
    return [*rows, ["together, without messages", f"{1e3 * total:.1f}", ""]]


def _step(plan: Plan) -> list[str]:
    count = plan.count
    done = sum(w.bytes * n for w, n in count.work.items())
    return [
        f"counted in a micro-batch: {count.flops / 1e12:.2f} TFLOP, {done / 1e9:.1f} GB, {count.operations} operations",
        *aligned(["", "ms", ""], step_rows(plan)),
    ]


def run_facts(plan: Plan) -> dict[str, str]:
    """What the whole run comes to."""
    low, high = plan.rate
    days = [plan.images / rate / 86_400 for rate in (high, low)]
    kwh = [d * 24 * plan.world * plan.gpu.watts / 1e3 for d in days]
    peak = plan.gpu.bf16_tflops if plan.run.train.precision == "bf16" else plan.gpu.tf32_tflops
    if plan.run.train.precision == "fp32":
        peak = plan.gpu.fp32_tflops
    used = high * plan.flops_per_sample / (plan.world * peak * 1e12)
    keep = plan.run.checkpoint.keep
    seen = (
        ""
        if plan.inputs.samples is None
        else f", {plan.images / plan.inputs.samples:.1f} passes over {plan.inputs.samples}"
    )
    return {
        "images/s": f"{_span(low, high)} ({_span(low / plan.world, high / plan.world)} a GPU), MFU {used:.0%} of {peak:g} TFLOP/s",
        "days": f"{_span(*days)} for {plan.images:,} images{seen}",
        "energy": f"{_span(*kwh)} kWh of the GPUs at {plan.gpu.watts:g} W each; their machines and cooling come on top",
        "from storage": f"{high * plan.inputs.sample_bytes / 1e6:.0f} MB/s at {plan.inputs.sample_bytes / 1e3:.1f} kB a sample",
        "checkpoint": f"{plan.sizes.checkpoint / GIB:.2f} GiB every {plan.run.checkpoint.every_steps} steps; with "
        f"checkpoint.keep = {keep} and one being written {(keep + 1) * plan.sizes.checkpoint / GIB:.1f} GiB of disk",
    }  # fmt: skip


def _span(low: float, high: float) -> str:
    a, b = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (low, high))
    return a if a == b else f"{a} to {b}"


def _whole(plan: Plan) -> list[str]:
    return [f"  {name}: {value}" for name, value in run_facts(plan).items()]


def _messages(plan: Plan) -> list[str]:
    rows = []
    for m in plan.messages:
        sent = f"{m.passes * m.bytes / 1e9:.2f}"
        rows.append(
            [
                m.name,
                f"{m.times}",
                sent,
                "yes" if m.hidden else "no",
                f"{1e3 * plan.networks[0].seconds(m, plan.world):.1f}",
            ]
        )
    return aligned(["", "times", "GB each", "beside backward", f"ms on {plan.world}"], rows) if rows else []


def scaling_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of weak scaling."""
    alone = sum(plan.shares.values())
    per_gpu = plan.run.train.global_batch // plan.world
    rows = []
    for row in plan.scaling:
        best, worst = row.step
        rates = [per_gpu * row.world / s for s in (worst, best)]
        rows.append([
            str(row.world), str(-(-row.world // NODE)), f"{per_gpu * row.world}", f"{1e3 * row.seconds:.1f}", _span(*rates),
            f"{alone / worst:.0%} to {alone / best:.0%}", f"{alone / row.one_port:.0%}",
        ])  # fmt: skip
    return ["GPUs", "nodes", "batch", "messages ms", "images/s", "efficiency", "with one 400 Gb/s port a node"], rows


def _scaling(plan: Plan) -> list[str]:
    return aligned(*scaling_rows(plan))


def _assumptions(plan: Plan) -> list[str]:
    gpu = plan.gpu
    return [
        f"  {gpu.title}, data sheet: {gpu.bf16_tflops:g} TFLOP/s bf16, {gpu.tf32_tflops:g} TF32, {gpu.fp32_tflops:g} fp32, "
        f"{gpu.memory_tbs:g} TB/s",
        *(f"  {line}" for line in plan.rates.lines()),
        f"  inside a node {gpu.link_gbs:g} GB/s in one direction a GPU, between nodes {gpu.node_gbits:g} Gb/s a node of {NODE}, of both "
        f"80 %",
        f"  the backward pass, {HIDDEN:.0%} of a step, hides messages at best, nothing hides them at worst",
        f"  {RESERVE:.0%} of the memory is left to context, libraries and fragments; reading and augmentation keep up with the step",
    ]


def aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table for a terminal: the first column on the left, numbers on the right."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return [
        "  "
        + "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def write_page(plan: Plan, path: Path) -> None:
    """Write the plan as a page that needs no network."""
    from armillary.engine.evaluate.page import html

    head, body = memory_rows(plan)
    scaling_head, scaling_body = scaling_rows(plan)
    sections = [
        html.section("Memory of a GPU", "GiB", html.table(head, [("", body)])),
        html.section("A step", "", html.table(["", "ms", "share"], [("", step_rows(plan))])),
        html.section(
            "Weak scaling",
            "The work of a GPU stays, the batch grows.",
            html.card(_scaling_chart(plan)),
            html.table(scaling_head, [("", scaling_body)]),
        ),
        html.section("Assumptions", "", html.lines(*(line.strip() for line in (*plan.notes, *_assumptions(plan))))),
    ]
    title = f"Plan of {plan.run.name}"
    facts = {"GPUs": f"{plan.world} x {plan.gpu.title}", **run_facts(plan)}
    html.write_page(path, title, html.header(title, HINT, facts=facts), sections)


def _scaling_chart(plan: Plan) -> Markup:
    """Images a second a GPU against the number of GPUs: flat where messages cost nothing."""
    from armillary.engine.evaluate.page import figures

    rows = plan.scaling
    per_gpu = plan.run.train.global_batch // plan.world
    worlds = [row.world for row in rows]
    figure, axes = figures.canvas(9.6, 3.0)
    ways = {
        "messages hidden behind the backward pass": [row.step[0] for row in rows],
        "not hidden": [row.step[1] for row in rows],
        "hidden, one network port a node": [row.one_port for row in rows],
    }
    for colour, (name, seconds) in zip(figures.SERIES, ways.items(), strict=False):
        axes.plot(worlds, [per_gpu / s for s in seconds], color=colour, lw=1.8, marker="o", ms=4, label=name)
    alone = per_gpu / sum(plan.shares.values())
    axes.axhline(alone, color=figures.MUTED, lw=1, ls=(0, (4, 3)), label="without messages")
    axes.set_xscale("log", base=2)
    axes.set_xticks(worlds, [str(world) for world in worlds])
    axes.set_ylim(0, 1.3 * alone)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("images/s a GPU")
    axes.legend(frameon=False, ncols=2, labelcolor=figures.INK, loc="upper right")
    return figures.svg(figure)
