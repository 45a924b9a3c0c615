"""Records of runs: command line, rules, JSON."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy

from armillary.engine import user_code
from armillary.engine.config.config_json import differences, from_json, packages_of, to_json, type_problems
from armillary.engine.config.run import Data, Run
from armillary.engine.config.schedule import Schedules
from armillary.engine.plan.memory import Sizes
from armillary.engine.train import start as start_module
from armillary.engine.train.checks import method_problems, problems, space_problems
from armillary.engine.train.start import EXIT_BAD_INPUT, start
from armillary.engine.user_code import trust
from armillary.models.method import InputSpec

trust("toy", __name__)


@pytest.fixture
def started(monkeypatch):
    """Runs that would have been trained."""
    runs = []

    def record(run, **options):
        runs.append((run, options))
        return 0

    monkeypatch.setattr(start_module, "run_to_exit_code", record)
    return runs


def test_every_field_is_overridden_from_the_command_line(run, started):
    arguments = "--optim.lr 1e-4 --method.width 48 --views.channels 10 --schedule.weight-decay.end 0.2 --data.threads 5"
    arguments += " --optim.clip-norm None --train.compile --local_rank=3 --seed 9"
    assert start(run, {}, arguments.split()) == 0
    got = started[0][0]
    assert (got.optim.lr, got.method.width, got.data.threads, got.seed) == (1e-4, 48, 5, 9)
    assert got.schedule.weight_decay.end == 0.2 and got.optim.clip_norm is None and got.train.compile
    assert got.schedule.teacher_temperature == run.schedule.teacher_temperature


def test_a_preset_is_chosen_and_then_changed(run, started):
    small = replace(run, name="small", method=toy.ToyConfig(width=5))
    assert start(run, {"smoke": small}, ["--preset", "smoke", "--train.steps", "3"]) == 0
    got, options = started[0]
    assert got.name == "small" and got.method.width == 5 and got.train.steps == 3
    assert options == {"restore": None, "init_from": None, "open_loader": None}


def test_an_encoder_of_the_hub_need_not_be_here(run, started):
    assert start(run, {}, ["--init-from", "hf://me/mine/model.safetensors"]) == 0
    assert str(started[0][1]["init_from"]) == "hf:/me/mine/model.safetensors"
    assert start(run, {}, ["--restore", "hf://me/mine/model.safetensors"]) == 2


def test_of_a_flag_given_twice_the_last_one_counts_and_it_is_said(run, started, capsys):
    assert start(run, {}, ["--train.steps", "3", "--optim.lr", "1e-3", "--train.steps=5"]) == 0
    assert started[0][0].train.steps == 5
    assert "--train.steps is given more than once: the last one counts" in capsys.readouterr().err


def test_help_explains_fields(run, started, capsys):
    assert start(run, {"smoke": run}, ["--help"]) == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "Peak learning rate" in text and "--method.width" in text and "Hidden units" in text
    assert "--preset {smoke}" in text and "--restore" in text and not started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optim.learning 3", "--optim.learning"),
        ("--train.steps many", "invalid literal"),
        ("--preset big", "invalid choice: 'big'"),
        ("--train.precision fp16", "fp16"),
        ("--restore /nowhere", "--restore: must be an existing file, got /nowhere"),
        ("--init-from /nowhere", "--init-from: must be an existing file, got /nowhere"),
    ],
)
def test_bad_arguments_end_with_2(run, started, capsys, arguments, message):
    assert start(run, {"smoke": run}, arguments.split()) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err and not started


def test_only_rank_0_speaks(run, started, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(start_module.time, "sleep", lambda _: None)
    assert start(run, {}, ["--nonsense", "1"]) == start(run, {}, ["--seed", "-1"]) == EXIT_BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_all_problems_are_told_at_once(run, capsys):
    changes = "--seed -1 --optim.lr 0 --optim.eps nan --optim.betas 0.9 1.0 --train.steps 0 --checkpoint.keep 0"
    changes += " --schedule.ema-momentum.end 2 --views.channels 9 --data.split dev --name a/b --train.global-batch 7"
    assert start(run, {}, changes.split()) == EXIT_BAD_INPUT
    text = capsys.readouterr().err
    for rule in (
        "seed: must be in 0 .. 2^64 - 1, got -1",
        "optim.lr: must be a finite number > 0, got 0.0",
        "optim.eps: must be a finite number > 0, got nan",
        "optim.betas: must be two numbers, 0 <= beta < 1, got (0.9, 1.0)",
        "train.steps: must be a finite number >= 1, got 0",
        "checkpoint.keep: must be a finite number >= 1, got 0",
        "schedule.ema_momentum.end: must be in [0, 1], got 2.0",
        "views.channels: 10, got 9",
        "data.split: must be one that the survey has (train), got 'dev'",
        "name: must be of letters, digits",
        "train.global_batch: must be a multiple of micro_batch * ranks = 2 * 1 = 2, got 7",
    ):
        assert rule in text


def test_a_good_run_has_no_problems(run):
    assert problems(run, 1) == problems(run, 2) == problems(run, 4) == []


def test_bf16_is_not_accumulated_under_stage_1(run):
    half = replace(run, train=replace(run.train, precision="bf16", zero_stage=1))
    (found,) = problems(half, 2)
    assert found.startswith("train.zero_stage: must be 2 or 3 for bf16 with several micro-batches")
    assert problems(half, 4) == []  # one micro-batch a step


@pytest.mark.parametrize("name", ["..", ".", "", "a b", "/etc"])
def test_names_that_are_no_folder(run, name):
    assert any(p.startswith("name:") for p in problems(replace(run, name=name), 1))


def test_method_rules_carry_their_section(run):
    assert problems(replace(run, method=toy.ToyConfig(width=0)), 1) == ["method.width: above 0, got 0"]


def test_wrong_types_from_a_recipe(run):
    wrong = replace(run, train=replace(run.train, steps="8", zero_stage=4), data=replace(run.data, path="survey"))
    found = problems(replace(wrong, optim=replace(run.optim, betas=[0.9, 0.99])), 1)
    assert "train.steps: must be a whole number, got '8'" in found
    assert "train.zero_stage: must be one of 1, 2, 3, got 4" in found
    assert "data.path: must be Path, got 'survey'" in found
    assert "optim.betas: must be a tuple of a number, a number, got [0.9, 0.99]" in found
    assert type_problems(replace(run.train, steps=True)) == ["steps: must be a whole number, got True"]
    assert type_problems(replace(run.optim, lr=1)) == []


def test_missing_survey(run, tmp_path):
    found = problems(replace(run, data=Data(tmp_path / "none")), 1)
    assert len(found) == 1 and "data.path: must be a packed survey" in found[0] and "armillary data build" in found[0]


@pytest.mark.parametrize(("damage", "said"), [("unlink", "is missing"), ("grow", "has 4 of 1 bytes")])
def test_shards_that_are_not_whole_are_found_before_the_start(run, damage, said):
    shard = run.data.path / "train-000000.tar"
    shard.unlink() if damage == "unlink" else shard.write_bytes(b"grow")
    (found,) = problems(run, 1)
    assert found.startswith("data.path: must have all shards of split 'train' whole, but train-000000.tar " + said)


def test_too_few_samples(run, tmp_path):
    few = replace(run, data=Data(toy.toy_survey(tmp_path / "few", count=5)))
    assert problems(few, 1) == ["train.global_batch: must be at most the 5 samples of the split, got 8"]


@pytest.mark.parametrize("smoke", [True, False])
def test_no_gpu_points_to_the_way_out(run, monkeypatch, smoke):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = problems(replace(run, device="auto"), 1, smoke)
    assert found.startswith("device: must be a CUDA device, got none") and "`--device cpu`" in found
    assert ("--preset smoke" in found) == smoke


@pytest.mark.parametrize(("shown", "said"), [("3", False), (None, True), ("2,3", True)])
def test_each_rank_needs_a_gpu_unless_it_is_shown_its_own(run, monkeypatch, shown, said):
    """Four ranks of a machine that see one GPU each, as with Slurm's --gpus-per-task=1, or one and two for all."""
    gpus = 1 if shown is None else shown.count(",") + 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    if shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    found = [p for p in problems(replace(run, device="cuda"), 4) if p.startswith("device:")]
    assert found == ([f"device: must have a GPU for each of the 4 ranks on this machine, got {gpus}"] if said else [])


