"""Counted against measured: memory and FLOPs of real steps on a CPU, and what a GPU's code path says of itself on meta tensors."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from armillary.engine.plan.counting import Counting
from armillary.engine.plan.dry_step import DryStep
from armillary.engine.plan.gpus import GPUS
from armillary.engine.plan.inputs import example_batch, inputs_of, prepared_batch
from armillary.engine.plan.memory import Sizes
from armillary.engine.plan.plan import Need


def smoke(recipe):
    return importlib.import_module(f"armillary.recipes.{recipe}").SMOKE


def measured(step, samples):
    """(peak of live bytes beside what was there, FLOPs) of a real step, by PyTorch's own profiler and counter."""
    batch = prepared_batch(step.method, example_batch(step.inputs, samples))
    with (
        FlopCounterMode(display=False) as counter,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace,
    ):
        step.method(batch, step.run.scalars(0)).total.backward()
    live = peak = 0
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, counter.get_total_flops()


@pytest.mark.parametrize("recipe", ["dinov2_vitl", "specformer"])
def test_memory_and_flops_foretold_from_small_batches_are_those_measured(recipe):
    run = smoke(recipe)
    step = DryStep(run, inputs_of(run), None)
    small, large = step.count(3), step.count(6)
    need = Need.of(run, Sizes.of(step.method), 1, (small, large))
    peak, flops = measured(step, 12)
    foretold = need.memory(12, None).kinds["activations"]
    assert foretold == pytest.approx(peak, rel=0.1)
    assert 2 * large.flops == pytest.approx(flops, rel=0.1)


def test_a_step_on_a_gpu_that_is_not_there():
    run = smoke("dinov2_vitl")
    run = replace(run, train=replace(run.train, precision="bf16"))
    step = DryStep(run, inputs_of(run), GPUS["h100"])
    count = step.count(8)
    names = {w.name for w in count.work}
    kinds = {w.kind for w in count.work if w.flops}
    assert any(n.startswith("triton ") for n in names) and {"product", "fused product", "attention"} <= kinds
    # without attention, whose blocks are padded to twice these sequences and which is 6 % of the model's FLOPs
    products = sum(w.flops * n for w, n in count.work.items() if w.kind != "attention")
    assert products == pytest.approx(8 * step.method.flops_per_sample(), rel=0.1)
    assert not torch.empty(1, device="meta").is_cuda  # nothing of the pretence is left


def test_live_memory_and_work_by_hand():
    layer = nn.Linear(100, 50, bias=False, device="meta")
    x = torch.empty(8, 100, device="meta")
    counting = Counting()
    with counting:
        counting.restart(layer.weight, x)
        held = counting.peak
        y = layer(x).relu()
        loss = y.sum()
        loss.backward()
    rows = -(-8 * 50 * 4 // 512) * 512
    weight = -(-100 * 50 * 4 // 512) * 512
    # output, its relu, the sum and its gradient; then the gradient of relu beside that of the weight
    assert held == weight + 3584 and rows + weight <= counting.peak - held <= 3 * rows + weight + 2048
    ((product, times),) = [(w, n) for w, n in counting.work.items() if w.kind == "product"]  # of output and gradient
    assert product.flops == 2 * 8 * 100 * 50 and times == 2
    assert product.bytes == 4 * (8 * 100 + 100 * 50 + 8 * 50)
