import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.method import Batch, BatchKey, InputSpec
from armillary.models.vit.vit import ViT

INPUTS = InputSpec(channels=3, global_size=16, n_global=2, local_size=8, n_local=3)
TINY = DINOv2(
    vit=ViT(channels=3, image_size=16, patch_size=4, dim=24, depth=2, heads=2, layer_scale=0.3, drop_path=0.0),
    head=Head(prototypes=40, hidden=20, bottleneck=8),
    ibot_head=Head(prototypes=30, hidden=12, bottleneck=6),
)
DEMO = DINOv2(
    vit=ViT(3, 24, 4, dim=96, depth=4, heads=3, layer_scale=1.0, drop_path=0.0),
    head=Head(1024, 256, 64, weight_norm="unit"),
    ibot_head=Head(1024, 256, 64, weight_norm="unit"),
    separate_head=True,
    centering="sinkhorn",
    mask_ratio=(0.1, 0.7),
    masking="random",
    layer_decay=1.0,
    patch_embed_lr=1.0,
)
DEMO_INPUTS = InputSpec(channels=3, global_size=24, n_global=2)
SCALARS = {"teacher_temperature": 0.05}


def batch_for(method, size=6, step=0, **crops):
    inputs = method.inputs
    batch = Batch(position=torch.arange(size))
    batch["global_crops"] = torch.randn(inputs.n_global * size, inputs.channels, inputs.global_size, inputs.global_size)
    if inputs.n_local:
        batch["local_crops"] = torch.randn(inputs.n_local * size, inputs.channels, inputs.local_size, inputs.local_size)
    batch.update(crops)
    return method.prepare(batch, BatchKey(seed=step, epoch=0, first_position=0, global_batch=size))


def stirred(config, inputs=INPUTS):
    """A method whose student and teacher differ, as they do in training."""
    method = config.build(inputs)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return method


