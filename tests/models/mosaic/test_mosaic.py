"""MOSAIC: what is asked does not depend on what else is; it learns, and its answers are joint and about right."""

from dataclasses import replace

import pytest
import torch
import toy_quantities as toy

from armillary.engine.zero.optim import AdamW, build_groups
from armillary.models.masked.heads import HeadConfig
from armillary.models.masked.recalibration import recalibration
from armillary.models.method import InputSpec
from armillary.models.mosaic.answers import ask
from armillary.models.mosaic.masking import Masking
from armillary.models.mosaic.mosaic import MOSAIC
from armillary.models.mosaic.network import computed_rows
from armillary.models.quantities import Quantity, Scaling

INPUTS = toy.inputs()
SMALL = MOSAIC(dim=16, depth=2, heads=2, mlp_ratio=2)
STEPS = 150


@pytest.fixture(scope="module")
def trained():
    """150 batches of 128: seconds."""
    torch.manual_seed(0)
    questions = (("flux",), ("flux", "history[0:2]"), ("history",))
    config = replace(SMALL, dim=32, heads=4, masking=Masking(questions=questions, question_share=0.5))
    method = config.build(INPUTS)
    optimizer = AdamW(build_groups(method))
    method.losses = []
    for step in range(STEPS):
        batch = method.prepare(toy.batch(INPUTS, 128, seed=step + 1), toy.key(128, step))
        optimizer.set_step(step, {"learning_rate": 5e-3 * (1 - step / STEPS), "weight_decay": 0.01})
        loss = method(batch, {}).total
        loss.backward()
        method.losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return method.eval()


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(1)
    return SMALL.build(INPUTS).eval()


def test_losses_are_weighted_and_all_parameters_learn():
    torch.manual_seed(0)
    config = replace(SMALL, weights=(("mass", 3.0),))
    method, plain = config.build(INPUTS), SMALL.build(INPUTS)
    plain.load_state_dict(method.state_dict())
    batch = method.prepare(toy.batch(INPUTS, 64), toy.key(64))
    losses = method(batch, {})
    losses.total.backward()
    assert set(losses.terms) == {"z", "mass", "flux", "history"}
    torch.testing.assert_close(losses.total, sum(losses.terms.values()))
    torch.testing.assert_close(losses.terms["mass"], 3 * plain(batch, {}).terms["mass"])
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in method.parameters())
    groups = method.parameter_groups()
    assert {n for g in groups for n in g.params} == {n for n, _ in method.named_parameters()}
    assert all(
        p.ndim == 1 or n in ("network.own", "network.position", "network.question") for n, p in groups[1].params.items()
    )


def test_unknown_values_have_no_influence(untrained):
    """Errors of what is unknown, and what the batch holds of it, change nothing, not even gradients."""
    batch = untrained.prepare(toy.batch(INPUTS, 32), toy.key(32))
    other = batch.copy()
    unknown = batch["shown_quantities"].isnan()
    other["quantity_errors"] = batch["quantity_errors"].masked_fill(unknown, 7.0)
    assert torch.equal(untrained(batch, {}).total, untrained(other, {}).total)


def test_a_sample_does_not_depend_on_its_batch_nor_on_what_else_is_asked(untrained):
    batch = toy.batch(INPUTS, 8, unknown=False)
    shown = untrained.layout.shown(batch["quantities"], ~untrained.layout.chosen(("flux",)).expand(8, -1))
    every = ask(untrained.network, shown, batch["quantity_errors"], range(untrained.layout.tokens))
    for token, said in every.items():
        alone = ask(untrained.network, shown[3:4], batch["quantity_errors"][3:4], [token])[token]
        torch.testing.assert_close(alone.density.median(), said.density.median()[3:4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.loadings, said.loadings[3:4], rtol=1e-4, atol=1e-5)


def test_only_shown_and_asked_tokens_are_computed():
    shown = torch.tensor([[True, True, False], [False, True, False], [True, True, True]])
    asked = torch.tensor([[False, False, True], [True, False, False], [False, False, False]])
    rows = computed_rows(shown, asked)
    # Samples by their number of shown tokens: 1, 0, 2; places: own 0, shown 1 to 3, asked 4 to 6.
    assert rows.tokens.tolist() == [7, 9, 11, 0, 1, 2, 6, 14, 15, 16, 17]
    assert rows.keys.tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 10]


@pytest.mark.slow
def test_it_learns(trained):
    first, last = (sum(part) / 10 for part in (trained.losses[:10], trained.losses[-10:]))
    assert last < first - 3  # seeds 0 to 3: 4.1 to 4.8