def test_kernels_on_a_cpu_are_for_tests(run, monkeypatch):
    there = replace(run, optim=replace(run.optim, impl="triton"))
    assert problems(there, 1) == []  # the tests interpret them
    monkeypatch.delenv("TRITON_INTERPRET")
    assert problems(there, 1) == ["optim.impl: must be auto or reference on a CPU, got 'triton'"]


def test_out_must_be_a_folder(run, tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = problems(replace(run, out=tmp_path / "file" / "runs"), 1)
    assert found.startswith("out: must be a folder that can be written to")


def test_schedules_and_parameters_that_the_method_needs(run):
    method = run.method.build(InputSpec(channels=10, global_size=1))
    assert method_problems(run, method) == []
    bare = replace(run, schedule=Schedules())
    method.scalar = torch.nn.Parameter(torch.zeros(()))
    found = method_problems(bare, method)
    assert [p.split(":")[0] for p in found[:2]] == ["schedule.teacher_temperature", "schedule.ema_momentum"]
    assert "scalar must have at least one dimension" in found[2] and "scalar: is in no group" in found[3]


def test_disk_space(run):
    method = run.method.build(InputSpec(channels=10, global_size=1))
    size = Sizes.of(method).checkpoint
    students = sum(p.numel() for p in method.student.parameters())
    assert size == 16 * students + 12 * 3
    enough = SimpleNamespace(free=3 * size)  # keep = 2, and the one being written
    assert space_problems(run, method, lambda _: enough) == []
    (found,) = space_problems(run, method, lambda _: SimpleNamespace(free=3 * size - 1))
    assert found.startswith("out: ") and "checkpoint.keep = 2" in found
    for step in (1, 2):
        (run.folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert space_problems(run, method, lambda _: SimpleNamespace(free=size)) == []


def test_records_come_back_as_they_were(run, tmp_path):
    run.save(tmp_path / "run.json", commit="abc")
    assert Run.load(tmp_path) == Run.load(tmp_path / "run.json") == run
    assert json.loads((tmp_path / "run.json").read_text())["commit"] == "abc"
    assert packages_of(to_json(run)) == ("armillary", "toy")


def test_only_trusted_packages_are_imported(run, tmp_path, monkeypatch):
    monkeypatch.setattr(user_code, "_trusted", {"armillary"})
    run.save(tmp_path / "run.json")
    with pytest.raises(ValueError, match=r"run.method: class toy:ToyConfig is not part of armillary; .*--package toy"):
        Run.load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["run"]["optim"].update(lrr=1), "run.optim: Optim has no field lrr"),
        (lambda d: d["run"]["train"].pop("steps"), "run.train: Training needs steps"),
        (lambda d: d["run"]["method"].update({"$type": "toy:Nothing"}), "toy:Nothing: there is no Nothing in toy"),
        (lambda d: d["run"]["method"].update({"$type": "toy:digest"}), "toy:digest must be a dataclass"),
        (lambda d: d["run"].update({"$type": "armillary.engine.config.run:Optim", "lr": 1}), "has no field"),
        (lambda d: d.pop("run"), "not the record of a run"),
    ],
)
def test_broken_records_are_refused(run, tmp_path, edit, message):
    run.save(tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text())
    edit(content)
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Run.load(tmp_path)


