"""Whole runs in real processes: stages agree, failures end as documented, nothing is lost."""

import json
import os
import signal
import time

import psutil
import pytest
import torch
import toy
from safetensors.torch import load_file

from armillary.engine.user_code import trust
from armillary.engine.weights.portable import export_portable
from armillary.engine.weights.resume import open_archive
from armillary.engine.weights.trained_encoder import TrainedEncoder

pytestmark = [pytest.mark.dist, pytest.mark.slow]
trust("toy")


def losses(site, name):
    return [line["loss"] for line in site.metrics(name)]


def test_a_run_writes_what_it_promises(site, reference):
    name, ended = reference
    folder = site.runs / name
    lines = site.metrics(name)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"loss", "loss_max", "cross", "extra", "grad_norm/all", "grad_norm/head", "learning_rate", "weight_decay",
            "ema_momentum", "teacher_temperature", "images_per_s", "mfu", "data_wait", "peak_gib", "skipped"} <= set(lines[0])  # fmt: skip
    assert "monitor/center" in lines[3] and "monitor/center" not in lines[2]
    assert all(line["loss_max"] >= line["loss"] for line in lines)
    assert site.latest(name) == "step-00000008"
    record = json.loads((folder / "run.json").read_text())
    assert record["world"] == 2 and record["versions"]["torch"] and record["inputs"]["channels"] == 10
    assert "step 8/8" in ended.output and ended.output.count("MFU is of") == 1
    encoder = TrainedEncoder.open(folder)
    method, run = encoder.method, encoder.run
    exported = load_file(folder / "export" / "teacher.safetensors")
    assert run.train.steps == 8
    torch.testing.assert_close(exported["teacher.stem.weight"], method.teacher.stem.weight, rtol=0, atol=0)
    assert not any(key.startswith("student") for key in exported) and "center" in exported and "extra" in exported
    assert method.encode({"crop": torch.zeros(2, 10, 1, 1)})["features"].shape == (2, 7)


@pytest.mark.parametrize(("stage", "impl"), [(1, "auto"), (3, "auto"), (2, "triton"), (3, "triton")])
def test_stages_and_optimizers_train_alike(site, reference, stage, impl):
    name = f"stage{stage}-{impl}"
    words = ("--name", name, "--train.zero-stage", str(stage), "--optim.impl", impl)
    ended = site.go(*words, at_once=False, TRITON_INTERPRET="1")
    assert ended.code == 0, ended.output
    torch.testing.assert_close(
        torch.tensor(losses(site, name)), torch.tensor(losses(site, reference[0])), rtol=1e-6, atol=1e-6
    )
    first, second = (open_archive(site.checkpoint(n, 8))[0] for n in (name, reference[0]))
    assert set(first.pieces) == set(second.pieces)
    for key in first.pieces:
        if not key.startswith("rng/"):
            torch.testing.assert_close(first.whole(key), second.whole(key), rtol=1e-5, atol=1e-6, msg=key)


def test_death_inside_a_save_loses_nothing(site, reference):
    name = "killed"
    died = site.go("--name", name, FAULT="kill@shard,8", FAULT_RANK="1")
    assert -signal.SIGKILL in died.codes
    assert site.latest(name) == "step-00000004"
    resumed = site.go("--name", name)
    assert resumed.code == 0, resumed.output
    assert "continuing" in resumed.output
    assert toy.digest(site.checkpoint(name, 8)) == toy.digest(site.checkpoint(reference[0], 8))
    assert losses(site, name) == losses(site, reference[0])
    assert not list((site.runs / name / "checkpoints").glob("tmp-*"))


def test_sigterm_saves_and_the_run_continues_exactly(site, reference):
    launched = site.start("--name", "term", STEP_SECONDS="0.2")
    deadline = time.monotonic() + 100
    metrics = site.runs / "term" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)  # the first lines come after four steps
    os.kill(launched[1].pid, signal.SIGTERM)
    ended = site.wait(launched)
    assert ended.code == 75, ended.output
    stopped = int(site.latest("term").removeprefix("step-"))
    assert 4 <= stopped < 8
    resumed = site.go("--name", "term")
    assert resumed.code == 0, resumed.output
    assert toy.digest(site.checkpoint("term", 8)) == toy.digest(site.checkpoint(reference[0], 8))


def test_non_finite_steps_change_nothing_and_end_the_run(site):
    # Position 18 is in step 3, on rank 1; the others are in steps 6 to 8.
    ended = site.go(
        "--name", "nan", "--checkpoint.every-steps", "1", "--checkpoint.keep", "20", "--train.max-bad-steps", "3",
        "--train.steps", "12", "--train.precision", "bf16", FAULT="nan18,40,50,60",
    )  # fmt: skip
    assert ended.code == 3, ended.output
    assert "train.max_bad_steps = 3" in ended.output and "Traceback" not in ended.output
    lines = site.metrics("nan")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 2, 3, 4]
    assert lines[2]["loss"] is None and lines[3]["loss"] is not None
    before, after, later = (open_archive(site.checkpoint("nan", k))[0] for k in (2, 3, 4))
    keys = [k for k in before.pieces if k.split("/")[0] in ("weight", "exp_avg", "exp_avg_sq", "ema", "buffer")]
    assert all(torch.equal(before.whole(k), after.whole(k)) for k in keys)
    assert not torch.equal(before.whole("weight/extra"), later.whole("weight/extra"))
    state = open_archive(site.checkpoint("nan", 7))[1]["progress"]
    assert state == {"step": 7, "skipped": 3, "bad_in_a_row": 2, "applied": 4, "loader": state["loader"]}


