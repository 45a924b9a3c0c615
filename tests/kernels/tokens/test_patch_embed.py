"""Patch embedding: the kernels against the oracle in float64, and the oracle against a convolution."""

import pytest
import torch
import torch.nn.functional as F
from aot import ARCHITECTURES, SHARED_LIMIT, resources

from armillary.kernels.tokens import patch_embed_backward as backward
from armillary.kernels.tokens import patch_embed_forward as forward
from armillary.kernels.tokens.patch_embed import embed_crops, embed_crops_reference, patch_embed

ORDER = ("weight", "bias", "positions", "cls", "registers", "mask", "mask_token", "mean", "inv_std")
CONSTANTS = ("mask", "mean", "inv_std")


class Case:
    """Random arguments: groups of (images, rows, columns) of patches; a third of the first group's patches masked."""

    def __init__(
        self,
        groups=((3, 2, 3), (2, 1, 2)),
        channels=3,
        patch=4,
        dim=20,
        registers=0,
        masked=True,
        normalised=True,
        dtype=torch.float32,
        pixels=torch.float32,
        device="cpu",
    ):
        def random(*shape, scale=1.0, to=dtype):
            return (scale * torch.randn(*shape)).to(device, to)

        self.images = [random(n, channels, h * patch, w * patch, to=pixels) for n, h, w in groups]
        n, h, w = groups[0]
        self.named = {
            "weight": random(dim, channels, patch, patch, scale=(channels * patch**2) ** -0.5),
            "bias": random(dim),
            "positions": [random(1 + h * w, dim) for _, h, w in groups],
            "cls": random(dim),
            "registers": random(registers, dim) if registers else None,
            "mask": (torch.rand(n, h * w) < 0.35).to(device) if masked else None,
            "mask_token": random(dim) if masked else None,
            "mean": random(channels, to=torch.float32) if normalised else None,
            "inv_std": (0.5 + torch.rand(channels)).to(device) if normalised else None,
        }

    def leaves(self):
        """Names and tensors of what is differentiable."""
        found = {f"positions[{i}]": x for i, x in enumerate(self.named["positions"])}
        return found | {k: v for k, v in self.named.items() if v is not None and k not in (*CONSTANTS, "positions")}

    def run(self, function, dtype=None, frozen=(), grad=None, **kwargs):
        """Tokens and every gradient, with parameters cast to `dtype`."""

        def cast(x):
            return x if x is None or x.dtype == torch.bool or dtype is None else x.to(dtype)

        leaves = {k: cast(v.detach()).clone().requires_grad_(k not in frozen) for k, v in self.leaves().items()}
        positions = [leaves[f"positions[{i}]"] for i in range(len(self.images))]
        arguments = {k: leaves.get(k, cast(v)) for k, v in self.named.items() if k != "positions"}
        arguments["positions"] = positions
        images = self.images if dtype is None else [x.to(dtype) for x in self.images]
        out = function(images, *(arguments[k] for k in ORDER), **kwargs)
        if out.requires_grad:
            generator = torch.Generator().manual_seed(1)
            g = torch.randn(out.shape, generator=generator) if grad is None else grad
            out.backward(g.to(out.device, out.dtype))
        return {"out": out.detach()} | {k: v.grad for k, v in leaves.items() if k not in frozen}


def assert_twice_eager(case, floor=1e-6, **kwargs):
    """Error against float64 at most twice that of eager PyTorch in the same precision, for each result."""
    exact = case.run(embed_crops_reference, torch.float64)
    eager = case.run(embed_crops_reference)
    ours = case.run(embed_crops, impl="triton", **kwargs)
    for name, x in exact.items():
        assert ours[name].dtype == eager[name].dtype and ours[name].shape == x.shape, name
        error, allowed = ((y[name].double() - x).norm() for y in (ours, eager))
        assert error <= 2 * allowed + floor * x.norm(), f"{name}: {error} against {allowed} of eager"


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"masked": False, "normalised": False},
        {"groups": ((17, 1, 1),), "registers": 1},
        {"groups": ((3, 2, 2), (1, 3, 1), (5, 1, 1)), "registers": 4, "dim": 33},
        {"channels": 1, "patch": 1, "groups": ((2, 5, 3),)},
        {"channels": 5, "patch": 5, "groups": ((2, 3, 1), (1, 1, 1)), "masked": False, "registers": 2},
        {"channels": 11, "patch": 16, "groups": ((2, 1, 2),), "dim": 8},
        {"channels": 3, "patch": 14, "groups": ((1, 2, 2),), "dim": 16, "pixels": torch.float16},
        {"channels": 3, "patch": 12, "groups": ((2, 2, 2), (2, 1, 1)), "pixels": torch.bfloat16},
    ],
    ids=lambda c: " ".join(f"{k}={v}".replace("torch.", "") for k, v in c.items()) or "two groups, masked, normalised",
)
def test_kernels_equal_the_reference(case, device, poison_empty):
    assert_twice_eager(Case(**case, device=device))


