"""What the trainer decides before and around the loop; whole runs are in test_training.py."""

import os
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toy
from plain import FACTS, flip, progress, scrambled, write_world

from armillary.engine.config.provenance import facts, survey_fingerprint
from armillary.engine.config.run import Schedules
from armillary.engine.train import start, trainer
from armillary.engine.train.loop import Loop, NonFinite, Stopped, StopRequest
from armillary.engine.train.supply import DataLost
from armillary.engine.train.trainer import BadInput
from armillary.engine.user_code import trust
from armillary.engine.weights import checkpoint, portable, verify
from armillary.engine.weights.checkpoint import Progress
from armillary.engine.weights.export import export_encoder
from armillary.engine.weights.portable import export_portable
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.engine.weights.verify import CheckpointError
from armillary.engine.zero.deepspeed_engine import StepStatus, deepspeed_config
from armillary.engine.zero.processes import Ranks, launch_problems, lost_ranks, ranks, take_slurm_ranks
from armillary.models.method import InputSpec

INPUTS = InputSpec(channels=10, global_size=1)
trust("toy")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (Stopped(), 75, ""),
        (BadInput("a: b\nc: d"), 2, "toy: this run cannot start:\n  a: b\n  c: d"),
        (NonFinite("why"), 3, "toy: stopped: why"),
        (CheckpointError("full"), 4, "toy: full"),
        (DataLost("no data"), 1, "toy: stopped: no data"),
    ],
)
def test_ends_have_their_exit_codes(run, monkeypatch, capsys, error, code, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    assert start.run_to_exit_code(run) == code
    assert capsys.readouterr().err.strip() == message


def test_a_second_ctrl_c_says_where_the_run_goes_on(run, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupted)
    assert start.run_to_exit_code(run) == 130
    assert capsys.readouterr().err == "toy: interrupted without saving; the same command begins anew\n"


def test_signals_after_a_run_has_saved_leave_its_exit_code(run, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    monkeypatch.setattr(start, "start", lambda *_: 75)
    monkeypatch.setattr(start.gc, "freeze", lambda: [os.kill(os.getpid(), number) for number in before])
    try:
        with pytest.raises(SystemExit) as ended:
            start.main(run)
        assert ended.value.code == 75
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_error_nobody_foresaw_keeps_its_traceback(run, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "train", lambda *_, **__: 1 / 0)
    assert start.run_to_exit_code(run) == 1
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_the_method_is_checked_before_processes_start(run):
    with pytest.raises(BadInput, match="schedule.teacher_temperature: must be a schedule"):
        trainer.train(replace(run, schedule=Schedules()), open_loader=toy.open_toy_loader)
    assert not run.folder.exists()


def test_a_checkpoint_of_another_recipe_is_refused_before_processes_start(run, one_process):
    known = facts(toy.Survey.load(run.data.path)) | {"inputs": FACTS["inputs"]}
    checkpoint.save(run.folder / "checkpoints", scrambled(run), progress(), run, known)
    method = run.method.build(INPUTS)
    assert trainer._startable(run, method, known, 1) == run.folder / "checkpoints" / "step-00000003"
    with pytest.raises(BadInput, match="optim.lr: must be 0.02, as in"):
        trainer._startable(replace(run, optim=replace(run.optim, lr=1.0)), method, known, 1)
    with pytest.raises(BadInput, match="1 ranks under ZeRO-2"):
        trainer._startable(run, method, known, 2)


def test_an_export_that_cannot_be_continued_is_refused_before_processes_start(run, one_process, tmp_path):
    known = facts(toy.Survey.load(run.data.path)) | {"inputs": FACTS["inputs"]}
    saved = checkpoint.save(run.folder / "checkpoints", scrambled(run), progress(), run, known | {"world": 1})
    file, method = tmp_path / "portable.safetensors", run.method.build(INPUTS)
    export_portable(saved, file)
    fresh = replace(run, name="fresh")
    assert trainer._startable(fresh, method, known, 1, file) is None
    larger = replace(fresh, train=replace(run.train, global_batch=2 * run.train.global_batch))
    with pytest.raises(BadInput, match=r"train.global_batch: must be 8, as in .*got 16.*--init-from"):
        trainer._startable(larger, method, known, 1, file)
    with pytest.raises(BadInput, match="data.path: must be the survey that"):
        trainer._startable(fresh, method, known | {"survey": "other"}, 1, file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(BadInput, match="--restore: .*portable.safetensors"):
        trainer._startable(fresh, method, known, 1, file)


def test_an_encoder_that_does_not_fit_is_bad_input(run, tmp_path):
    (tmp_path / "x.safetensors").write_text("no")
    with pytest.raises(BadInput, match="--init-from: .*not a readable safetensors file"):
        trainer.train(run, init_from=tmp_path / "x.safetensors", open_loader=toy.open_toy_loader)


def test_what_a_run_starts_from_is_hashed_once_a_machine(run, one_process, tmp_path, monkeypatch):
    """Opened by all ranks without hashing; then one rank compares, and all end where it is damaged."""
    file = tmp_path / "encoder.safetensors"
    export_encoder(TrainedEncoder.open(write_world(run, tmp_path / "other", 1)), file)
    hashed, real = [], verify._unsealed
    monkeypatch.setattr(verify, "_unsealed", lambda path, *rest: hashed.append(path) or real(path, *rest))

    def taken():
        return trainer._take_weights(run, run.method.build(INPUTS), toy.Survey.load(run.data.path), file)

    assert taken() == {"--init-from": file} and not hashed
    for rank in range(4):
        portable.agree(file, "--init-from", Ranks(rank, rank % 2, 4))
    assert hashed == 2 * [file]  # two machines
    flip(file, -3)
    assert taken() == {"--init-from": file}
    with pytest.raises(CheckpointError, match="--init-from: .*differs from what was written"):
        portable.agree(file, "--init-from", ranks())
    data = file.read_bytes()
    file.write_bytes(data.replace(b"teacher.norm.weight", b"teacher.nurm.weight"))
    with pytest.raises(CheckpointError, match="differs from what was written"):  # not "does not fit the method"
        taken()


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "checkpoints"])
def test_what_is_in_the_way_of_a_run_is_said_before_work(run, one_process, name):
    run.folder.mkdir(parents=True)
    (run.folder / name).touch() if name == "checkpoints" else (run.folder / name).mkdir()
    with ExitStack() as leaving, pytest.raises(BadInput, match=f"out: .*{name}"):
        trainer._own(run.folder, None, ranks(), leaving)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_and_a_second_interrupts(first):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, which a run respects
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    os.kill(os.getpid(), first)
    assert stop.asked
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    stop.forget()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


class FakeMeter:
    def __init__(self):
        self.said = []

    def say(self, text, loud=False):
        self.said.append(text)

    def flush(self, waited):
        self.said.append("flush")


def test_skipped_steps_are_told_and_counted_out(run):
    loop = Loop.__new__(Loop)
    loop.run, loop.meter, loop.loader = run, FakeMeter(), toy.ToyLoader(run, 0, 1, None)
    loop.progress = Progress(step=7, bad_in_a_row=9)
    bad = StepStatus(False, float("nan"), {"all": float("inf")}, ())
    loop._judge(replace(bad, finite=True))
    assert loop.meter.said == []
    loop._judge(bad)
    assert "step 7 skipped, 9 in a row: loss nan, gradient norms all inf" in loop.meter.said[0]
    loop.progress.bad_in_a_row = 10
    with pytest.raises(NonFinite, match="10 steps in a row.*train.max_bad_steps = 10"):
        loop._judge(bad)


def test_a_run_whose_folder_was_deleted_has_its_record_again(run):
    loop = Loop.__new__(Loop)
    loop.run, loop.meter, loop.known = run, FakeMeter(), {"survey": "s"}
    loop.sharded = SimpleNamespace(rank=0, layout=SimpleNamespace(world=2))
    run.folder.mkdir(parents=True)
    for _ in range(2):
        loop._keep_record()
    assert type(run).load(run.folder) == run
    assert len(loop.meter.said) == 1 and "was moved or deleted" in loop.meter.said[0]


def test_a_checkpoint_by_time_is_rank_0s_decision(run):
    loop = Loop.__new__(Loop)
    loop.saved_at, loop.sharded = time.monotonic() - 61, SimpleNamespace(rank=0)
    for minutes, due in ((None, False), (1.0, True), (2.0, False)):
        loop.run = replace(run, checkpoint=replace(run.checkpoint, every_minutes=minutes))
        assert loop._due() is due
    loop.run, loop.sharded.rank = replace(run, checkpoint=replace(run.checkpoint, every_minutes=1.0)), 1
    assert loop._due() is False


def test_ranks_are_read_from_the_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks().rank, ranks().world) == (0, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (ranks().rank, ranks().local_rank, ranks().world) == (5, 1, 8)


SLURM = {
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[07-09],cpu1",
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "3",
}


def test_tasks_of_a_slurm_step_are_ranks(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no scontrol
    environment = dict(SLURM)
    assert take_slurm_ranks(environment) == []
    wanted = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"}
    assert wanted.items() <= environment.items()
    assert environment["MASTER_PORT"] == str(20_000 + 41_003 % 40_000)


@pytest.mark.parametrize(
    "other",
    [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": ""}],
    ids=["another launcher", "one task", "no step"],
)
def test_other_launchers_are_not_disturbed(other):
    environment = SLURM | other
    before = dict(environment)
    assert take_slurm_ranks(environment) == [] and environment == before


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"])
def test_a_step_that_slurm_does_not_describe_is_refused(name, monkeypatch):
    monkeypatch.setenv("PATH", "")
    environment = {k: v for k, v in SLURM.items() if k != name}
    (found,) = take_slurm_ranks(environment)
    assert found.startswith("SLURM_STEP_N") and "RANK" not in environment


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
        torch.distributed.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
        RuntimeError(
            "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 30000ms for recv operation to complete"
        ),
    ],
    ids=["NCCL", "start", "gloo"],
)
def test_an_error_of_lost_ranks_says_where_to_look(error, monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu07"}.items():
        monkeypatch.setenv(name, value)
    said = lost_ranks(error, 0.5, 10)
    for part in ("train.timeout_minutes = 0.5", "rank 3 of 16", "rank 0 is on gpu07", "dmesg"):
        assert part in said


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyboardInterrupt(), ValueError("gloomy")])
def test_any_other_error_is_left_alone(error):
    assert lost_ranks(error, 0.5, 10) is None