def sinkhorn(logits, temperature):
    q = (logits / temperature).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def expected_losses(method, batch, centres, temperature):
    """DINO, iBOT and KoLeo from their formulas: crops one group at a time, whole logits, loops over pairs."""
    config, g, n_local = method.config, method.inputs.n_global, method.inputs.n_local
    mask, size = batch["mask"], len(batch["global_crops"]) // method.inputs.n_global

    def project(network, tokens, patches):
        head = network.ibot_head if patches and config.separate_head else network.dino_head
        features, prototypes = head(tokens)
        return features @ prototypes.T

    student = method.student.backbone([batch["global_crops"]], mask=mask)
    local = method.student.backbone([batch["local_crops"]]).cls[0].split(size) if n_local else []
    with torch.no_grad():
        teacher = method.teacher.backbone([batch["global_crops"]])
        cls_logits = project(method.teacher, teacher.cls[0], False)
        patch_logits = project(method.teacher, teacher.patches[0][mask], True)
        if config.centering == "sinkhorn":
            cls_target, patch_target = sinkhorn(cls_logits, temperature), sinkhorn(patch_logits, temperature)
        else:
            cls_target = ((cls_logits - centres[0]) / temperature).softmax(-1)
            patch_target = ((patch_logits - centres[1]) / temperature).softmax(-1)
    targets = cls_target.split(size)
    student_global = student.cls[0].split(size)

    def ce(target, tokens):
        return -(target * (project(method.student, tokens, False) / config.student_temperature).log_softmax(-1)).sum(-1)

    n_pairs = g * (g - 1) + g * n_local
    between = sum(ce(targets[t], student_global[s]).mean() for s in range(g) for t in range(g) if s != t) / n_pairs
    from_local = sum((ce(t, x).mean() for x in local for t in targets), torch.zeros(())) / n_pairs
    log_p = (project(method.student, student.patches[0][mask], True) / config.student_temperature).log_softmax(-1)
    per_crop = mask.sum(1, keepdim=True).expand_as(mask)[mask]
    ibot = (-(patch_target * log_p).sum(-1) / per_crop).sum() / len(mask)
    koleo = 0.0
    for x in student_global:
        x = F.normalize(x, dim=1)
        nearest = (x @ x.T - 3 * torch.eye(size)).argmax(1)
        koleo = koleo - (x - x[nearest] + 1e-8).norm(dim=1).add(1e-8).log().mean()
    return {
        "dino_global": config.dino_weight * between,
        "dino_local": config.dino_weight * from_local,
        "ibot": config.ibot_weight * ibot,
        "koleo": config.koleo_weight * koleo,
    }


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("separate", [False, True], ids=["shared head", "separate heads"])
@pytest.mark.parametrize("n_global, n_local", [(2, 3), (2, 0), (3, 1)])
def test_losses_and_gradients_equal_the_formulas(centering, separate, n_global, n_local):
    inputs = replace(INPUTS, n_global=n_global, n_local=n_local)
    config = replace(TINY, centering=centering, separate_head=separate, dino_weight=0.7, ibot_weight=1.3)
    method = stirred(config, inputs)
    params = [p for p in method.parameters() if p.requires_grad]
    centres = [torch.zeros(40), torch.zeros(30 if separate else 40)]
    for step in range(2):  # the second step has a centre
        batch = batch_for(method, step=step)
        assert batch["mask"].any()
        expected = expected_losses(method, batch, centres, 0.05)
        losses = method(batch, SCALARS)
        assert set(losses.terms) == set(expected) - (set() if n_local else {"dino_local"})
        for name, value in losses.terms.items():
            torch.testing.assert_close(value, expected[name].detach(), rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(losses.total.detach(), sum(losses.terms.values()))
        got = torch.autograd.grad(losses.total, params)
        want = torch.autograd.grad(sum(expected.values()), params, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=2e-3, atol=2e-5)
        if centering == "softmax":
            with torch.no_grad():
                teacher = method.teacher.backbone([batch["global_crops"]])
                head = method.teacher.ibot_head if separate else method.teacher.dino_head
                for i, (h, x) in enumerate(
                    [(method.teacher.dino_head, teacher.cls[0]), (head, teacher.patches[0][batch["mask"]])]
                ):
                    features, prototypes = h(x)
                    centres[i] = 0.9 * centres[i] + 0.1 * (features @ prototypes.T).mean(0)
            torch.testing.assert_close(method.dino_center.center, centres[0])
            torch.testing.assert_close(method.ibot_center.center, centres[1])


@pytest.mark.parametrize("student_temperature, tolerance", [(1e6, 1e-4), (0.1, 0.06)])
def test_values_at_the_start(student_temperature, tolerance):
    """As the released code logs them at 65,536 prototypes: local 9.86, global 1.23; its iBOT is half of ours, 2.77.

    These are those of a uniform student, log(65536) times each term's factors. At the real temperature a new student
    agrees a little with its teacher, which is its copy.
    """
    vit = replace(TINY.vit, dim=48, layer_scale=1e-5)
    config = replace(TINY, vit=vit, head=Head(65536, 64, 256), student_temperature=student_temperature)
    method = config.build(replace(INPUTS, n_local=8))
    losses = method(batch_for(method, size=8), SCALARS).terms
    uniform = math.log(65536)
    assert (round(16 / 18 * uniform, 2), round(2 / 18 * uniform, 2), round(uniform / 4, 2)) == (9.86, 1.23, 2.77)
    assert losses["dino_local"].item() == pytest.approx(16 / 18 * uniform, rel=tolerance)
    assert losses["dino_global"].item() == pytest.approx(2 / 18 * uniform, rel=tolerance)
    assert losses["ibot"].item() == pytest.approx(uniform / 2, rel=tolerance)


def test_teacher_starts_as_the_student_and_is_not_trained():
    method = replace(TINY, separate_head=True).build(INPUTS)
    pairs = method.teacher_pairs()
    assert len(pairs) == len(list(method.student.parameters())) == len(list(method.teacher.parameters()))
    assert all(torch.equal(s, t) and s.requires_grad and not t.requires_grad for s, t in pairs)
    method(batch_for(method), SCALARS).total.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters())


def test_separate_heads_clip_separately():
    method = replace(TINY, separate_head=True).build(INPUTS)
    assert {g.clip_group for g in method.parameter_groups()} == {"backbone", "dino_head", "ibot_head"}


@pytest.mark.parametrize("change", [{"ibot_weight": 0.0}, {"masked_crops": 0.0}], ids=str)
def test_without_ibot(change):
    method = replace(TINY, **change).build(INPUTS)
    batch = batch_for(method)
    assert "mask" not in batch
    losses = method(batch, SCALARS)
    losses.total.backward()
    assert "ibot" not in losses.terms
    grouped = {n for g in method.parameter_groups() for n in g.params}
    assert grouped == {n for n, p in method.named_parameters() if p.grad is not None}
    assert len(method.teacher_pairs()) == len(grouped)


