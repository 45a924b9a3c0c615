"""8-bit products of a vision transformer: it learns as with the working precision, and nothing else is touched."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from armillary.engine.plan.gpus import fp8_problems
from armillary.models.vit.vit import VisionTransformer, ViT
from armillary.recipes.dinov2_vitl import RECIPE

VIT = ViT(1, 8, 4, dim=32, depth=2, heads=2, mlp_ratio=2.0, layer_scale=1.0, drop_path=0.0)
STEPS, LAST = 80, 10


def losses(products, seed):
    """Losses of a transformer that learns, from new pictures in each step, how bright they are and where."""
    torch.manual_seed(seed)
    encoder, head = VisionTransformer(replace(VIT, products=products)), nn.Linear(32, 3)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3)
    place, found = torch.linspace(-1, 1, 8), []
    for _ in range(STEPS):
        pictures = torch.randn(32, 1, 8, 8).cumsum(2).cumsum(3) / 16
        wanted = torch.stack(
            [pictures.mean((1, 2, 3)), (pictures * place).mean((1, 2, 3)), (pictures * place[:, None]).mean((1, 2, 3))],
            1,
        )
        loss = F.mse_loss(head(encoder([pictures]).cls[0]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.slow
def test_it_learns_with_8_bit_products_as_without():
    plain, eight = losses("working", 0), losses("fp8", 0)
    assert not torch.equal(eight, plain)
    # over six seeds the losses at the end are .005 to .009 of those at the start, and .995 to 1.04 of each other
    assert plain[-LAST:].mean() < 0.05 * plain[:LAST].mean()
    assert eight[-LAST:].mean() < 1.2 * plain[-LAST:].mean()


def test_teachers_and_embeddings_stay_in_the_working_precision():
    torch.manual_seed(0)
    student = VisionTransformer(replace(VIT, products="fp8"))
    plain = VisionTransformer(VIT)
    plain.load_state_dict(student.state_dict())
    crops = [torch.randn(2, 1, 8, 8)]
    assert not torch.equal(student(crops).cls[0], plain(crops).cls[0])
    assert torch.equal(student.eval()(crops).cls[0], plain.eval()(crops).cls[0])


def test_what_cannot_be_is_said():
    assert replace(VIT, dim=40, heads=4, products="fp8").problems() == [
        'products: must be "working" unless dim and the hidden width are multiples of 16, got "fp8" for 40 and 80'
    ]
    eight = replace(RECIPE, method=replace(RECIPE.method, vit=replace(RECIPE.method.vit, products="fp8")))
    assert fp8_problems(eight, 90) == fp8_problems(RECIPE, 80) == []
    assert fp8_problems(eight, 86) == [
        "method.vit.products: needs a GPU of compute capability 8.9 or later for 8-bit products, got 8.6"
    ]