@pytest.mark.parametrize("pixels", [torch.float16, torch.float32], ids=str)
def test_float16(pixels, device):
    """Pixels far from 0: their mean has to go before they are rounded."""
    case = Case(dtype=torch.float16, pixels=pixels, registers=1, device=device)
    for image in case.images:
        image += 50
    case.named["mean"] += 50
    assert_twice_eager(case, floor=1e-4)


def test_reference_is_a_convolution():
    case = Case(registers=2)
    n, c = case.named, case.named["weight"].shape[-1]
    tokens = embed_crops_reference(case.images, *(n[k] for k in ORDER)).split([3 * (3 + 6), 2 * (3 + 2)])
    for index, (image, position) in enumerate(zip(case.images, n["positions"], strict=True)):
        x = (image - n["mean"][:, None, None]) * n["inv_std"][:, None, None]
        x = F.conv2d(x, n["weight"], n["bias"], stride=c).flatten(2).mT
        if index == 0:
            x = torch.where(n["mask"][..., None], n["mask_token"], x)
        got = tokens[index].unflatten(0, (len(image), -1))
        torch.testing.assert_close(got[:, 3:], x + position[1:])
        torch.testing.assert_close(got[:, 0], (n["cls"] + position[0]).expand(len(image), -1))
        torch.testing.assert_close(got[:, 1:3], n["registers"].expand(len(image), -1, -1))


def test_one_group_is_the_same_by_crop(device):
    case = Case(groups=((3, 2, 3),), registers=2, device=device)
    arguments = [case.named[k] for k in ORDER]
    arguments[2] = arguments[2][0]
    tokens = patch_embed(case.images[0], *arguments, impl="triton")
    assert tokens.shape == (3, 9, 20)
    assert torch.equal(tokens.flatten(0, 1), case.run(embed_crops, impl="triton")["out"])


def test_gradcheck_of_the_reference():
    case = Case(groups=((2, 1, 2), (1, 1, 1)), channels=2, patch=2, dim=3, registers=1)
    leaves = {k: v.double().requires_grad_() for k, v in case.leaves().items()}
    images = [x.double().requires_grad_() for x in case.images]
    constants = {k: case.named[k] for k in ("mask", "mean", "inv_std")}

    def function(*values):
        named = dict(zip(leaves, values, strict=False)) | constants
        named["positions"] = values[: len(images)]
        return embed_crops(values[-len(images) :], *(named[k] for k in ORDER))

    assert torch.autograd.gradcheck(function, (*leaves.values(), *images))


@pytest.mark.parametrize("groups", [((0, 1, 2),), ((0, 2, 2), (2, 1, 1)), ((2, 1, 1), (0, 2, 2))], ids=str)
def test_no_crops(groups, device, poison_empty):
    assert_twice_eager(Case(groups, registers=1, device=device))


@pytest.mark.parametrize("share", ["none", "all"])
def test_masks_of_one_kind(share, device):
    case = Case(device=device)
    case.named["mask"].fill_(share == "all")
    got = case.run(embed_crops, impl="triton")
    assert_twice_eager(case)
    assert got["mask_token"].any() == (share == "all")