def test_portable_moves_between_ranks_and_stages(site):
    """2 ranks under ZeRO-2, then 1 under ZeRO-3, then 2 under ZeRO-1: as without the moves."""
    # Without what depends on ranks by nature: streams of dropout, and the toy's running mean of its own batches.
    plain = ("--method.dropout", "0", "--method.center-rate", "0", "--checkpoint.every-steps", "2")
    plain += ("--checkpoint.keep", "9", "--method.frozen-input")
    assert site.go("--name", "whole", *plain).code == 0
    files = site.runs / "moved-1.safetensors", site.runs / "moved-2.safetensors"
    export_portable(site.checkpoint("whole", 4), files[0])
    one = site.go("--name", "one", *plain, "--train.zero-stage", "3", "--restore", str(files[0]), world=1)
    assert one.code == 0 and "train.zero_stage: was 2, now 3" in one.output, one.output
    export_portable(site.checkpoint("one", 6), files[1])
    two = site.go("--name", "two", *plain, "--train.zero-stage", "1", "--restore", str(files[1]))
    assert two.code == 0, two.output
    assert [line["step"] for line in site.metrics("two")] == [7, 8]
    joined = losses(site, "one")[:2] + losses(site, "two")
    torch.testing.assert_close(torch.tensor(joined), torch.tensor(losses(site, "whole")[4:]), rtol=1e-5, atol=1e-6)
    moved, stayed = (open_archive(site.checkpoint(n, 8))[0] for n in ("two", "whole"))
    for key in stayed.pieces:
        if not key.startswith("rng/"):
            torch.testing.assert_close(moved.whole(key), stayed.whole(key), rtol=1e-4, atol=1e-6, msg=key)
    wrong = site.go("--name", "whole", *plain, world=1)
    assert wrong.code == 2 and "armillary export" in wrong.output and "2 ranks under ZeRO-2" in wrong.output


def test_full_disk_is_a_clean_error(site, reference):
    ended = site.go("--name", "full", FAULT="full@8", FAULT_RANK="1")
    assert ended.code == 4, ended.output
    assert "No space left" in ended.output and "step-00000004 is intact" in ended.output
    assert "Traceback" not in ended.output
    open_archive(site.checkpoint("full", 4))
    assert sorted(p.name for p in (site.runs / "full" / "checkpoints").iterdir()) == ["latest", "step-00000004"]


def test_data_that_one_rank_cannot_read_cost_no_step(site, reference):
    """The step without data is undone on all ranks, dropout's draws and the running mean too."""
    ended = site.go("--name", "lost", FAULT="lost@18", FAULT_RANK="1")
    assert ended.code == 1 and "Traceback" not in ended.output, ended.output
    said = "lost: stopped: there are no data for step 3\n  rank 1: [Errno 2] No such file or directory: 'train-000000.tar'\n"
    assert said in ended.output and ended.output.count("Then the same command continues from step-00000002") == 1
    again = site.go("--name", "lost")
    assert again.code == 0, again.output
    assert toy.digest(site.checkpoint("lost", 8)) == toy.digest(site.checkpoint(reference[0], 8))
    assert losses(site, "lost") == losses(site, reference[0])
    first = site.go("--name", "never", FAULT="lost@0")
    assert first.code == 1 and "no data for step 1\n  rank 0:" in first.output and "begins anew" in first.output


def test_crash_of_one_rank_ends_all(site):
    launched = site.start("--name", "crash", launcher=True, FAULT="crash@18", FAULT_RANK="1")
    children: dict[int, psutil.Process] = {}
    while launched[0].poll() is None and not children:
        children = {p.pid: p for p in psutil.Process(launched[0].pid).children(recursive=True)}
        time.sleep(0.2)
    ended = site.wait(launched)
    assert ended.code == 1 and "injected crash" in ended.output
    time.sleep(1)
    assert not [p for p in psutil.process_iter() if p.ppid() != 0 and p.pid in children]


def test_bad_input_is_said_once_and_at_once(site):
    ended = site.go("--train.global-batch", "7", "--optim.lr", "-1")
    assert ended.code == 2
    assert ended.output.count("train.global_batch: must be a multiple of micro_batch * ranks = 2 * 2 = 4, got 7") == 1
    assert ended.output.count("optim.lr: must be a finite number > 0, got -1.0") == 1
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(("stage", "micro"), [(1, 8), (3, 2)])
def test_bf16_alone_without_a_launcher(site, stage, micro):
    """Plain python, one process: bf16 weights, float32 masters, averages and buffers; resumed in place."""
    name = f"alone{stage}"
    half = ("--name", name, "--train.precision", "bf16", "--train.zero-stage", str(stage), "--telemetry.tensorboard")
    half += ("--train.micro-batch", str(micro))
    fresh = {"fresh": True, "PYTHONPROFILEIMPORTTIME": "1"} if stage == 1 else {}
    first = site.go(*half, "--train.steps", "4", world=0, **fresh)
    assert first.code == 0, first.output
    # torch's compiler takes four seconds at each start, for a run that compiles nothing.
    assert ("import time:" in first.output) == (stage == 1) and "torch._dynamo" not in first.output
    ended = site.go(*half, world=0)
    assert ended.code == 0 and "continuing" in ended.output, ended.output
    archive, _ = open_archive(site.checkpoint(name, 8))
    kinds = {k: archive.read(k, 0, 1).dtype for k in archive.pieces if not k.startswith("rng/")}
    assert set(kinds.values()) == {torch.float32}
    assert archive.whole("buffer/center").abs().sum() > 0
    weight = archive.whole("weight/student.stem.weight")
    assert not torch.equal(weight, weight.bfloat16().float())
    assert [line["step"] for line in site.metrics(name)] == list(range(1, 9))
    assert list((site.runs / name / "tensorboard").iterdir())