def test_a_master_that_nobody_knows_is_refused_before_the_group_waits(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "2345"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert launch_problems() == []
    monkeypatch.setenv("MASTER_ADDR", "no-such-machine.invalid")
    assert launch_problems()[0].startswith("MASTER_ADDR: must be a machine that ")
    monkeypatch.setenv("RANK", "first")
    assert launch_problems() == ["RANK: must be a whole number, got 'first'"]


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked
        stop.forget()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_in_a_thread_leaves_signals_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        stop = StopRequest()
        found.append(stop.asked)
        stop.forget()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False] and signal.getsignal(signal.SIGTERM) is before


def test_deepspeed_config(run):
    config = deepspeed_config(run, 2, 1000)
    assert config["gradient_accumulation_steps"] == 2 and config["train_micro_batch_size_per_gpu"] == 2
    assert "bf16" not in config and config["gradient_clipping"] == 0
    three = deepspeed_config(replace(run, train=replace(run.train, precision="bf16", zero_stage=3)), 1, 1000)
    assert three["bf16"] == {"enabled": True, "check_grad_overflow": False} and three["data_types"] == {
        "grad_accum_dtype": "fp32"
    }
    assert three["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    # Norms and overflow are found in one pass for all ranks; DeepSpeed's own would be a second one, waited for.
    assert config["zero_optimization"]["compute_grad_norm"] is False
    assert "compute_grad_norm" not in three["zero_optimization"]


@pytest.mark.parametrize(("device", "world", "overlaps"), [("cuda", 1, False), ("cuda", 2, True), ("cpu", 2, False)])
def test_messages_overlap_with_backward_where_there_are_any(run, device, world, overlaps):
    """On one GPU DeepSpeed would wait for the device after every micro-batch, for messages that nobody sends."""
    config = deepspeed_config(replace(run, device=device), world, 1000)
    assert config["zero_optimization"]["overlap_comm"] is overlaps


def test_facts_tell_surveys_apart(survey, tmp_path):
    first = toy.Survey.load(survey)
    other = toy.Survey.load(toy.toy_survey(tmp_path / "other", count=999))
    assert survey_fingerprint(first) != survey_fingerprint(other)
    assert survey_fingerprint(first) == survey_fingerprint(replace(first, name="renamed", provenance={"x": 1}))
    known = facts(first)
    assert known["versions"]["torch"] and known["command"] and len(known["survey"]) == 64
