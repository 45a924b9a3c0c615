"""Plans: all recipes by one mechanism, arithmetic by hand, what is refused, and the micro-batch that is chosen."""

import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from armillary.engine.plan import auto
from armillary.engine.plan.collectives import Network, collectives
from armillary.engine.plan.counting import Work
from armillary.engine.plan.dry_step import StepCount
from armillary.engine.plan.gpus import GPUS, gpu_named
from armillary.engine.plan.memory import Sizes
from armillary.engine.plan.plan import Need, plan_of
from armillary.engine.plan.report import text
from armillary.engine.plan.roofline import Rates, device_seconds
from armillary.engine.train.start import start

RECIPES = (
    "dinov2_vitl",
    "specformer",
    "astroclip",
    "mmae",
    "mosaic",
    "galaxy_walker_stage1",
    "galaxy_walker_stage2",
    "supervised",
)


def recipe(name):
    return importlib.import_module(f"armillary.recipes.{name}")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan_without_survey_and_gpu(name, tmp_path):
    run = recipe(name).SMOKE
    run = replace(run, data=replace(run.data, path=tmp_path / "nowhere"))
    plan = plan_of(run, "h100", 2)
    said = text(plan)
    assert "note: there is no survey at" in said and "predictions" in said
    assert "on this CPU" not in said  # no step of ours asks its device for numbers
    first = plan.variants[0]
    assert first.memory.kinds["activations"] > 0 and first.largest > run.train.micro_batch
    assert 0 < plan.rate[0] <= plan.rate[1]


def test_frozen_weights_need_not_be_loaded(tmp_path):
    """A checkpoint's folder is enough to plan a method whose base it is, image encoder included."""
    pytest.importorskip("transformers")
    from tiny_vlm import write_checkpoint

    run = recipe("galaxy_walker_stage2").SMOKE
    base = write_checkpoint(tmp_path / "vlm")
    run = replace(run, method=replace(run.method, base=base), data=replace(run.data, path=tmp_path / "nowhere"))
    plan = plan_of(run, "h100", 2)
    assert plan.sizes.frozen > 0 and "on this CPU" not in text(plan)
    assert any(w.name.startswith("triton ") for w in plan.count.work)


def test_the_page_and_the_command(tmp_path, capsys):
    module = recipe("specformer")
    nowhere = f"--data.path={tmp_path}/none"
    page = tmp_path / "plan.html"
    presets = {"smoke": module.SMOKE}
    asked = ["--preset", "smoke", "--plan", "--gpu", "a100-40", "--gpus", "8", nowhere]
    assert start(module.RECIPE, presets, [*asked, "--plan.out", str(page)]) == 0
    assert "specformer_smoke on 8 x A100 (39.4 GiB)" in capsys.readouterr().out
    assert "<svg" in page.read_text() and "Weak scaling" in page.read_text()
    assert start(module.RECIPE, presets, ["--plan", "--gpu", "h1000", nowhere]) == 2
    assert "--gpu: must be one of a10, a100-40" in capsys.readouterr().err


def test_a_batch_that_gpus_cannot_share_is_changed_and_said(tmp_path):
    run = recipe("specformer").SMOKE  # 32 samples a step, 16 at once
    run = replace(run, data=replace(run.data, path=tmp_path))
    grown = plan_of(run, "h100", 5)
    assert grown.run.train.global_batch == 80 and grown.run.train.steps == 360
    assert any("cannot be shared by 5 GPUs, but by 4 or 8" in note for note in grown.notes)
    cut = plan_of(run, "h100", 8)
    assert cut.run.train.micro_batch == 4 and cut.passes == 1


def test_products_of_8_bits_are_counted_where_a_gpu_has_them(tmp_path):
    run = recipe("dinov2_vitl").SMOKE
    vit = replace(run.method.vit, products="fp8", depth=1)
    run = replace(run, method=replace(run.method, vit=vit), data=replace(run.data, path=tmp_path))
    with pytest.raises(
        ValueError, match="method.vit.products: needs a GPU of compute capability 8.9 or later .*got 8.0"
    ):
        plan_of(run, "a100-80", 1)
    plan = plan_of(run, "h100", 1)
    eight = [w for w in plan.count.work if w.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and w.flops]
    assert {w.phase for w in eight} == {"forward", "backward"}
    fast = plan.rates.seconds(replace(eight[0], bytes=0))
    assert plan.rates.seconds(replace(eight[0], bytes=0, dtype=torch.bfloat16)) == pytest.approx(2 * fast)
    assert "(1247 of 8-bit floats)" in text(plan)


