"""Fine-tuning: likelihoods against SciPy's, what is trained and how fast, and where the encoder comes from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from armillary.engine.config.config_json import from_json, to_json, type_problems
from armillary.models.method import Batch, BatchKey, InputSpec
from armillary.models.supervised.finetune import FineTune
from armillary.models.supervised.label_losses import Classes, Gaussian, Mix, Votes
from armillary.models.vit.low_rank import is_adapter
from armillary.models.vit.vit import ViT

NAN = float("nan")
VIT = ViT(channels=3, image_size=8, patch_size=4, dim=16, depth=3, heads=2, layer_scale=0.5, drop_path=0.0)


def spec(*names, mean=0.5, std=2.0):
    return InputSpec(
        channels=3,
        global_size=8,
        n_global=1,
        targets=names,
        target_mean=(mean,) * len(names),
        target_std=(std,) * len(names),
    )


def standardised(values, mean=0.5, std=2.0):
    return (torch.tensor(values, dtype=torch.float32) - mean) / std


def test_numbers_have_the_likelihood_of_a_normal_distribution():
    inputs = spec("z", "m")
    out = torch.tensor([[0.3, -1.0, 0.5, -0.2], [1.0, 0.0, 0.1, 0.3], [0.0, 2.0, 0.0, 0.0]])
    y = torch.tensor([[0.5, NAN], [NAN, 1.0], [1.0, -1.0]])
    parts = Gaussian().loss(out, y, inputs)
    mu, sigma = out[:, :2].numpy(), np.exp(out[:, 2:].numpy())
    nll = -stats.norm.logpdf(y.numpy(), mu, sigma)
    np.testing.assert_allclose([float(v) for v in parts.values()], np.nansum(nll, 0) / 4, rtol=1e-5)
    said = Gaussian().said(out, inputs)
    torch.testing.assert_close(said["prediction"], out[:, :2] * 2 + 0.5)
    torch.testing.assert_close(said["sigma"], out[:, 2:].exp() * 2)


def test_votes_have_the_likelihood_of_a_dirichlet_multinomial():
    names = ("a", "b", "q_votes", "c", "d", "e", "r_votes")
    inputs, loss = spec(*names), Votes((2, 3))
    labels = [[0.25, 0.75, 8, 0.5, 0.5, 0.0, 4], [1.0, 0.0, 3, NAN, NAN, NAN, 0], [NAN, NAN, NAN, 0.2, 0.2, 0.6, 5]]
    out = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    parts = loss.loss(out, standardised(labels), inputs)
    alpha = 1 + 100 / (1 + np.exp(-out.double().numpy()))
    q = [stats.dirichlet_multinomial(alpha[i, :2], n).logpmf(k) for i, k, n in ((0, [2, 6], 8), (1, [3, 0], 3))]
    r = [stats.dirichlet_multinomial(alpha[i, 2:], n).logpmf(k) for i, k, n in ((0, [2, 2, 0], 4), (2, [1, 1, 3], 5))]
    assert list(parts) == ["q_votes", "r_votes"]
    np.testing.assert_allclose([float(v) for v in parts.values()], [-np.mean(q), -np.mean(r)], rtol=1e-4)
    share = loss.said(out, inputs)["share"]
    torch.testing.assert_close(share[:, :2].sum(1), torch.ones(3))
    torch.testing.assert_close(share[:, 2:].sum(1), torch.ones(3))
    assert loss.shares(inputs) == ("a", "b", "c", "d", "e")


def test_classes_have_weights_smoothing_and_unknown_samples():
    inputs = spec("type")
    out = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    y = standardised([[0.0], [2.0], [NAN], [2.0]])
    loss = Classes(("E", "S0", "S"), weights=(1.0, 1.0, 3.0), smoothing=0.1)
    each = torch.nn.functional.cross_entropy(
        out[[0, 1, 3]], torch.tensor([0, 2, 2]), torch.tensor([1.0, 1.0, 3.0]), label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(loss.loss(out, y, inputs)["type"], each.mean())
    assert loss.said(out, inputs)["prediction"].tolist() == out.argmax(1, keepdim=True).tolist()
    with pytest.raises(ValueError, match=r"type: must be in 0 \.\. 2, the classes, got 3"):
        loss.loss(out, standardised([[0.0], [3.0], [1.0], [1.0]]), inputs)


@pytest.mark.parametrize("labels", [Gaussian(), Classes(("a", "b")), Votes((2,))], ids=["numbers", "classes", "votes"])
def test_nothing_known_is_a_loss_and_gradients_of_nought(labels):
    inputs = spec(*{"Gaussian": ("z",), "Classes": ("t",), "Votes": ("a", "b", "n")}[type(labels).__name__])
    out = torch.randn(3, labels.outputs(inputs), requires_grad=True)
    total = torch.stack(list(labels.loss(out, torch.full((3, len(inputs.targets)), NAN), inputs).values())).sum()
    total.backward()
    assert float(total.detach()) == 0.0 and out.grad.abs().max() == 0.0


def built(**changes):
    torch.manual_seed(0)
    return FineTune(encoder=VIT, **changes).build(spec("z", "m"))


def batch(size=6):
    torch.manual_seed(1)
    return Batch(crop=torch.randn(size, 3, 8, 8), targets=torch.randn(size, 2))


def test_the_head_alone_leaves_the_encoder_as_it_is(tmp_path):
    method = built(trained="head", image_from=tmp_path)
    method.train()
    assert not method.encoder.training and method.head.training
    names = {name for group in method.parameter_groups() for name in group.params}
    assert names == {"head.weight", "head.bias"}
    method(batch(), {}).total.backward()
    assert all(p.grad is None for p in method.encoder.parameters()) and method.head.weight.grad.abs().max() > 0


def test_lora_trains_the_head_and_the_adapters(tmp_path):
    method = built(trained="lora", lora_rank=2, image_from=tmp_path, layer_decay=1.0)
    names = {name for group in method.parameter_groups() for name in group.params}
    assert names == {n for n, _ in method.named_parameters() if n.startswith("head.") or is_adapter(n)}
    method(batch(), {}).total.backward()
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    assert set(grads) == names and all(g.abs().max() > 0 for n, g in grads.items() if not n.endswith(".down"))


def mixed(method, size, first=0):
    rows = batch(16)
    rows["targets"][6, 0] = NAN  # so 6 and 7 are not mixed
    part = slice(first, first + size)
    part_of = Batch(crop=rows["crop"][part], targets=rows["targets"][part], position=torch.arange(16)[part])
    return method.prepare(part_of, BatchKey(seed=3, epoch=1, first_position=0, global_batch=16))


def test_mixtures_do_not_depend_on_the_number_of_ranks():
    method = built(mixup=0.4)
    whole, parts = mixed(method, 16), [mixed(method, 4, first) for first in (0, 4, 8, 12)]
    assert torch.equal(torch.cat([p["mix_share"] for p in parts]), whole["mix_share"])
    assert torch.equal(torch.cat([p["mix_partner"] + 4 * i for i, p in enumerate(parts)]), whole["mix_partner"])
    pairs = torch.arange(16).reshape(8, 2).flip(1).flatten()
    pairs[6:8] = torch.arange(6, 8)
    assert torch.equal(whole["mix_partner"], pairs)
    share = whole["mix_share"].reshape(8, 2)
    assert torch.equal(share[:, 0], share[:, 1]) and share[3].tolist() == [1, 1] and (share < 1).sum() == 14
    assert (mixed(method, 5)["mix_share"][4], mixed(built(), 4).get("mix_share")) == (1.0, None)


def test_shares_follow_the_beta_distribution():
    method, n = built(mixup=0.4), 4000
    rows = Batch(crop=torch.zeros(n, 1), targets=torch.zeros(n, 2), position=torch.arange(n))
    share = method.prepare(rows, BatchKey(0, 0, 0, n))["mix_share"][::2].numpy()
    assert stats.kstest(share, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3  # a fixed draw


def test_mixed_samples_have_mixed_crops_and_labels():
    method = built(mixup=0.4).eval()
    made = mixed(method, 4)
    share, other = made["mix_share"], made["mix_partner"]
    by_hand = Batch(
        crop=share.reshape(4, 1, 1, 1) * made["crop"] + (1 - share.reshape(4, 1, 1, 1)) * made["crop"][other],
        targets=share[:, None] * made["targets"] + (1 - share[:, None]) * made["targets"][other],
    )
    torch.testing.assert_close(method(made, {}).total, method(by_hand, {}).total)


def test_classes_of_mixed_samples_count_by_their_shares():
    inputs, loss = spec("type"), Classes(("a", "b", "c"), smoothing=0.1)
    out = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    y = standardised([[0.0], [2.0]])
    found = loss.loss(out, y, inputs, Mix(torch.tensor([1, 0]), torch.tensor([0.7, 0.7])))["type"]
    soft = torch.tensor([[0.7, 0.0, 0.3], [0.3, 0.0, 0.7]]) * 0.9 + 0.1 / 3
    torch.testing.assert_close(found, -(soft * out.log_softmax(1)).sum(1).mean())


def test_shallow_layers_learn_slowly():
    method = built(layer_decay=0.5)
    scale = {name: group.lr_scale for group in method.parameter_groups() for name in group.params}
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert set(scale) == trained and "encoder.mask_token" not in trained
    wanted = {
        "head.weight": 1.0,
        "encoder.norm.weight": 1.0,
        "encoder.blocks.2.mlp.fc1.weight": 0.5,
        "encoder.blocks.0.attn.qkv.bias": 0.125,
        "encoder.patch_embed.proj.weight": 0.0625,
    }
    assert {name: scale[name] for name in wanted} == wanted
    decay = {name: g.weight_decay_scale for g in method.parameter_groups() for name in g.params}
    assert decay["encoder.norm.weight"] == decay["encoder.pos_embed"] == decay["encoder.cls_token"] == 0.0
    method(batch(), {}).total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters() if p.requires_grad)


def test_a_record_goes_through_json(tmp_path):
    config = FineTune(encoder=VIT, image_from=tmp_path, labels=Classes(("a", "b"), (1.0, 2.0)))
    assert from_json(to_json(config)) == config and type_problems(config) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"trained": "head"},
            "image_from: must name a run or a file where the encoder's weights stay as they are, got None",
        ),
        ({"trained": "lora"}, "image_from: must name a run or a file where the encoder's weights stay as they are"),
        ({"lora_rank": 0}, "lora_rank: must be at least 1, got 0"),
        ({"lora_alpha": 0.0}, "lora_alpha: must be a finite number above 0, got 0.0"),
        (
            {"mixup": 0.4, "labels": Votes((2,))},
            "mixup: must be 0 with votes, which are counts and cannot be mixed, got 0.4",
        ),
        ({"layer_decay": 0.0}, "layer_decay: must be above 0 and at most 1, got 0.0"),
        ({"labels": Classes(("a",))}, "labels.names: must be two or more different classes, got a"),
        ({"labels": Classes(("a", "b"))}, "views.targets: must be the one label of the classes, got 2"),
        (
            {"labels": Classes(("a", "b"), (1.0,))},
            "labels.weights: must be one positive number a class (2), got (1.0,)",
        ),
        ({"labels": Votes((3,))}, "labels.answers: must go with 4 labels in views.targets"),
        ({"encoder": replace(VIT, channels=4)}, "encoder.channels: must be the views' 3, got 4"),
        (
            {"encoder": replace(VIT, patch_size=3, image_size=9)},
            "views.image.global_size: must be a multiple of patch_size 3",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, said):
    problems = FineTune(**{"encoder": VIT} | changes).problems(spec("z", "m"))
    assert any(said in problem for problem in problems), problems


def test_labels_that_do_not_vary_are_refused():
    assert FineTune(encoder=VIT).problems(spec("z", std=0.0)) == [
        "views.targets: must be labels that vary, got z with mean 0.5 and deviation 0.0"
    ]