def test_without_koleo():
    method = replace(TINY, koleo_weight=0.0).build(INPUTS)
    assert "koleo" not in method(batch_for(method), SCALARS).terms


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_empty_masks(separate, centering):
    """Every parameter still gets a finite gradient, as reductions over ranks need."""
    method = replace(TINY, separate_head=separate, centering=centering).build(INPUTS)
    batch = batch_for(method)
    batch["mask"] = torch.zeros_like(batch["mask"])
    del batch["mask_index"]
    losses = method(batch, SCALARS)
    losses.total.backward()
    assert losses.terms["ibot"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.student.parameters())


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_bfloat16(centering):
    """Losses near those of float32, float32 totals and centres, finite gradients."""
    method = stirred(replace(TINY, centering=centering))
    batch = batch_for(method)
    exact = copy.deepcopy(method)
    method.bfloat16()
    for _ in range(3):  # each moves the centre
        terms = exact(batch, SCALARS).terms
        losses = method(batch, SCALARS)
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    for name in ("dino_global", "dino_local", "ibot"):
        assert losses.terms[name].item() == pytest.approx(terms[name].item(), rel=0.015)  # 0.002 +- 0.002, 12 seeds
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in method.student.parameters())
    for name, buffer in method.named_buffers():
        assert buffer.dtype == torch.float32 and buffer.any(), name


def test_masks_are_prepared():
    method = replace(TINY, centering="sinkhorn").build(INPUTS)
    batch = batch_for(method, size=8)
    assert batch["mask"].shape == (16, 16) and batch["mask"].any(1).sum() == 8
    assert torch.equal(batch["mask_index"], batch["mask"].flatten().nonzero().squeeze(1))
    plain = {k: v for k, v in batch.items() if not k.startswith("mask")}
    again = method.prepare(plain, BatchKey(seed=0, epoch=0, first_position=0, global_batch=8))
    assert torch.equal(again["mask"], batch["mask"]) and "mask" not in plain
    without_index = {k: v for k, v in batch.items() if k != "mask_index"}
    assert torch.equal(method(without_index, SCALARS).total, method(batch, SCALARS).total)


@pytest.mark.parametrize("readout", ["cls", "mean"])
@pytest.mark.parametrize("side", [16, 24])
def test_encode(readout, side):
    method = stirred(replace(TINY, readout=readout))
    image = torch.randn(3, 3, side, side)
    found = method.encode(Batch(crop=image))
    assert next(iter(found)) == readout and set(found) == {"cls", "mean"}
    tokens = method.teacher.backbone([image])
    torch.testing.assert_close(found["cls"], tokens.cls[0].detach())
    torch.testing.assert_close(found["mean"], tokens.patches[0].mean(1).detach())
    assert all(
        x.dtype == torch.float32 and not x.requires_grad for x in method.bfloat16().encode(Batch(crop=image)).values()
    )


def test_encode_needs_a_crop():
    with pytest.raises(ValueError, match="embeds images, but the batch has no `crop`"):
        stirred(TINY).encode(Batch(spectrum=torch.zeros(1, 5)))


def test_state_dict_round_trip():
    method = stirred(TINY)
    method(batch_for(method), SCALARS)
    other = TINY.build(INPUTS)
    other.load_state_dict(method.state_dict())
    batch = batch_for(method)
    assert torch.equal(method(batch, SCALARS).total, other(batch, SCALARS).total)
    names = set(method.state_dict())
    assert {"dino_center.center", "ibot_center.center", "teacher.dino_head.last_layer.weight_g"} <= names


def test_demo_preset():
    """The CPU demo's setting: separate heads with unit prototypes, Sinkhorn, no local crops, random masks."""
    assert DEMO.problems(DEMO_INPUTS) == []
    method = DEMO.build(DEMO_INPUTS)
    batch = batch_for(method, size=8)
    masked = batch["mask"].sum(1)
    assert (masked > 0).sum() == 8 and 3 <= masked[masked > 0].min() and masked.max() <= 25
    losses = method(batch, SCALARS)
    losses.total.backward()
    assert set(losses.terms) == {"dino_global", "ibot", "koleo"}
    assert {g.lr_scale for g in method.parameter_groups()} == {1.0}