@pytest.mark.slow
def test_answers_are_better_than_the_prior_and_cover_the_truth(trained):
    batch, true = toy.batch(INPUTS, 300, unknown=False), toy.values(300)
    answer = trained.answer(batch, ("flux",), ("z", "mass", "history"), 32, seed=0)
    assert answer.draws["history"].shape == (300, 32, 6) and answer.median["history"].shape == (300, 6)
    for name, log in (("z", False), ("mass", True)):
        truth, median = (x.log10() if log else x for x in (true[name], answer.median[name]))
        assert (truth - median).std() < 0.3 * truth.std(), name  # seeds 0 to 3: .11 to .15
        inside = (answer.quantile(name, 0.16) < true[name]) & (true[name] < answer.quantile(name, 0.84))
        assert 0.5 < inside.float().mean() < 0.85, name  # .69 to .76
    # Given the brightness, histories are early or late: their ends are drawn apart, neighbours together.
    drawn = answer.draws["history"].log()
    spread = (drawn - drawn.mean(1, keepdim=True)).flatten(0, 1)
    assert torch.corrcoef(spread.T)[0, 1] > 0.5  # .90 to .93


def test_answers_are_keyed_by_row_and_seed(untrained):
    batch = toy.batch(INPUTS, 6, unknown=False)
    part = {name: x[2:4] for name, x in batch.items()}
    whole = untrained.answer(batch, ("flux",), ("history", "z"), 5, seed=4)
    some = untrained.answer(part, ("flux",), ("history", "z"), 5, seed=4)
    other = untrained.answer(batch, ("flux",), ("history", "z"), 5, seed=5)
    for name in ("history", "z"):
        torch.testing.assert_close(some.draws[name], whole.draws[name][2:4], rtol=1e-3, atol=1e-4)
        assert not torch.isclose(other.draws[name], whole.draws[name]).any()


