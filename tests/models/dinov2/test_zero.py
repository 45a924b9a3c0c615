"""The method under DeepSpeed: two ranks, ZeRO 1, 2 and 3, bf16."""

import pytest
import torch
import torch.distributed as dist
from two_ranks import run_on_two_ranks


def _trains_alike_under_every_stage(rank):
    import os

    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for most of a minute
    from armillary.models.dinov2.dino_head import Head
    from armillary.models.dinov2.dinov2 import DINOv2
    from armillary.models.method import Batch, BatchKey, InputSpec
    from armillary.models.vit.vit import ViT

    centering = os.environ["CENTERING"]
    config = DINOv2(
        vit=ViT(3, 16, 4, dim=32, depth=3, heads=2, layer_scale=0.1, drop_path=0.3, registers=1),
        head=Head(64, 32, 16),
        ibot_head=Head(48, 32, 16),
        separate_head=centering == "sinkhorn",
        centering=centering,
        checkpoint_activations=centering == "sinkhorn",
    )

    def train(stage):
        torch.manual_seed(0)
        method = config.build(InputSpec(3, 16, 2, 8, 2))
        groups = [{"params": list(g.params.values()), "lr": 1e-3 * g.lr_scale} for g in method.parameter_groups()]
        engine, *_ = deepspeed.initialize(
            model=method,
            optimizer=torch.optim.AdamW(groups),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 4,
                "bf16": {"enabled": True},
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "steps_per_print": 10**9,
            },
        )
        losses = []
        for step in range(4):
            torch.manual_seed(10 * step + rank)
            batch = Batch(position=torch.arange(4) + 4 * rank)
            batch["global_crops"], batch["local_crops"] = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 8, 8)
            batch = method.prepare(batch, BatchKey(step, 0, 0, 8))
            if step == 1 and rank == 0:  # one rank has no masked patch
                batch["mask"] = torch.zeros_like(batch["mask"])
                batch["mask_index"] = batch["mask_index"][:0]
            loss = engine(batch, {"teacher_temperature": 0.05}).total
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        for name, buffer in method.named_buffers():
            both = [torch.empty_like(buffer) for _ in range(2)]
            dist.all_gather(both, buffer)
            assert buffer.dtype == torch.float32 and buffer.any() and torch.equal(*both), name
        measures = method.monitor()
        assert measures["window_rows"] == 16 and measures["effective_rank"] >= 1
        return torch.stack(losses)

    expected = train(1)
    assert expected.isfinite().all() and expected.std() > 0
    for stage in (2, 3):
        torch.testing.assert_close(train(stage), expected, rtol=0.02, atol=0.0)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_trains_under_zero(tmp_path, monkeypatch, centering):
    monkeypatch.setenv("CENTERING", centering)
    run_on_two_ranks(_trains_alike_under_every_stage, tmp_path)


def _encoder_trains_alike_on_its_kernels(rank):
    """Stage 3 takes parameters away between the modules' forward passes: no kernel may keep one beyond its own."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from armillary.models.vit.vit import VisionTransformer, ViT

    class Toy(torch.nn.Module):
        def __init__(self, impl):
            super().__init__()
            vit = ViT(1, 4, 2, dim=8, depth=2, heads=1, layer_scale=0.5, drop_path=0.5)
            self.encoder = VisionTransformer(vit, impl=impl)

        def forward(self, crops, select):
            tokens = self.encoder(crops, select=select)
            return sum(x.sin().sum() for x in (*tokens.cls, *tokens.patches))

    def train(impl, stage):
        torch.manual_seed(0)
        model = Toy(impl)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "steps_per_print": 10**9,
            },
        )
        losses = []
        for step in range(3):
            torch.manual_seed(10 * step + rank)
            loss = engine([torch.randn(2, 1, 4, 4), torch.randn(2, 1, 2, 2)], torch.tensor([1, 6]))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    expected = train("reference", 1)
    assert expected.isfinite().all() and expected.std() > 0
    torch.testing.assert_close(train("triton", 3), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.dist
@pytest.mark.slow
def test_kernels_train_alike_under_stage_3(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run_on_two_ranks(_encoder_trains_alike_on_its_kernels, tmp_path)
