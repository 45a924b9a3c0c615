"""Encoders out of checkpoints and files, and into methods."""

import shutil
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import toy
from plain import FACTS, progress, scrambled
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from armillary.engine import user_code
from armillary.engine.data.format.survey import SpectrumRecord, WaveGrid
from armillary.engine.data.views.stretch import ToRGB, ZScore
from armillary.engine.user_code import trust
from armillary.engine.weights import checkpoint
from armillary.engine.weights.export import export_dinov2, export_encoder
from armillary.engine.weights.init_weights import init_encoder, init_method, input_mismatch
from armillary.engine.weights.tensors import Archive
from armillary.engine.weights.trained_encoder import EXPORT, TrainedEncoder
from armillary.engine.weights.verify import SEAL
from armillary.models.method import InputSpec, ParameterGroup

trust("toy", __name__)
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

    def teacher_pairs(self):
        """As DINOv2 has them: none once nothing is trained."""
        return [(s, t) for s, t in super().teacher_pairs() if s.requires_grad]


def opened(path):
    return TrainedEncoder.open(path)


def unsealed(file):
    """The metadata of an open export without its seal, for a file of other tensors."""
    return {name: text for name, text in file.metadata().items() if name != SEAL}


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
    encoder = opened(run.folder)
    method = encoder.method
    assert method is encoder.method
    assert torch.equal(torch.get_rng_state(), random_before)
    assert encoder.run.method.frozen_input and not method.training
    for name, p in method.named_parameters():
        kept = dict(saved.method.named_parameters())[name.replace("student", "teacher")]
        assert torch.equal(p, kept) and not p.requires_grad, name
    assert torch.equal(method.center, saved.method.center)


def test_exported_file_is_enough(run, saved, tmp_path):
    file = tmp_path / "new" / "teacher.safetensors"
    source = opened(run.folder)
    export_encoder(source, file)
    encoder, expected = opened(file), source.method
    x = torch.randn(3, 10, 1, 1)
    assert torch.equal(encoder.method.encode({"crop": x})["features"], expected.encode({"crop": x})["features"])
    assert encoder.pixels == source.pixels == toy.described_survey().pixels()
    assert encoder.inputs == source.inputs == INPUTS
    assert encoder.run == source.run == replace(run, method=replace(run.method, frozen_input=True))
    assert (encoder.path, source.path) == (file, run.folder / "checkpoints" / "step-00000003")
    for opened_here in (encoder, source):
        assert (opened_here.record["step"], opened_here.record["commit"]) == (3, "abc")
    assert not list(file.parent.glob("*.tmp"))
    assert set(load_file(file)) == {n for n in expected.state_dict() if not n.startswith("student")}
    export_encoder(encoder, tmp_path / "again.safetensors")
    again = opened(tmp_path / "again.safetensors")
    assert again.record == encoder.record
    assert all(torch.equal(x, again.weights()[name]) for name, x in encoder.weights().items())


def test_a_record_is_read_without_its_tensors(run, saved, monkeypatch):
    read = []
    monkeypatch.setattr(Archive, "read", lambda *a: read.append(a))
    encoder = opened(run.folder)
    assert encoder.inputs == INPUTS and encoder.run.name == run.name and encoder.pixels.bands and not read


