"""Patches: attention against the block's own output, likeness and colours by hand, the page's sections."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.evaluate import Options, Study
from armillary.engine.evaluate.embedding.embeddings import stack_splits
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.embedding.patches import class_attention, patch_encode, patch_tokens
from armillary.engine.evaluate.patches.regions import Regions
from armillary.engine.evaluate.patches.task import patches
from armillary.engine.evaluate.runs.tasks import TASKS
from armillary.engine.evaluate.study.study import FeatureSet
from armillary.models.vit.vit import VisionTransformer, ViT

ROWS = [0, 3, 5]


class Sees(nn.Module):
    """A method with a vision transformer of patches of 4 pixels."""

    def __init__(self, registers=0):
        super().__init__()
        torch.manual_seed(0)
        shape = ViT(channels=3, image_size=16, patch_size=4, dim=12, depth=2, heads=3, layer_scale=1.0, drop_path=0.0)
        self.encoder = VisionTransformer(ViT(**{**vars(shape), "registers": registers}))
        for p in self.encoder.parameters():  # so that attention is not even
            nn.init.normal_(p, std=0.5)
        self.requires_grad_(False).eval()

    def encoders(self):
        return {"image": "encoder."}


class Crop:
    packed = False

    def __call__(self, image, valid):
        return image


@pytest.fixture(scope="module")
def encoder():
    return Encoder(Sees(), EvalView(Crop()), {}, SimpleNamespace(name="sees <all>"))


@pytest.mark.parametrize("registers", [0, 2])
def test_attention_makes_what_the_block_makes(registers):
    network, inside = Sees(registers).encoder, {}
    attn = network.blocks[-1].attn
    attn.qkv.register_forward_hook(lambda module, args, out: inside.update(qkv=out[0]))
    attn.proj.register_forward_hook(lambda module, args, out: inside.update(mixed=args[0]))
    crop = torch.randn(2, 3, 16, 8)
    weights = class_attention(network, crop)
    assert weights.shape == (2, 3, 4, 2)
    qkv = inside["qkv"].reshape(2, -1, 3, 3, 4)
    skip = 1 + registers
    scores = torch.einsum("bhd,blhd->bhl", qkv[:, 0, 0], qkv[:, :, 1]) / 2
    others = scores.softmax(-1)[..., :skip]
    torch.testing.assert_close(weights.sum((2, 3)), 1 - others.sum(2))
    mixed = torch.einsum("bhl,blhd->bhd", torch.cat([others, weights.flatten(2)], 2), qkv[:, :, 2])
    torch.testing.assert_close(mixed.flatten(1), inside["mixed"].reshape(2, -1, 12)[:, 0], rtol=1e-4, atol=1e-5)


def test_tokens_lie_row_by_row(encoder):
    network, crop = encoder.method.encoder, torch.randn(2, 3, 16, 8)
    tokens = patch_tokens(network, crop)
    assert tokens.shape == (2, 4, 2, 12)
    torch.testing.assert_close(tokens.flatten(1, 2), network([crop]).patches[0])
    torch.testing.assert_close(encoder.pipeline("patches").encode({"crop": crop})["patches"], tokens.flatten(1))
    with pytest.raises(ValueError, match="needs a vision transformer that reads images, got Linear"):
        patch_encode(Linear(2, 2))


class Linear(nn.Linear):
    def encoders(self):
        return {}


def test_likeness_and_its_errors(survey_dir, encoder):
    regions = Regions.of(encoder, survey_dir, ROWS)
    assert regions.crop.shape == (3, 3, 16, 16) and regions.attention.shape == (3, 3, 4, 4)
    found = regions.similarity(1, 2, 3)
    a, b = regions.tokens[1, 2, 3], regions.tokens[2, 0, 1]
    assert found.shape == (3, 4, 4) and found[1, 2, 3] == pytest.approx(1, abs=1e-5)
    assert found[2, 0, 1] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    with pytest.raises(IndexError, match=r"patch: must be in \(3, 4, 4\) \(image, row, column\), got \(0, 4, 0\)"):
        regions.similarity(0, 4, 0)
    blind = Encoder(Linear(2, 2), EvalView(Crop()), {}, SimpleNamespace(name="blind"))
    with pytest.raises(ValueError, match="blind: must read images with a vision transformer"):
        Regions.of(blind, survey_dir, ROWS)


def test_colours_tell_tokens_apart():
    tokens = np.random.default_rng(0).normal(0, 0.01, (2, 4, 4, 6)).astype(np.float32)
    tokens[:, 1:3, 1:3, 0] += 5  # a galaxy in the middle
    colours = Regions(np.zeros((2, 3, 16, 16)), tokens, np.ones((2, 1, 4, 4))).colours()
    assert colours.shape == (2, 4, 4, 3) and colours.dtype == np.uint8
    assert (colours[:, 1:3, 1:3, 0] > 250).all() and (colours[:, 0, :, 0] < 5).all()
    tokens[0] += np.array([0, 9, 0, 0, 0, 0], np.float32)  # another kind of galaxy
    apart = Regions(np.zeros((2, 3, 16, 16)), tokens, np.ones((2, 1, 4, 4)))
    inside = 32 * (4 / 16) * (12 / 16) * 25  # patches, shares of centre and rim, squared step
    assert apart.within == pytest.approx(inside / (inside + 32 * 4.5**2), rel=0.01)  # noise of .01
    colours = apart.colours(within=True)
    assert (colours[:, 1:3, 1:3, 0] > 250).all() and (colours[:, 0, :, 0] < 5).all()
    alike = Regions(np.zeros((1, 3, 8, 8)), np.ones((1, 2, 1, 2), np.float32), np.ones((1, 1, 2, 1))).colours()
    assert alike.shape == (1, 2, 1, 3)


def test_the_page_has_parts_and_likeness(survey_dir, encoder):
    rows = np.arange(80)
    split = {"test": (rows[48:], np.ones((32, 2), np.float32)), "train": (rows[:48], np.ones((48, 2), np.float32))}
    study = Study.open(survey_dir, [FeatureSet("features", "image", stack_splits(survey_dir, split, {}))])
    outcome = patches(study, Options(), [encoder])
    text = "".join(outcome.sections)
    assert "Parts of galaxies" in text and "Likeness of regions" in text and "sees &lt;all&gt;" in text
    assert text.count("data:image/png") == 8 * (4 + 3 + 2)
    (told,), (measure,) = outcome.lines, outcome.measures
    assert 0 < measure.value < 1 and f"{measure.value:.0%} of their variance is within galaxies" in told
    task = TASKS["patches"]
    assert task.impossible(study.survey, [encoder.method], Options()) == ""
    assert "vision transformer" in task.impossible(study.survey, [Linear(2, 2)], Options())
