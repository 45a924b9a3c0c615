from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from armillary.models.vit.residual_stream import materialise
from armillary.models.vit.vit import VisionTransformer, ViT
from armillary.models.vit.vit_block import _MLP

TINY = ViT(channels=3, image_size=24, patch_size=4, dim=32, depth=3, heads=2, layer_scale=0.5, drop_path=0.0)


def build(config=TINY, seed=0, **kwargs):
    """A model whose parameters all matter: class, mask and register tokens start near 0."""
    torch.manual_seed(seed)
    model = VisionTransformer(config, **kwargs).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def crops(*shapes, channels=3):
    return [torch.randn(n, channels, *((side, side) if isinstance(side, int) else side)).double() for n, side in shapes]


class WithoutNorm(torch.nn.Module):
    """The final norm left out."""

    def forward(self, stream):
        return None, materialise(stream, "reference").x


def plain(model, image, mask=None):
    """The encoder written out for one group: convolution, attention per image, gain on the outputs."""
    c, s = model.config, model.state_dict()
    x = F.conv2d(image, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=c.patch_size)
    h, w = x.shape[2:]
    x = x.flatten(2).mT
    if mask is not None:
        x = torch.where(mask[..., None], s["mask_token"], x)
    pos, side = s["pos_embed"], c.image_size // c.patch_size
    if (h, w) != (side, side):
        grid = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        how = {"scale_factor": ((h + 0.1) / side, (w + 0.1) / side)} if c.position_offset else {"size": (h, w)}
        grid = F.interpolate(grid, mode="bicubic", antialias=c.antialias, **how)
        assert grid.shape[2:] == (h, w)
        pos = torch.cat([pos[:, :1], grid.permute(0, 2, 3, 1).reshape(1, h * w, -1)], 1)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + pos
    if c.registers:
        x = torch.cat([x[:, :1], s["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    n, length, dim = x.shape
    for i in range(c.depth):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in s.items() if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (dim,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        y = F.linear(y, b["attn.qkv.weight"], b["attn.qkv.bias"]).reshape(n, length, 3, c.heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = F.linear(y.transpose(1, 2).reshape(n, length, dim), b["attn.proj.weight"], b["attn.proj.bias"])
        x = x + b["ls1.gamma"] * y
        y = F.layer_norm(x, (dim,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + b["ls2.gamma"] * F.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    x = F.layer_norm(x, (dim,), s["norm.weight"], s["norm.bias"], 1e-6)
    return x[:, 0], x[:, 1 + c.registers :]


@pytest.mark.parametrize(
    ("registers", "channels", "positions"),
    [(0, 1, (0.1, False)), (3, 3, (0.1, False)), (0, 7, (0.0, False)), (3, 3, (0.0, True))],  # the last: public *_reg4
)
def test_packed_groups_equal_separate_crops(registers, channels, positions):
    offset, antialias = positions
    config = replace(TINY, registers=registers, channels=channels, position_offset=offset, antialias=antialias)
    model = build(config)
    groups = crops((2, 24), (3, 12), (1, (8, 16)), channels=channels)
    mask = torch.rand(2, 36) < 0.4
    tokens = model(groups, mask=mask)
    for i, image in enumerate(groups):
        cls, patches = plain(model, image, mask if i == 0 else None)
        torch.testing.assert_close(tokens.cls[i], cls)
        torch.testing.assert_close(tokens.patches[i], patches)


@pytest.mark.parametrize("registers", [0, 2])
def test_bare_patches_are_a_set(registers):
    """Without class token, registers and positions, whatever these are; the order of patches does not matter."""
    model = build(replace(TINY, registers=registers))
    groups = crops((2, 24), (3, (8, 16)))
    tokens = model(groups, patches_only=True)
    assert tokens.cls == ()
    twin = build(replace(TINY, registers=0))
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k != "register_tokens"})
    with torch.no_grad():
        twin.cls_token.fill_(float("nan"))  # of no effect
        twin.pos_embed.fill_(float("nan"))
    for image, patches, again in zip(groups, tokens.patches, twin(groups, patches_only=True).patches, strict=True):
        assert torch.equal(again, patches)
        rows = image.roll(4, 2)  # one row of patches on
        moved = (
            model([rows], patches_only=True)
            .patches[0]
            .unflatten(1, (image.shape[2] // 4, -1))
            .roll(-1, 1)
            .flatten(1, 2)
        )
        torch.testing.assert_close(moved, patches)
        torch.testing.assert_close(patches, bare_by_hand(model, image))


def bare_by_hand(model, image):
    """The blocks written out, on the patches alone."""
    s = model.state_dict()
    x = F.conv2d(image, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=4).flatten(2).mT
    for i in range(model.config.depth):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in s.items() if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (32,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        q, k, v = F.linear(y, b["attn.qkv.weight"], b["attn.qkv.bias"]).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + b["ls1.gamma"] * F.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (32,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + b["ls2.gamma"] * F.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return F.layer_norm(x, (32,), s["norm.weight"], s["norm.bias"], 1e-6)


def test_bare_patches_on_kernels(device, poison_empty):
    """Values and gradients of both implementations; tokens that are left out get no gradient."""
    images = [x.to(device, torch.float32) for x in crops((2, 24), (3, (8, 12)))]
    results = []
    for impl in ("reference", "triton"):
        model = build(replace(TINY, depth=1, registers=1), impl=impl).to(device, torch.float32)
        patches = model(images, patches_only=True).patches
        sum(x.sin().sum() for x in patches).backward()
        unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert unused == {"cls_token", "pos_embed", "register_tokens", "mask_token"}
        results.append([*patches, *(p.grad for n, p in model.named_parameters() if n not in unused)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_triton_equals_the_reference(masked, registers, device, poison_empty):
    """Two groups, one of them with an interpolated position embedding: every output and every gradient."""
    config = replace(TINY, depth=1, registers=registers)
    images = [x.to(device, torch.float32) for x in crops((2, 24), (3, (8, 12)))]
    mask = (torch.rand(2, 36) < 0.4).to(device) if masked else None
    results = []
    for impl in ("reference", "triton"):
        model = build(config, impl=impl).to(device, torch.float32)
        tokens = model(images, mask)
        value = sum(x.sin().sum() for x in (*tokens.cls, *tokens.patches))
        value.backward()
        assert (model.mask_token.grad is None) == (not masked)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*tokens.cls, *tokens.patches, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def gradients(model, value):
    params = [p for p in model.parameters()]
    grads = torch.autograd.grad(value, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


@pytest.mark.parametrize("selected", ["some", "none", "all", "one crop only"])
@pytest.mark.parametrize("registers", [0, 2])
def test_last_block_computes_only_what_is_selected(selected, registers):
    """Same values and same gradients as the full block."""
    model = build(replace(TINY, registers=registers))
    groups = crops((3, 24), (2, 8))
    mask = {
        "some": torch.rand(3, 36) < 0.3,
        "none": torch.zeros(3, 36, dtype=torch.bool),
        "all": torch.ones(3, 36, dtype=torch.bool),
        "one crop only": torch.arange(3)[:, None].expand(3, 36) == 1,
    }[selected]
    select = mask.flatten().nonzero().squeeze(1)
    full, some = model(groups, mask=mask), model(groups, mask=mask, select=select)
    expected = full.patches[0].flatten(0, 1)[select]
    assert len(some.patches) == 1
    torch.testing.assert_close(some.patches[0], expected)
    weights = [torch.randn_like(x) for x in (*full.cls, expected)]
    values = []
    for cls, patches in ((full.cls, expected), (some.cls, some.patches[0])):
        for a, b in zip(cls, full.cls, strict=True):
            torch.testing.assert_close(a, b)
        values.append(sum((w * x).sum() for w, x in zip(weights, (*cls, patches), strict=True)))
    for a, b in zip(gradients(model, values[1]), gradients(model, values[0]), strict=True):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing_changes_nothing():
    config = replace(TINY, drop_path=0.4)
    results = []
    for checkpointing in (False, True):
        model = build(config, checkpoint_activations=checkpointing)
        torch.manual_seed(1)
        tokens = model(crops((4, 24), (6, 12)), select=torch.tensor([0, 5, 40, 143]))
        value = sum(x.square().sum() for x in (*tokens.cls, *tokens.patches))
        results.append([value, *gradients(model, value)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("select", [None, torch.tensor([3, 36, 70])], ids=["all tokens", "selected"])
def test_drop_path_keeps_the_expectation(select):
    """Over many draws a one-block model's mean output is that without stochastic depth.

    The final norm is left out and the attention branch silenced, so that the output is linear in the MLP branch.
    """
    config = replace(TINY, depth=1, drop_path=0.5)
    model = build(config).train()
    model.norm = WithoutNorm()
    with torch.no_grad():
        model.blocks[0].ls1.gamma.zero_()
    groups = crops((2, 24), (5, 12))
    out = torch.stack([torch.cat(model(groups, select=select).cls) for _ in range(600)]).detach()
    expected = torch.cat(model.eval()(groups, select=select).cls)
    spread = out.std(0) / 600**0.5
    assert (out.mean(0) - expected).abs().le(5 * spread + 1e-12).all()
    assert spread.max() > 1e-3  # branches were dropped


@pytest.mark.parametrize("n, rate, kept", [(90, 0.3, 62), (10, 0.3, 7), (1, 0.9, 1), (3, 0.5, 1), (4, 0.25, 3)])
def test_drop_path_subset_sizes_and_scale(n, rate, kept):
    """int(n (1 - p)) of the floats, at least one: 90 at 0.3 keep 62. Sample and scale are told from the outputs."""
    model = build(replace(TINY, depth=1, drop_path=rate)).train()
    model.norm = WithoutNorm()
    with torch.no_grad():
        model.blocks[0].ls1.gamma.zero_()
    image = crops((n, 4))
    model.eval()
    residual = model(image).patches[0][:, 0]
    with torch.no_grad():
        gain = model.blocks[0].ls2.gamma.clone()
        model.blocks[0].ls2.gamma.zero_()
        start = model(image).patches[0][:, 0]
        model.blocks[0].ls2.gamma.copy_(gain)
    for out in (model.train()(image).patches[0][:, 0], model(image, select=torch.arange(n)).patches[0]):
        ratio = ((out - start) / (residual - start)).median(1).values
        assert int((ratio.abs() > 1e-9).sum()) == kept
        torch.testing.assert_close(ratio[ratio.abs() > 1e-9], torch.full((kept,), n / kept).double())


def test_drop_path_draws_from_the_global_generator():
    model = build(replace(TINY, drop_path=0.5)).train()
    groups = crops((6, 24))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(groups).cls[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_gradients_through_stochastic_depth():
    model = build(replace(TINY, depth=2, dim=8, heads=1, drop_path=0.4, image_size=8)).train()
    groups = crops((3, 8), (4, 4))

    def value(*params):
        torch.manual_seed(3)
        state = dict(zip([n for n, _ in model.named_parameters()], params, strict=True))
        tokens = torch.func.functional_call(model, state, (groups,), {"select": torch.tensor([1, 4])})
        return sum(x.sin().sum() for x in (*tokens.cls, *tokens.patches))

    assert torch.autograd.gradcheck(value, [p for p in model.parameters()], fast_mode=True)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_mlp_kernels_equal_the_reference(gelu, checkpointing, device):
    """One state dict, one result: values and gradients of the MLP, trained and frozen."""
    mlps = {impl: _MLP(24, 52, gelu, impl).to(device) for impl in ("reference", "triton")}
    mlps["triton"].load_state_dict(mlps["reference"].state_dict())
    x, gain, dy = torch.randn(37, 24, device=device), torch.rand(24, device=device), torch.randn(37, 24, device=device)
    results = []
    for mlp in mlps.values():
        leaves = [x.clone().requires_grad_(), gain.clone().requires_grad_()]
        y = checkpoint(mlp, *leaves, use_reentrant=False) if checkpointing else mlp(*leaves)
        with torch.no_grad():
            torch.testing.assert_close(mlp(x, gain), y)
        results.append([y, *torch.autograd.grad(y, [*leaves, *mlp.parameters()], dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16():
    model = build(replace(TINY, drop_path=0.3)).bfloat16().train()
    tokens = model([torch.randn(4, 3, 24, 24), torch.randn(6, 3, 12, 12)], mask=torch.rand(4, 36) < 0.3)
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in (*tokens.cls, *tokens.patches))
    sum(x.float().square().sum() for x in tokens.cls).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_initialisation():
    model = VisionTransformer(replace(TINY, dim=64, depth=2, layer_scale=1e-5, registers=1))
    weight = model.blocks[1].mlp.fc1.weight
    assert abs(weight.std().item() - 0.02) < 1e-3 and not model.blocks[0].attn.qkv.bias.any()
    assert abs(model.pos_embed.std().item() - 0.02) < 2e-3
    assert 0 < model.cls_token.abs().max() < 1e-4 and not model.mask_token.any()
    assert torch.equal(model.blocks[0].ls1.gamma, torch.full((64,), 1e-5))
    bound = (3 * 4 * 4) ** -0.5  # PyTorch's default for the convolution
    assert 0.9 * bound < model.patch_embed.proj.weight.abs().max() <= bound


def test_public_names_and_size():
    """ViT-L/12: 343 tensors and 302,954,496 parameters."""
    with torch.device("meta"):
        model = VisionTransformer(ViT())
        registers = VisionTransformer(replace(ViT(), registers=4))
    state = model.state_dict()
    assert len(state) == 343 and sum(p.numel() for p in state.values()) == 302_954_496
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert shapes["pos_embed"] == (1, 145, 1024) and shapes["mask_token"] == (1, 1024)
    assert shapes["patch_embed.proj.weight"] == (1024, 3, 12, 12)
    assert shapes["blocks.23.attn.qkv.weight"] == (3072, 1024) and shapes["blocks.0.ls2.gamma"] == (1024,)
    assert tuple(registers.state_dict()["register_tokens"].shape) == (1, 4, 1024)


def test_flops():
    """Teacher of AstroCLIP: 290 tokens, 179.3 GFLOP; its last block spends 5.1 of them on tokens nobody reads."""
    vit = ViT()
    assert 2 * vit.flops(144) == pytest.approx(179.3e9, rel=3e-3)
    assert 2 * (vit.flops(144) - vit.flops(144, selected=1 + 21.6)) == pytest.approx(5.1e9, rel=0.05)
    assert 3 * (2 * vit.flops(144, kept=0.7) + 8 * vit.flops(60, kept=0.7)) == pytest.approx(641.4e9, rel=3e-3)
    assert vit.flops(144, selected=145) == pytest.approx(vit.flops(144))
    assert (
        0.98 < vit.flops(144, patches_only=True) / vit.flops(144) < 0.994
    )  # 144 tokens of 145, attention their square


def test_bad_inputs():
    model = build()
    with pytest.raises(
        ValueError, match=r"crops: must be \[N, 3, S, S\] for a model of 3 channels, got \(2, 4, 24, 24\)"
    ):
        model([torch.zeros(2, 4, 24, 24)])
    with pytest.raises(ValueError, match=r"crops: sides must be positive multiples of patch_size 4, got \(24, 26\)"):
        model([torch.zeros(2, 3, 24, 26)])
    with pytest.raises(ValueError, match=r"mask: must be \(2, 36\), crops and patches, got \(2, 35\)"):
        model(crops((2, 24)), mask=torch.zeros(2, 35, dtype=torch.bool))
    with pytest.raises(ValueError, match="patches_only: takes neither mask nor select"):
        model(crops((2, 24)), mask=torch.zeros(2, 36, dtype=torch.bool), patches_only=True)
    with pytest.raises(ValueError, match=r"crops: sides must be positive multiples"):
        model([torch.zeros(2, 3, 24, 26)], patches_only=True)
    with pytest.raises(ValueError, match=r"image_size: must be a multiple of patch_size 5, got 24.*heads: must divide"):
        VisionTransformer(replace(TINY, patch_size=5, heads=3))
    with pytest.raises(ValueError, match="backend: must be one of"):
        VisionTransformer(TINY, backend="fast")
    with pytest.raises(ValueError, match="crop side: must be a positive multiple of patch_size 4, got 10"):
        TINY.patches(10)
    for change, text in {
        "depth": "depth: must be at least 1, got 0",
        "registers": "registers: must be at least 0, got -1",
        "drop_path": r"drop_path: must be in \[0, 1\), got 1.0",
        "mlp_ratio": "mlp_ratio: must give a hidden width",
    }.items():
        value = {"depth": 0, "registers": -1, "drop_path": 1.0, "mlp_ratio": 0.0}[change]
        with pytest.raises(ValueError, match=text):
            VisionTransformer(replace(TINY, **{change: value}))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("select", [None, torch.tensor([0, 3, 5])], ids=["all tokens", "selected"])
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_kernels_equal_the_reference(drop_path, select, checkpointing, device, poison_empty):
    """Forward and every gradient, with the same draws of stochastic depth; two groups of crops and registers."""
    config = replace(TINY, depth=2, image_size=8, drop_path=drop_path, registers=1)
    groups = [crop.float().to(device) for crop in crops((2, 8), (4, 4))]
    select = None if select is None else select.to(device)
    results = []
    for impl in ("triton", "reference"):
        model = build(config, impl=impl, checkpoint_activations=checkpointing).float().to(device)
        torch.manual_seed(1)
        tokens = model(groups, select=select)
        weights = [torch.linspace(-1, 1, x.numel(), device=device).view_as(x) for x in (*tokens.cls, *tokens.patches)]
        value = sum((w * x).sum() for w, x in zip(weights, (*tokens.cls, *tokens.patches), strict=True))
        results.append([*tokens.cls, *tokens.patches, *gradients(model, value)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, b.abs().max().item()))
