"""Memory of a rank: counted by hand, shared out by ZeRO, refused where it does not fit."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from armillary.engine.plan.memory import Memory, free_bytes, memory_of


class Toy(nn.Module):
    """100 trained numbers, 50 of them with a teacher of their own, and 1000 frozen ones without storage."""

    def __init__(self, activations=7):
        super().__init__()
        self.student, self.other = nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))
        self.teacher = nn.Parameter(torch.zeros(50), requires_grad=False)
        self.frozen = nn.Parameter(torch.empty(950, device="meta"), requires_grad=False)
        self.activations = activations

    def teacher_pairs(self):
        return [(self.student, self.teacher)]

    def base(self):
        return None

    def activation_bytes(self, micro_batch, itemsize):
        return self.activations and self.activations * micro_batch * itemsize


def run_of(stage, precision, once=False, evals=()):
    train = SimpleNamespace(zero_stage=stage, precision=precision, reduce_once=once)
    return SimpleNamespace(train=train, micro_batch=3, accumulation=lambda world: 2, evals=evals)


@pytest.mark.parametrize(
    "stage, precision, expected",
    [
        (1, "fp32", [4000, 400, 400, 350, 84]),
        (2, "bf16", [2000, 200, 100, 350, 42]),
        (3, "bf16", [500, 50, 100, 350, 42]),
    ],
)
def test_kinds_by_hand(stage, precision, expected):
    memory = memory_of(run_of(stage, precision), Toy(), 4, None)
    assert list(memory.kinds.values()) == expected
    assert memory.total == sum(expected) and memory.problems() == []


def test_gradients_that_are_summed_once_lie_whole_on_each_rank():
    assert memory_of(run_of(2, "bf16", once=True), Toy(), 4, None).kinds["gradients"] == 100 + 400
    assert memory_of(run_of(1, "fp32", once=True), Toy(), 4, None).kinds["gradients"] == 400


def test_weights_gathered_for_evals_lie_where_activations_were():
    gathered = memory_of(run_of(3, "bf16", evals=("knn",)), Toy(), 4, None).kinds
    assert gathered.popitem() == ("weights gathered for evals, beyond activations", 2000 + 200 - 42)
    assert list(gathered) == list(memory_of(run_of(3, "bf16"), Toy(), 4, None).kinds)
    assert len(memory_of(run_of(2, "bf16", evals=("knn",)), Toy(), 4, None).kinds) == len(gathered)


def test_what_does_not_fit_is_refused_and_said_by_kind():
    memory = Memory({"frozen weights": 3 * 2**30, "activations (estimate)": 2**29}, 2**30)
    (problem,) = memory.problems()
    assert problem.startswith(
        "train.micro_batch: must fit the device's memory; memory of a rank in GiB: frozen weights 3.00"
    )
    assert "together 3.50 of 1.00 free. Take fewer samples" in problem
    assert Memory(memory.kinds, 4 * 2**30).problems() == []


def test_methods_that_do_not_count_are_not_judged():
    assert memory_of(run_of(2, "fp32"), Toy(None), 1, 1) is None


def test_a_rank_s_share_of_this_machine(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    whole = free_bytes("cpu")
    if whole is None:
        pytest.skip("this system does not say how much memory is available")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_bytes("cpu") < 0.6 * whole  # a quarter, and other processes come and go
