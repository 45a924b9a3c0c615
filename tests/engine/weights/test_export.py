"""Encoders out of checkpoints and files, and into methods."""

import json
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import toy
from plain import FACTS, progress, scrambled
from safetensors.torch import load_file, save_file
from torch import nn

from armillary.engine.data.format.survey import SpectrumRecord, WaveGrid
from armillary.engine.data.views.stretch import ToRGB, ZScore
from armillary.engine.weights import checkpoint
from armillary.engine.weights import init_weights as initial_module
from armillary.engine.weights.checkpoint import CheckpointError
from armillary.engine.weights.export import (
    export_dinov2,
    export_encoder,
    load_encoder,
    trained_inputs,
    trained_pixels,
)
from armillary.engine.weights.init_weights import fill_encoder, init_from_file, input_mismatch
from armillary.models.method import InputSpec, ParameterGroup

PACKAGES = ("armillary", "toy", "tests")
INPUTS = InputSpec(channels=10, global_size=1)


@dataclass(frozen=True)
class VitConfig(toy.ToyConfig):
    """A toy whose encoder has a backbone with DINOv2's names."""

    def build(self, inputs):
        return Vit(self, inputs)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"blocks": nn.ModuleList([nn.Linear(2, 2) for _ in range(4)]), "norm": nn.LayerNorm(2)}
        )
        self.dino_head = nn.Linear(2, 3)


class Vit(toy.Toy):
    def __init__(self, config, inputs):
        super().__init__(config, inputs)
        self.student, self.teacher = Network(), Network().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())

    def parameter_groups(self):
        return [ParameterGroup({n: p for n, p in self.named_parameters() if p.requires_grad})]

    def encoders(self):
        return {"image": "teacher.backbone."}


def save(run):
    layout = scrambled(run)
    layout.refresh_teacher()
    checkpoint.save(run.folder / "checkpoints", layout, progress(), run, FACTS)
    run.save(run.folder / "run.json")
    return layout


@pytest.fixture
def saved(run, one_process):
    return save(replace(run, method=replace(run.method, frozen_input=True)))


@pytest.fixture
def vit_run(run, one_process):
    run = replace(run, method=VitConfig())
    save(run)
    return run


def test_encoder_of_a_checkpoint_is_the_average_in_float32(run, saved):
    random_before = torch.get_rng_state()
    method, loaded = load_encoder(run.folder, PACKAGES)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert loaded.method.frozen_input and not method.training
    for name, p in method.named_parameters():
        kept = dict(saved.method.named_parameters())[name.replace("student", "teacher")]
        assert torch.equal(p, kept) and not p.requires_grad, name
    assert torch.equal(method.center, saved.method.center)


def test_exported_file_is_enough(run, saved, tmp_path):
    file = tmp_path / "new" / "teacher.safetensors"
    export_encoder(run.folder, file, PACKAGES)
    method, loaded = load_encoder(file, PACKAGES)
    expected, _ = load_encoder(run.folder, PACKAGES)
    x = torch.randn(3, 10, 1, 1)
    assert torch.equal(method.encode({"crop": x})["features"], expected.encode({"crop": x})["features"])
    assert trained_pixels(file) == trained_pixels(run.folder) == toy.described_survey().pixels()
    assert trained_inputs(file) == trained_inputs(run.folder) == INPUTS
    assert loaded.name == run.name and not list(file.parent.glob("*.tmp"))
    assert set(load_file(file)) == {n for n in expected.state_dict() if not n.startswith("student")}


def test_without_checkpoints_the_export_is_taken(run, saved):
    export_encoder(run.folder, run.folder / "export" / "teacher.safetensors", PACKAGES)
    (run.folder / "checkpoints" / "latest").unlink()
    assert load_encoder(run.folder, PACKAGES)[1].name == run.name
    with pytest.raises(CheckpointError, match="no checkpoint to export"):
        export_encoder(run.folder, run.folder / "x", PACKAGES)