def test_the_untrained_twin_is_drawn_from_the_seed(run, saved):
    before = torch.get_rng_state()
    one, two = (opened(run.folder).untrained().state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    assert not torch.equal(one["student.stem.weight"], opened(run.folder).method.student.stem.weight)


def test_without_checkpoints_the_export_is_taken(run, saved):
    export_encoder(opened(run.folder), run.folder / EXPORT)
    shutil.rmtree(run.folder / "checkpoints")
    assert opened(run.folder).path == run.folder / EXPORT and opened(run.folder).run.name == run.name


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint and no export/teacher.safetensors"):
        opened(tmp_path)
    with pytest.raises(FileNotFoundError, match="none: no such run or file"):
        opened(tmp_path / "none")


def test_files_that_are_no_encoder(run, saved, tmp_path, monkeypatch):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    published = opened(tmp_path / "a.safetensors")
    assert published.is_published and list(published.weights()) == ["a"]
    for action in (lambda: published.method, lambda: export_encoder(published, tmp_path / "x.safetensors")):
        with pytest.raises(ValueError, match=r"a.safetensors: .* record"):
            action()
    export_encoder(opened(run.folder), tmp_path / "b.safetensors")
    with monkeypatch.context() as strict:
        strict.setattr(user_code, "_trusted", {"armillary"})
        with pytest.raises(ValueError, match="b.safetensors: run.method: class toy:ToyConfig is not part of armillary"):
            _ = TrainedEncoder.open(tmp_path / "b.safetensors").method
    tensors = load_file(tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        metadata = unsealed(file)
    for name, change, message in (
        ("c", {"center": None}, "center: not in the file"),
        ("d", {"center": torch.zeros(8)}, r"center: \(8,\) in the file, \(7,\) in the method"),
    ):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(changed, tmp_path / f"{name}.safetensors", metadata)
        with pytest.raises(ValueError, match=f"{name}.safetensors: does not fit the method: {message}"):
            _ = opened(tmp_path / f"{name}.safetensors").method
    for what, text, message in (
        ("run", "{", "record of this exported encoder is damaged"),
        ("run", "[]", "not the record of a run, but of a tuple"),
        ("inputs", None, "its record lacks 'inputs'"),
        ("pixels", "{}", "its record of the training survey is damaged"),
    ):
        changed = {k: v for k, v in (metadata | {what: text}).items() if v is not None}
        save_file(tensors, tmp_path / "e.safetensors", changed)
        with pytest.raises(ValueError, match=message):
            encoder = opened(tmp_path / "e.safetensors")
            _ = encoder.run, encoder.inputs, encoder.pixels


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_dinov2_names_go_out_and_come_in(vit_run, tmp_path, chunks, suffix):
    file = tmp_path / ("backbone" + suffix)
    export_dinov2(opened(vit_run.folder), file, chunks)
    content = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    if chunks and suffix == ".pth":
        assert "dino_head.weight" in content["teacher"]
        content = content["teacher"]
    assert any(k.endswith("blocks.1.3.bias" if chunks else "blocks.3.bias") for k in content)
    fresh = VitConfig().build(INPUTS)
    head = fresh.teacher.dino_head.weight.clone()
    init_method(fresh, opened(file))
    expected = opened(vit_run.folder).method
    for network in (fresh.student, fresh.teacher):
        for (name, p), q in zip(
            network.backbone.named_parameters(), expected.teacher.backbone.parameters(), strict=True
        ):
            assert torch.equal(p, q), name
    with_heads = chunks > 0 and suffix == ".pth"
    assert torch.equal(fresh.teacher.dino_head.weight, expected.teacher.dino_head.weight if with_heads else head)
    assert torch.equal(fresh.student.dino_head.weight, fresh.teacher.dino_head.weight) or not with_heads


def test_heads_of_other_shapes_are_left_out_and_said(vit_run, tmp_path):
    export_dinov2(opened(vit_run.folder), tmp_path / "t.pth", 2)
    content = torch.load(tmp_path / "t.pth", weights_only=True)["teacher"]
    content["dino_head.weight"] = torch.zeros(5, 2)
    torch.save({"teacher": content}, tmp_path / "t.pth")
    fresh = VitConfig().build(INPUTS)
    head = fresh.teacher.dino_head.weight.clone()
    (said,) = init_method(fresh, opened(tmp_path / "t.pth"))
    assert "2 tensors of heads in the file are left out" in said
    assert torch.equal(fresh.teacher.dino_head.weight, head)


def test_of_student_and_teacher_in_one_file_the_teacher_is_taken(vit_run, tmp_path):
    backbone = opened(vit_run.folder).part("image")
    both = {f"teacher.backbone.{k}": v for k, v in backbone.items()}
    both |= {f"student.backbone.{k}": v + 1 for k, v in backbone.items()}
    torch.save({"model": both}, tmp_path / "both.pth")
    fresh = VitConfig().build(INPUTS)
    init_method(fresh, opened(tmp_path / "both.pth"))
    assert all(torch.equal(p, backbone[k]) for k, p in fresh.teacher.backbone.named_parameters())


def test_dinov2_names_need_a_backbone(run, vit_run, tmp_path):
    with pytest.raises(ValueError, match="must end in .safetensors or .pth"):
        export_dinov2(opened(vit_run.folder), tmp_path / "x.bin", 0)
    with pytest.raises(ValueError, match="chunks: must be 0 or divide the depth 4, got 3"):
        export_dinov2(opened(vit_run.folder), tmp_path / "x.pth", 3)
    plain = replace(run, name="plain")
    save(plain)
    with pytest.raises(ValueError, match="Toy has no image encoder"):
        export_dinov2(opened(plain.folder), tmp_path / "x.pth", 0)
    torch.save({"norm.weight": torch.zeros(2)}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match="y.pth: holds none of the names of Toy, and which of its encoders .no."):
        init_method(toy.ToyConfig().build(INPUTS), opened(tmp_path / "y.pth"))


def test_init_takes_the_whole_of_an_encoder_of_our_own(run, saved, tmp_path):
    export_encoder(opened(run.folder), tmp_path / "t.safetensors")
    fresh = toy.ToyConfig(frozen_input=True).build(INPUTS)
    init_method(fresh, opened(tmp_path / "t.safetensors"))
    assert torch.equal(fresh.student.stem.weight, saved.method.teacher.stem.weight)
    assert torch.equal(fresh.center, saved.method.center) and torch.equal(fresh.extra, saved.method.extra)


def test_init_refuses_by_name(run, one_process, tmp_path):
    save(replace(run, method=replace(run.method, frozen_input=True), name="own"))
    export_encoder(opened(run.out / "own"), tmp_path / "own.safetensors")
    with pytest.raises(
        ValueError, match=r"projection.weight: not in the method.*teacher.stem.weight: \(24, 10\) in the"
    ):
        init_method(toy.ToyConfig(width=9).build(INPUTS), opened(tmp_path / "own.safetensors"))
    with pytest.raises(ValueError, match="projection.bias: not in the file"):
        export_encoder_without(run, tmp_path)
    fresh = VitConfig().build(INPUTS)
    torch.save({"backbone.norm.weight": torch.zeros(3), "backbone.extra": torch.zeros(1)}, tmp_path / "p.pth")
    with pytest.raises(ValueError, match="p.pth: state dict does not fit the encoder: norm.weight: shape"):
        init_method(fresh, opened(tmp_path / "p.pth"))


def test_init_takes_an_encoder_of_our_own_with_a_teacher(vit_run, tmp_path):
    """From the run's folder, its export, and an older export, which holds the students too."""
    source = opened(vit_run.folder)
    export_encoder(source, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("student")]
        older = {name: x.clone() for name, x in source.method.state_dict().items()}
        save_file(older, tmp_path / "older.safetensors", unsealed(file))
    for path in (vit_run.folder, tmp_path / "new.safetensors", tmp_path / "older.safetensors"):
        fresh = VitConfig().build(INPUTS)
        init_method(fresh, opened(path))
        for method in (fresh, opened(path).method):
            assert all(torch.equal(x, source.method.state_dict()[name]) for name, x in method.state_dict().items())


@dataclass(frozen=True)
class Seen:
    """What `init_encoder` asks of a run's views."""

    stretch: object
    modalities: tuple[str, ...] = ("image",)


def test_an_encoder_starts_from_an_earlier_run(vit_run, tmp_path):
    survey, views, expected = toy.described_survey(), Seen(ToRGB()), opened(vit_run.folder).method
    for name in ("run", "export", "published"):
        source = vit_run.folder if name == "run" else tmp_path / f"{name}.safetensors"
        if name == "export":
            export_encoder(opened(vit_run.folder), source)
        elif name == "published":
            export_dinov2(opened(vit_run.folder), source, 2)
        fresh = VitConfig().build(INPUTS)
        kept = fresh.teacher.dino_head.weight.clone()
        init_encoder(fresh, "image", opened(source), views, survey)
        for p, q in zip(fresh.teacher.backbone.parameters(), expected.teacher.backbone.parameters(), strict=True):
            assert torch.equal(p, q), name
        assert torch.equal(fresh.teacher.dino_head.weight, kept)


def test_an_encoder_is_shown_what_it_was_trained_on(vit_run):
    survey, fresh, encoder = toy.described_survey(), VitConfig().build(INPUTS), opened(vit_run.folder)
    with pytest.raises(ValueError, match="step-00000003: unit: the encoder was trained on "):
        init_encoder(fresh, "image", encoder, Seen(ToRGB()), replace(survey, unit="jansky"))
    assert encoder.method
    encoder.run = SimpleNamespace(views=Seen(ZScore()))
    init_encoder(fresh, "image", encoder, Seen(ZScore()), survey)
    with pytest.raises(ValueError, match="stretch: must be that of its training, ZScore.*, got ToRGB"):
        init_encoder(fresh, "image", encoder, Seen(ToRGB()), survey)
    other = replace(survey, statistics=replace(survey.statistics, std=(*survey.statistics.std, 2.0)))
    with pytest.raises(ValueError, match="gives other numbers on this survey"):
        init_encoder(fresh, "image", encoder, Seen(ZScore()), other)


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
    with pytest.raises(ValueError, match="Toy has no image encoder"):
        init_encoder(VitConfig().build(INPUTS), "image", opened(run.folder), Seen(ToRGB()), toy.described_survey())


def export_encoder_without(run, tmp_path):
    plain = replace(run, name="plain")
    save(plain)
    export_encoder(opened(plain.folder), tmp_path / "plain.safetensors")
    init_method(toy.ToyConfig(frozen_input=True).build(INPUTS), opened(tmp_path / "plain.safetensors"))


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
        ("text.safetensors", "not a readable safetensors file"),
        ("list.pth", "a dictionary of tensors, got a list"),
    ):
        with pytest.raises(ValueError, match=message):
            init_method(VitConfig().build(INPUTS), opened(tmp_path / name))
    assert capsys.readouterr().out == ""