def test_what_one_sum_a_step_would_save_is_said(tmp_path):
    run = recipe("specformer").SMOKE  # 32 samples a step, 16 at once
    run = replace(run, data=replace(run.data, path=tmp_path), train=replace(run.train, micro_batch=4))
    often = plan_of(run, "h100", 2)
    assert any("gradients are sent 4 times a step; --train.reduce-once sends them once" in x for x in often.notes)
    once = plan_of(replace(run, train=replace(run.train, reduce_once=True)), "h100", 2)
    assert (often.messages[0].times, once.messages[0].times) == (4, 1) and len(once.notes) < len(often.notes)
    more = once.variants[0].memory.kinds["gradients"] - often.variants[0].memory.kinds["gradients"]
    assert more == 4 * once.sizes.trained
    assert once.shares["gradients into ZeRO"] < often.shares["gradients into ZeRO"]


def test_a_micro_batch_by_hand():
    counts = tuple(StepCount(n, 10 * n, 100 + 50 * n, {}) for n in (2, 4))
    run = SimpleNamespace(
        train=SimpleNamespace(zero_stage=2, precision="fp32", reduce_once=False), data=SimpleNamespace(prefetch=2)
    )
    need = Need.of(run, Sizes(10, 0, 0, 0), 1, counts)
    assert need.fixed == {"frozen weights": 0, "trained weights": 40, "gradients": 40, "optimizer": 120, "buffers": 40}
    assert need.memory(7, None).kinds["activations"] == 450 and need.memory(7, None).kinds["inputs"] == 210
    assert (
        need.largest(240 + 100 + 7 * 80) == 7 and need.largest(240 + 100 + 8 * 80 - 1) == 7 and need.largest(100) == 0
    )


def test_messages_by_hand():
    sums, weights, teacher = collectives(2, 100, 40, 60, 2, 3, 50)
    assert (sums.bytes, sums.passes, sums.times, sums.pieces) == (400, 2, 3, 2)
    assert (weights.bytes, teacher.bytes) == (200, 80)
    assert collectives(2, 100, 40, 60, 2, 3, 50, reduce_once=True)[0].times == 1
    assert [m.bytes for m in collectives(3, 100, 40, 60, 2, 1, 50)] == [320, 200, 400]
    wires = Network(link=1e9, node=2e9)
    big = replace(sums, bytes=8e9, times=1, pieces=1)
    assert wires.seconds(big, 1) == 0
    assert wires.seconds(big, 8) == pytest.approx(2 * 7 / 8 * 8e9 / 0.8e9, rel=1e-3)  # inside a node
    assert wires.seconds(big, 16) == pytest.approx(2 * 15 / 16 * 8e9 / 0.8e9, rel=1e-3)  # the slower of both
    assert Network(1e9, 1e8).seconds(big, 16) == pytest.approx(2 * 15 / 16 * 8e9 / 0.8e8, rel=1e-3)


def test_rooflines_by_hand():
    rates = Rates({torch.bfloat16: 100.0, torch.float32: 10.0}, 0.5, 0.25, 8.0, 0.0)
    work = {
        Work("", "mm", "product", torch.bfloat16, 1000, 8): 2,  # 10 s each
        Work("", "mm", "product", torch.bfloat16, 100, 80): 1,  # limited by its bytes: 10 s
        Work("", "triton", "fused product", torch.bfloat16, 1000, 8): 1,  # 20 s
        Work("", "flash", "attention", torch.float32, 100, 8): 1,  # 40 s
        Work("", "add", "bytes", torch.float32, 0, 16): 3,  # 2 s each
    }
    assert device_seconds(work, rates) == {
        "products": 30, "fused products": 20, "norms, copies, elementwise": 6, "attention": 40,
    }  # fmt: skip
    waited = device_seconds(work, replace(rates, launch_seconds=20.0))
    assert waited["waiting for the host"] == pytest.approx(8 * 20 - 96)


def test_gpus_are_found_by_name():
    assert gpu_named("H100") is GPUS["h100"]
    with pytest.raises(ValueError, match="--gpu: must be one of .*h100, h100-nvl, .*got 'tpu'"):
        gpu_named("tpu")


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """Chooses for the SpecFormer smoke preset where so many bytes are there; run.json is in `out`."""

    def choose(memory, world=1, **train):
        monkeypatch.setattr(auto, "_memory", lambda device: memory)
        run = recipe("specformer").SMOKE
        return auto.with_micro_batch(
            replace(
                run, device="cpu", out=tmp_path, data=replace(run.data, path=tmp_path / "none"),
                train=replace(run.train, micro_batch="auto", **train),
            ), world
        )  # fmt: skip

    return choose


def test_auto_takes_the_largest_that_fits_and_keeps_it(chosen, tmp_path):
    run, said = chosen(2**40)
    assert run.micro_batch == 32 and "auto is 32" in said
    with pytest.raises(ValueError, match="train.micro_batch: no micro-batch fits; memory of a rank in GiB"):
        chosen(2**20)
    with pytest.raises(ValueError, match="must be a multiple of the 3 ranks"):
        chosen(2**40, 3)
    folder = tmp_path / "specformer_smoke"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"run": {"train": {"micro_batch": 8}}}))
    run, said = chosen(2**40)
    assert run.micro_batch == 8 and said.endswith("as this run began")