def test_nothing_there(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint and no exported encoder"):
        load_encoder(tmp_path)


def test_files_that_are_no_encoder(run, saved, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not an encoder exported by armillary"):
        load_encoder(tmp_path / "a.safetensors")
    export_encoder(run.folder, tmp_path / "b.safetensors", PACKAGES)
    with pytest.raises(ValueError, match="class toy:ToyConfig is outside armillary"):
        load_encoder(tmp_path / "b.safetensors")
    tensors = load_file(tmp_path / "b.safetensors")
    del tensors["center"]
    described = {"run": json.dumps(json.loads((run.folder / "run.json").read_text())["run"])}
    described["inputs"] = json.dumps(FACTS["inputs"])
    save_file(tensors, tmp_path / "c.safetensors", described)
    with pytest.raises(ValueError, match="lacks center"):
        load_encoder(tmp_path / "c.safetensors", PACKAGES)
    tensors["center"] = torch.zeros(8)
    save_file(tensors, tmp_path / "d.safetensors", described)
    with pytest.raises(ValueError, match="center: .8,. in the file, .7,. in the method"):
        load_encoder(tmp_path / "d.safetensors", PACKAGES)


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_dinov2_names_go_out_and_come_in(vit_run, tmp_path, chunks, suffix):
    file = tmp_path / ("backbone" + suffix)
    export_dinov2(vit_run.folder, file, chunks, PACKAGES)
    content = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    if chunks and suffix == ".pth":
        assert "dino_head.weight" in content["teacher"]
        content = content["teacher"]
    assert any(k.endswith("blocks.1.3.bias" if chunks else "blocks.3.bias") for k in content)
    fresh = VitConfig().build(INPUTS)
    head = fresh.teacher.dino_head.weight.clone()
    init_from_file(fresh, file)
    expected, _ = load_encoder(vit_run.folder, PACKAGES)
    for network in (fresh.student, fresh.teacher):
        for (name, p), q in zip(
            network.backbone.named_parameters(), expected.teacher.backbone.parameters(), strict=True
        ):
            assert torch.equal(p, q), name
    assert torch.equal(fresh.teacher.dino_head.weight, head)


def test_dinov2_names_need_a_backbone(run, vit_run, tmp_path):
    with pytest.raises(ValueError, match="ending in .safetensors or .pth"):
        export_dinov2(vit_run.folder, tmp_path / "x.bin", 0, PACKAGES)
    with pytest.raises(ValueError, match="chunks: must be 0 or divide the depth 4, got 3"):
        export_dinov2(vit_run.folder, tmp_path / "x.pth", 3, PACKAGES)
    plain = replace(run, name="plain")
    save(plain)
    with pytest.raises(ValueError, match="Toy has no image encoder, so no DINOv2 names"):
        export_dinov2(plain.folder, tmp_path / "x.pth", 0, PACKAGES)
    torch.save({"norm.weight": torch.zeros(2)}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match="Toy has no encoders and none of the file's names"):
        init_from_file(toy.ToyConfig().build(INPUTS), tmp_path / "y.pth")


def test_init_takes_the_whole_of_an_encoder_of_our_own(run, saved, tmp_path):
    export_encoder(run.folder, tmp_path / "t.safetensors", PACKAGES)
    fresh = toy.ToyConfig(frozen_input=True).build(INPUTS)
    init_from_file(fresh, tmp_path / "t.safetensors")
    assert torch.equal(fresh.student.stem.weight, saved.method.teacher.stem.weight)
    assert torch.equal(fresh.center, saved.method.center) and torch.equal(fresh.extra, saved.method.extra)


def test_init_refuses_by_name(run, one_process, tmp_path):
    save(replace(run, method=replace(run.method, frozen_input=True), name="own"))
    export_encoder(run.out / "own", tmp_path / "own.safetensors", PACKAGES)
    with pytest.raises(
        ValueError, match=r"projection.weight: not in the method.*teacher.stem.weight: \(24, 10\) in the"
    ):
        init_from_file(toy.ToyConfig(width=9).build(INPUTS), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="projection.bias: not in the file"):
        export_encoder_without(run, tmp_path)
    fresh = VitConfig().build(INPUTS)
    torch.save({"backbone.norm.weight": torch.zeros(3), "backbone.extra": torch.zeros(1)}, tmp_path / "p.pth")
    with pytest.raises(ValueError, match="p.pth: state dict does not fit the encoder: norm.weight: shape"):
        init_from_file(fresh, tmp_path / "p.pth")


@dataclass(frozen=True)
class Seen:
    """What `fill_encoder` asks of a run's views."""

    stretch: object
    modalities: tuple[str, ...] = ("image",)


def test_an_encoder_starts_from_an_earlier_run(vit_run, tmp_path):
    expected, _ = load_encoder(vit_run.folder, PACKAGES)
    survey, views = toy.described_survey(), Seen(ToRGB())
    for name in ("run", "export", "published"):
        source = vit_run.folder if name == "run" else tmp_path / f"{name}.safetensors"
        if name == "export":
            export_encoder(vit_run.folder, source, PACKAGES)
        elif name == "published":
            export_dinov2(vit_run.folder, source, 2, PACKAGES)
        fresh = VitConfig().build(INPUTS)
        kept = fresh.teacher.dino_head.weight.clone()
        fill_encoder(fresh, "image", source, views, survey, PACKAGES)
        for p, q in zip(fresh.teacher.backbone.parameters(), expected.teacher.backbone.parameters(), strict=True):
            assert torch.equal(p, q), name
        assert torch.equal(fresh.teacher.dino_head.weight, kept)


def test_an_encoder_is_shown_what_it_was_trained_on(vit_run, tmp_path, monkeypatch):
    survey, fresh = toy.described_survey(), VitConfig().build(INPUTS)
    fill = partial(fill_encoder, fresh, "image", packages=PACKAGES)
    with pytest.raises(FileNotFoundError, match="image encoder: .*nowhere: no such run or file; train it first"):
        fill(tmp_path / "nowhere", Seen(ToRGB()), survey)
    with pytest.raises(ValueError, match="image encoder: .*: unit: the encoder was trained on "):
        fill(vit_run.folder, Seen(ToRGB()), replace(survey, unit="jansky"))
    real = load_encoder
    views = Seen(ZScore())
    monkeypatch.setattr(initial_module, "load_encoder", lambda *a: (real(*a)[0], SimpleNamespace(views=views)))
    fill(vit_run.folder, Seen(ZScore()), survey)
    with pytest.raises(ValueError, match="stretch: must be that of its training, ZScore.*, got ToRGB"):
        fill(vit_run.folder, Seen(ToRGB()), survey)
    other = replace(survey, statistics=replace(survey.statistics, std=(*survey.statistics.std, 2.0)))
    with pytest.raises(ValueError, match="gives other numbers on this survey"):
        fill(vit_run.folder, Seen(ZScore()), other)


def test_spectra_on_another_grid_are_refused():
    def survey(**grid):
        record = SpectrumRecord(WaveGrid(**{"kind": "linear", "start": 3600.0, "step": 0.8, "count": 7781} | grid), "f")
        return replace(toy.described_survey(), spectrum=record)

    assert input_mismatch(survey(), survey(), ("spectrum",)) == ""
    assert input_mismatch(survey(), survey(count=9), ("image",)) == ""
    assert (
        input_mismatch(survey(), survey(count=9), ("spectrum",))
        == "spectrum.grid: the encoder was trained on 7781 pixels from 3600.0 to 9824.0 angstrom (linear), this survey has 9 "
        "pixels from 3600.0 to 3606.4 angstrom (linear)"
    )


def test_an_earlier_run_without_the_encoder_is_refused(run, saved):
    with pytest.raises(ValueError, match="is a run of Toy, which has none"):
        fill_encoder(VitConfig().build(INPUTS), "image", run.folder, Seen(ToRGB()), toy.described_survey(), PACKAGES)


def export_encoder_without(run, tmp_path):
    plain = replace(run, name="plain")
    save(plain)
    export_encoder(plain.folder, tmp_path / "plain.safetensors", PACKAGES)
    init_from_file(toy.ToyConfig(frozen_input=True).build(INPUTS), tmp_path / "plain.safetensors")


class Trap:
    def __reduce__(self):
        return (print, ("a pickle was run",))


def test_pickles_that_run_code_are_refused(tmp_path, capsys):
    torch.save({"norm.weight": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1], tmp_path / "list.pth")
    for name, message in (
        ("trap.pth", r"pickled code \(refused\): 'norm.weight' is of __builtin__.print"),
        ("text.pth", "nor an older one that holds tensors only"),
        ("text.safetensors", "not a safetensors file"),
        ("list.pth", "a dictionary of tensors, got a list"),
    ):
        with pytest.raises(ValueError, match=message):
            init_from_file(VitConfig().build(INPUTS), tmp_path / name)
    assert capsys.readouterr().out == ""