def test_records_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="run.json once the run has started"):
        Run.load(tmp_path / "run.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not the record of a run"):
        Run.load(tmp_path)


@dataclass(frozen=True)
class Holder:
    values: tuple[int, ...] = (1, 2)
    table: dict[str, float] | None = None
    where: Path | None = None


def test_json_of_odd_values():
    for value in (Holder(), Holder((), {"a": 0.5}, Path("/x"))):
        assert from_json(json.loads(json.dumps(to_json(value)))) == value
    with pytest.raises(TypeError, match="set: a run's fields hold"):
        to_json(Holder({1}))


def test_differences_name_fields(run):
    other = replace(run, optim=replace(run.optim, lr=1.0), out=Path("elsewhere"), schedule=Schedules())
    found = differences(to_json(run), to_json(other))
    assert found["optim.lr"] == (0.02, 1.0) and found["out"][1] == "elsewhere"
    assert "schedule.weight_decay" in found and "seed" not in found


def test_a_field_that_an_older_record_lacks_had_its_default(run):
    old = to_json(run)
    del old["train"]["reduce_once"], old["train"]["steps"]
    assert differences(old, to_json(run)) == {"train.steps": (None, run.train.steps)}  # which has no default
    once = replace(run, train=replace(run.train, reduce_once=True))
    assert differences(old, to_json(once))["train.reduce_once"] == (False, True)


def test_learning_rate_scales_with_the_root_of_the_batch(run):
    optim = replace(run.optim, lr=1e-3, lr_reference_batch=1024)
    assert optim.peak_lr(4096) == pytest.approx(2e-3)
    assert replace(optim, lr_reference_batch=None).peak_lr(4096) == 1e-3