def galaxies(size, side, generator):
    """Blobs of random width, position and colour on noise."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    u = torch.rand(5, size, 1, 1, generator=generator)
    r2 = (x - side * (0.3 + 0.4 * u[0])) ** 2 + (y - side * (0.3 + 0.4 * u[1])) ** 2
    blob = (-r2 / (2 * (1 + 4 * u[2]) ** 2)).exp()
    image = torch.stack([blob, blob * u[3], blob * u[4]], 1)
    return image


def train(method, steps, lr=2e-3, momentum=0.95, size=16):
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=lr)
    students, teachers = map(list, zip(*method.teacher_pairs(), strict=True))
    history = []
    for step in range(steps):
        image = galaxies(size, method.inputs.global_size, generator)
        crops = torch.cat([image + 0.05 * torch.randn(image.shape, generator=generator) for _ in range(2)])
        losses = method(batch_for(method, size, step, global_crops=crops), SCALARS)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(teachers, students, 1 - momentum)
        history.append(losses.terms)
    return history


def test_loss_falls():
    vit = replace(DEMO.vit, dim=48, depth=2)
    method = replace(DEMO, vit=vit, head=Head(128, 64, 32), ibot_head=Head(128, 64, 32)).build(DEMO_INPUTS)
    history = train(method, 40)
    for name in ("dino_global", "ibot"):
        first = sum(h[name].item() for h in history[:5]) / 5
        last = sum(h[name].item() for h in history[-5:]) / 5
        assert last < 0.92 * first, name  # 0.79 +- 0.02 and 0.83 +- 0.02 over 8 seeds


def test_collapse_is_seen():
    """The encoder comes to give every image one point: effective rank 1, and the assignments of a single row."""
    vit = replace(DEMO.vit, dim=48, depth=2)
    method = replace(DEMO, vit=vit, head=Head(256, 64, 32), ibot_head=Head(256, 64, 32)).build(DEMO_INPUTS)

    def look(steps):
        for step in range(steps):
            with torch.no_grad():
                method(batch_for(method, 64, step), SCALARS)
        return method.monitor()

    assert method.monitor() == {} and method.warnings({}) == []
    healthy = look(17)
    assert healthy["effective_rank"] > 10 and healthy["window_rows"] == 1024
    assert not any("effective rank" in w for w in method.warnings(healthy))
    with torch.no_grad():
        method.teacher.backbone.norm.weight.zero_()
    collapsed = look(17)
    assert collapsed["effective_rank"] == pytest.approx(1.0, abs=0.01)
    assert any("effective rank 1.0 <= 5" in w for w in method.warnings(collapsed))


@pytest.mark.parametrize(
    "change, inputs, text",
    [
        ({}, {"channels": 5}, r"vit.channels: must be the views' 5, got 3"),
        ({}, {"global_size": 18}, r"views.global_size: must be a multiple of vit.patch_size 4, got 18"),
        ({}, {"local_size": 6}, r"views.local_size: must be a multiple of vit.patch_size 4, got 6"),
        ({}, {"n_global": 1}, r"views.n_global: must be at least 2"),
        ({"centering": "mean"}, {}, r"centering: must be one of softmax, sinkhorn, got 'mean'"),
        ({"masking": "rows"}, {}, r"masking: must be one of block, random"),
        ({"readout": "max"}, {}, r"readout: must be one of cls, mean"),
        ({"attention": "fast"}, {}, r"attention: must be one of auto"),
        ({"mask_ratio": (0.5, 0.1)}, {}, r"mask_ratio: must be 0 <= low <= high <= 1, got \(0.5, 0.1\)"),
        ({"masked_crops": 1.5}, {}, r"masked_crops: must be in \[0, 1\], got 1.5"),
        ({"koleo_weight": -1.0}, {}, r"koleo_weight: must be at least 0, got -1.0"),
        ({"student_temperature": 0.0}, {}, r"student_temperature: must be positive, got 0.0"),
        ({"center_momentum": 1.0}, {}, r"center_momentum: must be in \[0, 1\)"),
        ({"sinkhorn_iterations": 0}, {}, r"sinkhorn_iterations: must be at least 1, got 0"),
        ({"head": Head(prototypes=1)}, {}, r"head.prototypes: must be at least 2, got 1"),
        ({"separate_head": True, "ibot_head": Head(hidden=0)}, {}, r"ibot_head.hidden: must be at least 1, got 0"),
        ({"vit": replace(TINY.vit, image_size=18)}, {}, r"vit.image_size: must be a multiple of patch_size 4, got 18"),
    ],
)
def test_configurations_that_are_refused(change, inputs, text):
    with pytest.raises(ValueError, match=text):
        replace(TINY, **change).build(replace(INPUTS, **inputs))


def test_batches_that_are_refused():
    method = TINY.build(INPUTS)
    batch = batch_for(method)
    with pytest.raises(ValueError, match="mask: missing from the batch"):
        method({k: v for k, v in batch.items() if not k.startswith("mask")}, SCALARS)
    with pytest.raises(ValueError, match="global_crops: needs 2 crops of each of at least one sample, got 5"):
        method({**batch, "global_crops": batch["global_crops"][:5]}, SCALARS)
    with pytest.raises(ValueError, match="local_crops: needs 3 crops of 6 samples, got 17"):
        method({**batch, "local_crops": batch["local_crops"][:17]}, SCALARS)
    with pytest.raises(ValueError, match=r"crops: sides must be positive multiples of patch_size 4, got \(18, 18\)"):
        method({**batch, "global_crops": torch.randn(12, 3, 18, 18)}, SCALARS)
