"""What a run writes about itself."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from armillary.engine.config.run import Telemetry
from armillary.engine.train import telemetry
from armillary.engine.train.telemetry import LineFile, Meter, measure_gemm, peak_flops
from armillary.models.method import InputSpec, Losses

CPU = torch.device("cpu")
KNOWN = {"grad_norm/all": 1.0, "learning_rate": 0.1, "skipped": 0}


@pytest.fixture
def method(run):
    return run.method.build(InputSpec(channels=10, global_size=1))


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=400)


@pytest.fixture
def meter(run, method, screen, one_process):
    run.folder.mkdir(parents=True)
    meter = Meter(replace(run, telemetry=Telemetry(every_steps=2, tensorboard=False)), method, CPU, 0, screen)
    yield meter
    meter.close()


def lines(run):
    return [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()]


def step(meter, number, *values, **known):
    for value in values:
        meter.add(Losses(torch.tensor(value), {"part": torch.tensor(2 * value)}))
    meter.end_step(number, KNOWN | known, waited=0.0)


def test_one_line_a_step_with_means_over_micro_batches(run, meter, screen):
    step(meter, 1, 1.0, 3.0)
    assert (run.folder / "metrics.jsonl").read_text() == ""  # nothing leaves the device before it is due
    step(meter, 2, 5.0)
    first, second = lines(run)
    assert (first["step"], first["loss"], first["part"], first["loss_max"]) == (1, 2.0, 4.0, 2.0)
    assert second["loss"] == 5.0 and second["monitor/center"] == 0.0 and "monitor/center" not in first
    assert first["mfu"] > 0 and first["peak_gib"] > 0
    text = screen.file.getvalue()
    assert "step 2/8  loss 5.0000" in text and "step 1/8" not in text and "measured fp32 GEMM rate" in text


@pytest.mark.parametrize(("every", "steps"), [(None, [2, 4, 6, 7]), (4, [4, 7]), (100, [7])])
def test_health_is_measured_as_often_as_asked_and_at_the_end(run, method, screen, one_process, every, steps):
    run.folder.mkdir(parents=True)
    asked = Telemetry(every_steps=2, tensorboard=False, monitor_steps=every)
    meter = Meter(replace(run, telemetry=asked, train=replace(run.train, steps=7)), method, CPU, 0, screen)
    for number in range(1, 8):
        step(meter, number, 1.0)
    meter.close()
    assert [line["step"] for line in lines(run) if "monitor/center" in line] == steps


def test_on_a_gpu_health_is_measured_seldom(meter):
    """Every measure makes the host wait for the device."""
    meter.device = torch.device("cuda")
    assert [step for step in range(1, 9) if meter._measures(step)] == [8]  # the last one
    assert [step for step in range(90, 120) if meter._measures(step)] == [100]


class FullDisk:
    """An unbuffered file on a disk that takes `room` bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self):
        self.file.close()


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path):
    lines = LineFile(tmp_path / "lines")
    disk = lines._file = FullDisk(lines._file, room=5)
    assert lines.append("abc") is None
    assert "No space" in str(lines.append("defg"))
    assert "No space" in str(lines.append("hi"))
    disk.room = 100
    assert lines.append("j") is None
    lines.close()
    assert (tmp_path / "lines").read_text() == "abc\ndefg\nhi\nj\n"


def test_lines_go_on_in_a_new_file_where_the_old_one_was_moved(tmp_path):
    (tmp_path / "run").mkdir()
    lines = LineFile(tmp_path / "run" / "lines")
    lines.append("one")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert lines.append("two") is None
    lines.close()
    assert [(tmp_path / folder / "lines").read_text() for folder in ("moved", "run")] == ["one\n", "two\n"]


def test_a_full_disk_is_told_once_and_ends_nothing(run, meter, screen):
    disk = meter._lines._file = FullDisk(meter._lines._file, room=0)
    for number in range(1, 5):
        step(meter, number, 1.0)
    assert screen.file.getvalue().count("metrics.jsonl cannot be written: [Errno 28]") == 1
    disk.room = 1 << 20
    step(meter, 5, 1.0)
    step(meter, 6, 1.0)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_screen_that_is_gone_ends_nothing(run, meter, error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error(5, "gone")

    meter.console = Console(file=Gone())
    step(meter, 1, 1.0)
    step(meter, 2, 1.0)
    assert [line["step"] for line in lines(run)] == [1, 2]


def test_non_finite_numbers_are_null(run, meter):
    step(meter, 1, math.nan)
    step(meter, 2, math.inf, **{"grad_norm/all": math.nan})
    assert [x["loss"] for x in lines(run)] == [None, None] and lines(run)[1]["grad_norm/all"] is None


def test_terms_may_come_and_go(run, meter):
    step(meter, 1, 1.0)
    meter.add(Losses(torch.tensor(4.0)))
    meter.end_step(2, KNOWN, waited=0.0)
    assert "part" in lines(run)[0] and "part" not in lines(run)[1]


def test_warnings_of_the_method_are_loud(run, meter, method, screen):
    method.center.fill_(1e4)
    step(meter, 1, 1.0)
    step(meter, 2, 1.0)
    assert "WARNING: the centre runs away" in screen.file.getvalue()


def test_data_wait_is_a_share_of_the_interval(run, meter, monkeypatch):
    clock = iter([10.0, 10.0, 20.0, 20.0, 30.0])
    monkeypatch.setattr("armillary.engine.train.telemetry.time.perf_counter", lambda: next(clock))
    meter.restart_clock(0.0)
    meter.add(Losses(torch.tensor(1.0)))
    meter.end_step(1, KNOWN, waited=3.0)
    meter.add(Losses(torch.tensor(1.0)))
    monkeypatch.setattr("armillary.engine.train.telemetry.time.perf_counter", lambda: 18.0)
    meter.end_step(2, KNOWN, waited=4.0)
    assert lines(run)[0]["data_wait"] == pytest.approx(0.5)
    assert lines(run)[0]["images_per_s"] == pytest.approx(2 * 8 / 8.0)


def test_a_resumed_run_drops_lines_it_will_write_again(run, method, screen, one_process):
    run.folder.mkdir(parents=True)
    path = run.folder / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": k, "loss": 1}) + "\n" for k in range(1, 7)) + '{"step": 7, "lo')
    meter = Meter(run, method, CPU, 4, screen)
    step(meter, 5, 1.0)
    meter.flush(0.0)
    meter.close()
    assert [x["step"] for x in lines(run)] == [1, 2, 3, 4, 5]


def test_bar_and_tensorboard(run, method, one_process):
    run.folder.mkdir(parents=True)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=300)
    meter = Meter(replace(run, telemetry=Telemetry(every_steps=1)), method, CPU, 0, terminal)
    step(meter, 1, 1.5)
    meter.close()
    assert "loss 1.5000" in terminal.file.getvalue() and "1/8" in terminal.file.getvalue()
    assert list((run.folder / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA RTX A4000", 7.0),
        ("NVIDIA A10G", 7.0),
        ("NVIDIA GB200", 7.0),
    ],
)
def test_a_peak_is_of_that_very_gpu_or_measured(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(telemetry, "measure_gemm", lambda *_: 7e12)
    assert peak_flops(torch.device("cuda"), "bf16")[0] == tflops * 1e12


def test_peak_is_named():
    rate, name = peak_flops(CPU, "fp32")
    assert rate > 1e8 and name.startswith("measured fp32 GEMM rate")
    assert measure_gemm(CPU, torch.float32, 64) > 0