def test_a_masked_patch_counts_for_nothing(device):
    """Neither its pixels, which may be no numbers, nor its gradient reach other tokens, the weight or the bias."""
    case = Case(groups=((3, 2, 3),), device=device)
    mask = case.named["mask"]
    assert mask.any() and not mask.all()
    expected = case.run(embed_crops, impl="triton")
    hidden = mask.unflatten(1, (2, 3)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    case.images[0].masked_fill_(hidden[:, None], float("nan"))
    got = case.run(embed_crops, impl="triton")
    assert all(torch.equal(got[k], x) for k, x in expected.items())
    grad = torch.zeros(3, 7, 20, device=device)
    grad[:, 1:][mask] = 1e30
    got = case.run(embed_crops, impl="triton", grad=grad.flatten(0, 1))
    assert not got["weight"].any() and not got["bias"].any() and not got["cls"].any() and got["mask_token"].all()


def test_a_bad_pixel_stays_in_its_patch(device):
    case = Case(groups=((3, 2, 3),), masked=False, device=device)
    expected = case.run(embed_crops, impl="triton")["out"]
    case.images[0][1, 2, 5, 9] = float("nan")  # row 1, column 2
    got = case.run(embed_crops, impl="triton")["out"]
    spoilt = 7 + 1 + 1 * 3 + 2
    assert got[spoilt].isnan().all()
    got[spoilt] = expected[spoilt]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("only", ["weight", "bias", "positions[1]", "mask_token", None])
def test_gradients_of_what_is_trained_only(only, device):
    case = Case(device=device)
    frozen = [k for k in case.leaves() if k != only]
    got = case.run(embed_crops, impl="triton", frozen=frozen)
    assert list(got) == (["out"] if only is None else ["out", only])
    if only is not None:
        torch.testing.assert_close(got[only], case.run(embed_crops, impl="triton")[only])


def test_deterministic_and_inputs_left_alone(device):
    case = Case(groups=((9, 2, 2), (3, 1, 2)), registers=1, device=device)
    before = [x.clone() for x in (*case.images, *case.leaves().values())]
    first, second = (case.run(embed_crops, impl="triton") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(a, b) for a, b in zip(before, (*case.images, *case.leaves().values()), strict=True))
    with torch.no_grad():
        assert torch.equal(case.run(embed_crops, impl="triton", frozen=case.leaves())["out"], first["out"])


def test_saves_no_parameter(device):
    case = Case(registers=1, device=device)
    leaves = {k: v.requires_grad_() for k, v in case.leaves().items()}
    parameters = {x.untyped_storage().data_ptr() for x in leaves.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        embed_crops(case.images, *(case.named[k] for k in ORDER), impl="triton")
    assert saved and not parameters & {x.untyped_storage().data_ptr() for x in saved}


def test_second_derivatives_are_refused(device):
    case = Case(device=device)
    weight = case.named["weight"].requires_grad_()
    out = embed_crops(case.images, *(case.named[k] for k in ORDER), impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_casts_the_parameters(device):
    case = Case(groups=((2, 1, 2),), device=device)
    with torch.autocast(device, torch.float16):
        out = embed_crops(case.images, *(case.named[k] for k in ORDER), impl="triton")
    assert out.dtype == torch.float16
    expected = embed_crops(case.images, *(case.named[k] for k in ORDER))
    torch.testing.assert_close(out.float(), expected, rtol=0.0, atol=1e-2)


@pytest.mark.parametrize(
    "change, text",
    {
        "weight not square": ({"weight": torch.zeros(20, 3, 4, 5)}, "weight must be floating point and of square"),
        "weight flat": ({"weight": torch.zeros(20, 48)}, r"weight must have shape \[D, C, p, p\], got \[20, 48\]"),
        "bands": (
            {"weight": torch.zeros(20, 4, 4, 4)},
            r"images\[0\] must have shape \[N, 4, H, W\], got \[3, 3, 8, 12\]",
        ),
        "patch": (
            {"weight": torch.zeros(20, 3, 5, 5)},
            r"images\[0\] must .* positive multiples of 5, got torch.float32",
        ),
        "bias": ({"bias": torch.zeros(19)}, r"bias must have shape \[20\], got \[19\]"),
        "dtype": ({"cls": torch.zeros(20).half()}, "cls must be torch.float32, got torch.float16"),
        "positions": (
            {"positions": [torch.zeros(7, 20)]},
            r"positions must be as many as images, at least one \(2\), got 1",
        ),
        "position": (
            {"positions": [torch.zeros(6, 20)] * 2},
            r"positions\[0\] must have shape \[7, 20\], got \[6, 20\]",
        ),
        "registers": ({"registers": torch.zeros(2, 1, 20)}, r"registers must have shape \[R, 20\]"),
        "mask shape": ({"mask": torch.zeros(3, 5) > 0}, r"mask must have shape \[3, 6\], got \[3, 5\]"),
        "mask dtype": ({"mask": torch.zeros(3, 6)}, "mask must be torch.bool, got torch.float32"),
        "mask alone": ({"mask_token": None}, "mask_token must be given with mask, got None"),
        "mean alone": ({"inv_std": None}, "inv_std must be given with the other of mean and inv_std, got None"),
        "mean dtype": ({"mean": torch.zeros(3).half()}, "mean must be torch.float32, got torch.float16"),
        "strided": ({"positions": [torch.zeros(20, 7).T, torch.zeros(3, 20)]}, r"positions\[0\] must be contiguous"),
        "device": ({"bias": torch.zeros(20, device="meta")}, "bias must be on cpu, got meta"),
    }.values(),
    ids=lambda x: None if isinstance(x, dict) else x[:30],
)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_bad_input(change, text, impl):
    case = Case()
    named = case.named | change
    with pytest.raises(ValueError, match=f"embed_crops: {text}"):
        embed_crops(case.images, *(named[k] for k in ORDER), impl=impl)


def test_images_it_cannot_take():
    case = Case()
    arguments = [case.named[k] for k in ORDER]
    with pytest.raises(ValueError, match=r"images\[0\] must not require a gradient, except with impl=\"reference\""):
        embed_crops([case.images[0].clone().requires_grad_(), case.images[1]], *arguments, impl="triton")
    with pytest.raises(ValueError, match=r"images\[1\] must be torch.float32 or torch.bfloat16 or torch.float16, got"):
        embed_crops([case.images[0], case.images[1].double()], *arguments, impl="triton")
    with pytest.raises(ValueError, match=r"images\[1\] must be contiguous"):
        embed_crops([case.images[0], case.images[1].mT.contiguous().mT], *arguments)
    with pytest.raises(ValueError, match="images must be|positions must be"):
        embed_crops([], *arguments)
    with pytest.raises(ValueError, match="impl must be one of"):
        embed_crops(case.images, *arguments, impl="cuda")


def forward_arguments(pixels, weight, channels, registers, masked, normalised):
    signature = dict.fromkeys(("weight_ptr", "bias_ptr", "position_ptr", "cls_ptr", "out_ptr"), f"*{weight}")
    optional = {
        "registers_ptr": f"*{weight}" if registers else None,
        "mask_ptr": "*u8" if masked else None,
        "mask_token_ptr": f"*{weight}" if masked else None,
        "mean_ptr": "*fp32" if normalised else None,
        "inv_std_ptr": "*fp32" if normalised else None,
    }
    signature |= {"image_ptr": f"*{pixels}"} | dict.fromkeys(("rows", "patches", "columns", "dim"), "i32")
    signature |= {k: v for k, v in optional.items() if v}
    constants = {"C": channels, "P": 12, "REGISTERS": registers, "MASKED": masked, "NORMALISE": normalised}
    return signature, constants | {k: None for k, v in optional.items() if not v}


def assert_clean(table, kernel, signature, constants, sm):
    """One process compiles for all architectures that the table treats alike."""

    def launch(sm):
        row = table[max(key for key in table if key <= sm)]
        return dict(row.blocks), row.num_warps, row.num_stages

    blocks, warps, stages = launch(sm)
    used = resources(
        f"armillary.kernels.tokens.patch_embed_{kernel}",
        signature,
        constants | blocks,
        divisible=tuple({"dim"} & signature.keys()),
        num_warps=warps,
        num_stages=stages,
        architectures=[other for other in ARCHITECTURES if launch(other) == launch(sm)],
    )[sm]
    assert used.stack == used.local == 0, used
    assert used.shared <= SHARED_LIMIT[sm], used
    return used


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(
    "pixels, weight, channels, registers, masked, normalised",
    [("fp16", "bf16", 3, 0, True, False), ("fp32", "bf16", 5, 4, True, True), ("fp32", "fp32", 3, 0, False, False)],
)
def test_forward_compiles_without_spilling(pixels, weight, channels, registers, masked, normalised, sm):
    """The width is no compile-time argument, so these are the kernels of ViT-S, ViT-B and ViT-L alike."""
    signature, constants = forward_arguments(pixels, weight, channels, registers, masked, normalised)
    table = forward.LAUNCH_FLOAT32 if weight == "fp32" else forward.LAUNCH
    used = assert_clean(table, "forward:_patch_embed_fwd_kernel", signature, constants, sm)
    assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[sm] in used.ptx
    assert "cp.async" in used.ptx and "ld.global.b16" not in used.ptx  # four pixels at a time


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_backward_compiles_without_spilling(sm):
    signature, constants = forward_arguments("fp16", "bf16", 3, 0, True, True)
    taken = ("image_ptr", "mask_ptr", "mean_ptr", "inv_std_ptr", "out_ptr", "rows", "patches", "columns")
    signature = {k: signature[k] for k in taken}
    constants = {k: v for k, v in constants.items() if not k.endswith("_ptr")}
    used = assert_clean(backward.LAUNCH_IM2COL, "backward:_im2col_kernel", signature, constants, sm)
    assert "ld.global.b16" not in used.ptx
    signature = {"grad_ptr": "*bf16", "mask_ptr": "*u8", "sums_ptr": "*fp32"}
    signature |= dict.fromkeys(("crops", "length", "dim"), "i32")
    assert_clean(
        backward.LAUNCH_SUMS, "backward:_patch_embed_bwd_kernel", signature, {"REGISTERS": 0, "MASKED": True}, sm
    )


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [384, 1024])
def test_training_shape(dim, pixels):
    groups = ((16, 12, 12), (64, 5, 5))
    case = Case(groups, patch=12, dim=dim, registers=4, dtype=torch.bfloat16, pixels=pixels, device="cuda")
    assert_twice_eager(case, floor=1e-4)