def test_parts_may_be_given_and_come_back_as_they_were(untrained):
    batch, true = toy.batch(INPUTS, 6, unknown=False), toy.values(6)
    found = untrained.answer(batch, ("history[1:4]", "flux[0:3]"), ("history", "flux"), 3, seed=0)
    torch.testing.assert_close(
        found.draws["history"][:, :, 1:4], true["history"][:, None, 1:4].float().expand(-1, 3, -1)
    )
    torch.testing.assert_close(found.median["flux"][:, :3], true["flux"][:, :3].float(), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(found.draws["history"][:, 0, 4:], found.draws["history"][:, 1, 4:]).any()
    assert not torch.isclose(found.draws["flux"][:, :, 3], true["flux"][:, None, 3].float()).any()


def test_nothing_of_a_level_is_told_of_hidden_components(untrained):
    """What is shown of a vector is the same whatever its hidden components hold."""
    v = toy.values(4)
    scaling = INPUTS.quantities[2].scaling
    batches = [toy.batch(INPUTS, 4, unknown=False) for _ in range(2)]
    changed = v["flux"].clone()
    changed[:, 2:] *= 5
    batches[1]["quantities"][:, 2:7] = scaling(changed.float())
    medians = [untrained.answer(b, ("flux[0:2]",), ("z",), 2, 0).median["z"] for b in batches]
    torch.testing.assert_close(*medians, rtol=1e-4, atol=1e-5)


def test_embeddings(untrained):
    batch = toy.batch(INPUTS, 8)
    found = untrained.encode(batch)["quantities"]
    assert found.shape == (8, 16) and list(untrained.readouts()) == ["quantities"]
    changed = batch.copy()
    changed["quantities"] = batch["quantities"].clone()
    changed["quantities"][:, :2] += 1  # z and mass, of which embeddings are not made
    torch.testing.assert_close(untrained.encode(changed)["quantities"], found)
    changed["quantities"][4:6, 2:] = torch.nan
    nothing = untrained.encode(changed)["quantities"]
    torch.testing.assert_close(nothing[4], nothing[5])
    torch.testing.assert_close(nothing[:4], found[:4])


def test_corrections_widen_intervals_that_are_too_narrow():
    torch.manual_seed(2)
    method = SMALL.build(INPUTS).eval()
    batch = toy.batch(INPUTS, 100, unknown=False)
    pit = method.answer_pit(batch, ("flux",), "mass")
    assert pit.shape == (100, 1) and ((pit > 0) & (pit < 1)).all()
    before = method.answer(batch, ("flux",), ("mass", "history"), 40, 0)
    ends = torch.tensor([[0.0, 0.02, 0.1, 0.5, 0.9, 0.98, 1.0]])  # truths fell in the tails
    method.correct_answers(("flux",), {"mass": ends})
    after = method.answer(batch, ("flux",), ("mass", "history"), 40, 0)

    def width(answer):
        return (answer.quantile("mass", 0.84).log10() - answer.quantile("mass", 0.16).log10()).mean()

    assert width(after) > 1.5 * width(before)
    assert torch.equal(after.draws["mass"].argsort(1), before.draws["mass"].argsort(1))
    assert torch.equal(after.draws["history"], before.draws["history"])
    assert torch.equal(method.answer(batch, ("z",), ("mass",), 5, 0).draws["mass"].isnan().any(), torch.tensor(False))
    with pytest.raises(ValueError, match="corrections of 'mass': must be of 1 components, got 2"):
        method.correct_answers(("flux",), {"mass": ends.repeat(2, 1)})


def test_components_with_levels_are_corrected_as_wholes():
    torch.manual_seed(2)
    method = SMALL.build(INPUTS).eval()  # knows nothing: its intervals are too narrow
    held_out, judged = (toy.batch(INPUTS, 1000, seed=seed, unknown=False) for seed in (5, 6))
    pit = method.answer_pit(held_out, ("history",), "flux")
    assert pit.shape == (1000, 4) and ((pit > 0) & (pit < 1)).all()
    before = method.answer(judged, ("history",), ("flux",), 40, 0)
    method.correct_answers(("history",), {"flux": recalibration(pit)})
    after = method.answer(judged, ("history",), ("flux",), 40, 0)
    truth = toy.values(1000, 6)["flux"]

    def covered(answer):
        inside = (truth > answer.quantile("flux", 0.16)) & (truth < answer.quantile("flux", 0.84))
        return float(inside.double().mean())

    assert covered(before) < 0.5
    # Four times the errors of fit and count in quadrature, as if a galaxy's four components were one: .0148 sqrt(2).
    assert covered(after) == pytest.approx(0.68, abs=0.085)
    rising = after.draws["flux"].gather(1, before.draws["flux"].argsort(1)).diff(dim=1)
    assert rising.min() >= 0  # 0 where corrections reach beyond the outermost draw
    few = method.answer(judged, ("history",), ("flux",), 3, 0)  # as the first of as many as it takes to order them
    assert few.draws["flux"].shape == (1000, 3, 4) and torch.equal(few.median["flux"], after.median["flux"])


def test_bad_questions_are_named(untrained):
    batch = toy.batch(INPUTS, 8)
    for given, want, draws, message in (
        (("sed",), ("z",), 1, "'sed': must be one of z, mass, flux, history"),
        (("flux",), ("sed",), 1, "want: must be some of z, mass, flux, history, got 'sed'"),
        ((), ("z",), 1, "given: must name a quantity"),
        (("z",), (), 1, "a quantity and a draw at least"),
        (("z",), ("mass",), 0, "a quantity and a draw at least"),
        (("flux",), ("z",), 1, r"nothing of flux is known of row 1 \(1 of 8 samples\)"),
    ):
        with pytest.raises(ValueError, match=message):
            untrained.answer(batch, given, want, draws, 0)
    with pytest.raises(ValueError, match=r"quantities: must be \[B, 13\] as built for, got \(8, 12\)"):
        untrained.answer({**batch, "quantities": batch["quantities"][:, 1:]}, ("z",), ("mass",), 1, 0)


@pytest.mark.parametrize(
    ("change", "inputs", "message"),
    [
        ({"dim": 30}, INPUTS, "heads: must divide dim 30"),
        ({"depth": 0}, INPUTS, "depth: must be at least 1"),
        ({"weights": (("sed", 1.0),)}, INPUTS, "weights: must be finite"),
        ({"embed": ("sed",)}, INPUTS, "embed: 'sed'"),
        ({"masking": Masking(block=2.0)}, INPUTS, "masking.block"),
        ({"vector_head": HeadConfig("point", 1)}, INPUTS, "rank: must be 0 where vectors are points"),
        ({}, replace(INPUTS, channels=3, global_size=8), "views.image, views.spectrum: must be off"),
        ({}, replace(INPUTS, targets=("z",)), "views.columns, views.targets: must be empty"),
        ({}, InputSpec(quantities=INPUTS.quantities[:1]), r"views.quantities: must be two or more, .* got \['z'\]"),
    ],
    ids=["heads", "depth", "weights", "embed", "masking", "points", "images", "targets", "one quantity"],
)
def test_rules(change, inputs, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, heads=4, **change).build(inputs)


def test_a_new_modality_enters_by_declaration():
    """Embeddings of images, say: 24 numbers of an encoder, as four tokens."""
    draw = torch.Generator().manual_seed(0)
    images = Quantity(
        "dinov2",
        "",
        tuple(map(str, range(24))),
        scaling=Scaling.fitted("linear", torch.randn(99, 24, generator=draw)),
        runs=4,
    )
    inputs = replace(INPUTS, quantities=(*INPUTS.quantities, images))
    batch = toy.batch(INPUTS, 16)
    seen = torch.randn(16, 24, generator=draw)
    batch["quantities"] = torch.cat([batch["quantities"], seen], dim=1)
    batch["quantity_errors"] = torch.cat([batch["quantity_errors"], torch.full_like(seen, torch.nan)], dim=1)
    method = SMALL.build(inputs)
    method(method.prepare(batch, toy.key(16)), {}).total.backward()
    answer = method.eval().answer(batch, ("dinov2",), ("z", "flux"), 3, 0)
    assert answer.draws["flux"].shape == (16, 3, 4)
    assert method.answer(batch, ("z",), ("dinov2",), 3, 0).draws["dinov2"].shape == (16, 3, 24)
