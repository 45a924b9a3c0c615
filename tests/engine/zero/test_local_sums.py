"""Gradients summed over ranks once a step: what is sent, what comes out, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import toy
from torch import nn
from two_ranks import run_on_two_ranks

from armillary.engine.zero.local_sums import LocalSums


def _trains_both_ways(rank):
    """Three steps of four micro-batches by each way, in both precisions: elements handed to sums over ranks, and weights."""
    import json
    import os
    import sys
    from pathlib import Path
    from unittest.mock import patch

    import deepspeed.ops
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for most of a minute
    sys.path.append(os.environ["SUPPORT"])
    import toy

    from armillary.engine.zero.deepspeed_engine import Sharded
    from armillary.models.method import InputSpec

    folder, cpu, found, sent = Path(os.environ["FOLDER"]), torch.device("cpu"), {}, []

    def counted(original):
        def sums(tensor, *args, **kwargs):
            sent.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        return sums

    wrapped = {name: counted(getattr(dist, name)) for name in ("all_reduce", "reduce")}
    for precision in ("fp32", "bf16"):
        for once in (False, True):
            run = toy.toy_run(folder, folder, global_batch=16, precision=precision, reduce_once=once)
            torch.manual_seed(0)
            method = run.method.build(InputSpec(channels=10, global_size=1))
            method.student.dropout.p = 0.0
            sharded = Sharded(run, method, cpu)
            loader = iter(toy.ToyLoader(run, rank, 2, cpu))
            sent.clear()
            for step in range(3):
                scalars = run.scalars(step)
                sharded.optimizer.set_step(step, scalars)
                for micro in range(4):
                    losses = sharded.forward(next(loader), scalars)
                    with patch.multiple(dist, **wrapped):
                        sharded.backward(losses.total)
                    if micro == 3:
                        assert sharded.agree(losses.total).finite
                    sharded.step()
            found[f"{precision}-{once}"] = sum(sent)
            weights = torch.cat([master.detach() for master in sharded.layout.masters])
            torch.save(weights, folder / f"{precision}-{once}-{rank}.pt")
    found["trained"] = sum(p.numel() for p in method.parameters() if p.requires_grad)
    (folder / f"sent-{rank}.json").write_text(json.dumps(found))


@pytest.mark.dist
def test_a_quarter_is_sent_and_training_is_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPPORT", str(Path(toy.__file__).parent))
    run_on_two_ranks(_trains_both_ways, tmp_path)
    for rank in range(2):
        sent = json.loads((tmp_path / f"sent-{rank}.json").read_text())
        for precision in ("fp32", "bf16"):
            often, once = sent[f"{precision}-False"], sent[f"{precision}-True"]
            assert often == 4 * once and once == 3 * sent["trained"]
            each, together = (torch.load(tmp_path / f"{precision}-{way}-{rank}.pt") for way in (False, True))
            # AdamW's first steps are as large as the rate, .02, whatever the gradient: differences are of its sign at most
            torch.testing.assert_close(together, each, rtol=0, atol=1e-5 if precision == "fp32" else 4e-3)


class Engine:
    """Of DeepSpeed's engine what LocalSums asks; `quiet` says whether the optimizer's hooks would send."""

    def __init__(self, micro_batches):
        self.left, self.optimizer, self.inside_no_sync_ctxt = micro_batches, self, False
        self._coalesce_grad_reduction, self.quiet = False, []

    def is_gradient_accumulation_boundary(self):
        return self.left == 1

    def backward(self, loss):
        self.quiet.append(self._coalesce_grad_reduction and self.inside_no_sync_ctxt)
        loss.backward()
        self.left -= 1


def test_small_gradients_are_not_lost_in_bf16():
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    sums, engine = LocalSums(layer), Engine(257)
    for gradient in (256.0, *[1.0] * 256):  # in bf16 256 + 1 is 256
        sums.backward(engine, gradient * layer.weight.sum())
    assert layer.weight.grad.item() == 512 and layer.weight.grad.dtype == torch.bfloat16
    assert engine.quiet == [True] * 256 + [False] and not engine._coalesce_grad_reduction


def test_a_parameter_without_part_in_the_last_micro_batch_is_named():
    layers = nn.ModuleDict({"one": nn.Linear(1, 1, bias=False), "two": nn.Linear(1, 1, bias=False)})
    sums, engine = LocalSums(layers), Engine(2)
    sums.backward(engine, layers["one"].weight.sum() + layers["two"].weight.sum())
    with pytest.raises(RuntimeError, match="train.reduce_once: .*two.weight had no part in the last one"):
        sums.backward(engine, layers["one"].weight.sum())
