"""Stage 2's method: what it asks, what it learns, what it refuses."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_vlm import INPUTS, SIDES, galaxies, key
from transformers import Qwen2VLImageProcessorPil

from armillary.models.galaxy_walker import vlm as vlms
from armillary.models.galaxy_walker.adapter import GeometryAdapter
from armillary.models.galaxy_walker.geometry_prompt.network import GeometryPromptConfig
from armillary.models.galaxy_walker.modal_tokens import ModalTokens
from armillary.models.galaxy_walker.pixels import patches
from armillary.models.galaxy_walker.prompt import _place, parse_answer
from armillary.models.galaxy_walker.stage2 import GalaxyWalker

TINY = GalaxyWalker(adapter=GeometryAdapter(every=2), image_side=56)


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return TINY.build(INPUTS)


def test_prompts_say_what_is_asked(method):
    templates, tokenizer = method.templates, method.tokenizer
    assert templates.first == (0, 1, 2, 5) and len(templates.input_ids) == 9
    texts = [tokenizer.decode(ids[:n]) for ids, n in zip(templates.input_ids, templates.lengths, strict=True)]
    assert texts[0].endswith("What is its redshift?<|im_end|>\n<|im_start|>assistant\n num<|im_end|>")
    assert texts[3].endswith("Bar? (a) strong (b) weak (c) no<|im_end|>\n<|im_start|>assistant\n(b)<|im_end|>")
    assert texts[0].count("<|image_pad|>") == 4 == method.reader.image_tokens
    assert "<|quad_start|><|quad_end|><|box_start|><|box_end|>" in texts[0]
    assert "<|quad_start|>" not in texts[3] and "<|quad_end|>" in texts[3]  # no spectrum where morphology is asked for
    for ids, slots in zip(templates.input_ids, templates.slots, strict=True):
        at = [tokenizer.decode(ids[s]) for s in slots if s >= 0]
        assert at == ["<|quad_start|>", "<|quad_end|>", "<|box_start|>", "<|box_end|>"][-len(at) :]
    assert templates.position_ids[0, :, 0].tolist() == [0, 0, 0]
    row, column = templates.position_ids[0, 1:]
    pads = (templates.input_ids[0] == method.model_config.image_token_id).nonzero()[:, 0]
    assert (row[pads] - row[pads[0]]).tolist() == [0, 0, 1, 1]
    assert (column[pads] - column[pads[0]]).tolist() == [0, 1, 0, 1]


def test_asks_what_is_known_and_each_thing_as_often(method):
    batch = galaxies(4)
    batch["targets"] = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [math.nan, math.nan], [0.0, 0.0]])
    batch["answers"] = torch.tensor([[-1, -1], [2, -1], [-1, -1], [1, 3]])
    counts = torch.zeros(4, 4)
    for epoch in range(200):
        out = method.prepare(batch, key(4, epoch))
        answers = torch.zeros(4, dtype=torch.long).index_add(
            0, out["answer_index"] // out["input_ids"].shape[1], torch.ones_like(out["answer_index"])
        )
        assert answers[2] == 0 and (answers[[0, 1, 3]] > 0).all()
        assert out["asked"][:3].tolist() == [0, -1, -1]
        ids, n = out["input_ids"][3], int(out["answer_start"][3])
        text = method.tokenizer.decode(ids[: n + 3])
        counts[3, 0 if "redshift" in text else 1 if "mass" in text else 2 if "Bar" in text else 3] += 1
        if "Bar" in text:
            assert text.endswith("(b)")
        if "Merging" in text:
            assert text.endswith("(d)")
    # 50 expected of each with a standard deviation of 6.1
    assert ((counts[3] - 50).abs() < 25).all()


def test_draws_do_not_depend_on_the_batch(method):
    whole = method.prepare(galaxies(6), key())
    part = method.prepare({k: v[2:4] for k, v in galaxies(6).items()}, key())
    width = min(whole["input_ids"].shape[1], part["input_ids"].shape[1])
    assert torch.equal(whole["input_ids"][2:4, :width], part["input_ids"][:, :width])
    assert torch.equal(whole["asked"][2:4], part["asked"])


def test_a_placeholder_stands_in_a_prompt_once(method):
    with pytest.raises(ValueError, match="a placeholder must stand in it once, token .* stands there 2 times"):
        len(TINY.build(replace(INPUTS, questions=("bar <|quad_end|>", "merging"))).templates.first)
    with pytest.raises(ValueError, match="token 7 stands there 0 times"):
        _place([1, 2], 7)


def test_an_answer_that_is_no_option_is_refused(method):
    batch = galaxies(2)
    batch["answers"][1, 0] = 3
    with pytest.raises(ValueError, match="answers: must be below 3, the options of question 0, got 3"):
        method.prepare(batch, key(2))


@pytest.mark.parametrize("experts", ["equations", "published"])
@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_every_trained_parameter_gets_a_gradient_and_nothing_else_does(family, experts):
    config = replace(
        TINY, tiny=family, image_side=SIDES[family], adapter=GeometryAdapter(2, experts), loss_weights="learned"
    )
    method = config.build(INPUTS)
    losses = method.training_step(method.prepare(galaxies(), key()), {})
    losses.total.backward()
    assert losses.total.item() == pytest.approx(sum(t.item() for t in losses.terms.values()), rel=1e-6)
    for name, p in method.named_parameters():
        trained = not name.startswith("reader.vlm.") or ".mlp.experts." in name
        assert p.requires_grad == trained, name
        assert (p.grad is not None) == trained, name
    grouped = [n for g in method.parameter_groups() for n in g.params]
    assert sorted(grouped) == sorted(n for n, p in method.named_parameters() if p.requires_grad)


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        method = replace(TINY, activation_checkpointing=recompute).build(INPUTS).train()
        method.training_step(method.prepare(galaxies(), key()), {}).total.backward()
        grads.append({n: p.grad for n, p in method.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_learns_to_read_numbers_and_to_choose():
    """The spectrum's vector holds the answers.

    Seeds 0 to 2: the number's loss falls to .08, .14, .13 of its start, LM to .09, .03, .10; correlations .93 to .96.
    """
    torch.manual_seed(0)
    inputs = replace(INPUTS, channels=0)
    method = replace(TINY, tiny_depth=2).build(inputs)
    params = [p for p in method.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, 1e-2, weight_decay=0.0)
    batch, terms = galaxies(16), {}
    for step in range(40):
        losses = method.training_step(method.prepare(batch, key(16, step)), {})
        optimiser.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        for name, term in losses.terms.items():
            terms.setdefault(name, []).append(term.item())
    means = {name: (sum(t[:5]) / 5, sum(t[-5:]) / 5) for name, t in terms.items()}
    assert means["number"][1] < 0.4 * means["number"][0] and means["lm"][1] < 0.3 * means["lm"][0]
    found = method.eval().encode(batch)
    z = (found["properties"] - torch.tensor(INPUTS.target_mean)) / torch.tensor(INPUTS.target_std)
    assert torch.corrcoef(torch.stack([z[:, 0], batch["targets"][:, 0]]))[0, 1] > 0.7
    assert found["hidden"].shape == (16, 64)


def test_what_is_shown_matters_and_what_is_not_there_does_not(method):
    batch = galaxies(3)
    before = method.eval().encode(batch)["properties"]
    for name in ("crop", "spectrum_vector", "geometry_vectors"):
        other = {**batch, name: batch[name].roll(1, 0)}
        assert not torch.allclose(method.encode(other)["properties"], before, atol=1e-5), name
    unknown = {**batch, "spectrum_vector": torch.full((3, 16), math.nan)}
    assert method.encode(unknown)["properties"].isfinite().all()
    nothing = {k: v for k, v in batch.items() if k in ("row", "targets")}
    with pytest.raises(ValueError, match="reads images, embeddings of spectra or geometries"):
        method.encode(nothing)


LIVE_INPUTS = replace(INPUTS, geometry_features=0, spaces=0, graphs=1, node_features=4)
LIVE = replace(
    TINY,
    prompt=GeometryPromptConfig(features=4, hidden=6, out=5, tokens=8, dropout=0.5),
    prompt_from=Path("runs/stage1"),
)


def live_galaxies():
    """Galaxies with neighbours in place of geometry vectors."""
    batch = galaxies(4)
    del batch["geometry_vectors"]
    g = torch.Generator().manual_seed(1)
    near = torch.randint(-1, 9, (4, 1, 3, 3), generator=g)
    return batch | {
        "node_features": torch.randn(9, 4, generator=g),
        "node_row": torch.arange(9),
        "neighbours": near,
        "left_out": torch.zeros(4, dtype=torch.bool),
    }


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_prompt_inside_embeds_the_neighbours(trained):
    torch.manual_seed(0)
    method = replace(LIVE, train_prompt=trained).build(LIVE_INPUTS).train()
    batch = method.prepare(live_galaxies(), key(4))
    embedded = method.embed_neighbours(batch)
    assert embedded["geometry_vectors"].shape == (4, 3, 8) and not {"neighbours", "node_features"} & set(embedded)
    # What is frozen drops nothing out, what is trained does.
    assert torch.equal(embedded["geometry_vectors"], method.embed_neighbours(batch)["geometry_vectors"]) != trained
    method.training_step(batch, {}).total.backward()
    grads = [p.grad is not None and bool(p.grad.any()) for p in method.prompt.parameters()]
    assert all(grads) if trained else not any(grads)
    grouped = {n for g in method.parameter_groups() for n in g.params}
    assert {n.startswith("prompt.") for n in grouped} == ({True, False} if trained else {False})
    assert method.encoders() == {"prompt": "prompt."} and method.starts_from() == {"prompt": Path("runs/stage1")}
    # The network that reads a file of the same vectors says the same.
    same = TINY.build(INPUTS).eval()
    same.load_state_dict({k: v for k, v in method.state_dict().items() if not k.startswith("prompt.")})
    found, wanted = method.eval().encode(live_galaxies()), same.encode(method.embed_neighbours(live_galaxies()))
    assert torch.equal(found["properties"], wanted["properties"])
    with pytest.raises(ValueError, match=r"neighbours: must be \[B, 1, f1, 1 \+ f2\], got none"):
        method.encode({"row": torch.arange(2)})


@pytest.mark.parametrize(
    "change, inputs, text",
    [
        ({}, {"graphs": 0}, "views.neighbours: must be given, because the geometry prompt reads neighbours"),
        ({}, {"graphs": 2}, "views.neighbours.graphs: must be one, or one for each of 3 spaces, got 2"),
        ({}, {"node_features": 5}, "prompt.features: must be the 5 features of the views' neighbours, got 4"),
        ({"prompt": GeometryPromptConfig(features=4, out=0)}, {}, "prompt.out: must be at least 1, got 0"),
        ({"prompt_from": None}, {}, "prompt_from: must name a run of stage 1"),
        ({}, {"spaces": 3, "geometry_features": 8}, "views.geometry: must be None where a prompt makes the geometry tokens"),
        ({"prompt": None}, {"spaces": 3}, "prompt_from: is for a prompt, got runs/stage1 without one"),
        ({"prompt": None, "prompt_from": None}, {}, "prompt: must be given where views.neighbours are"),
    ],
)  # fmt: skip
def test_rules_of_a_prompt_inside(change, inputs, text):
    found = replace(LIVE, **change).problems(replace(LIVE_INPUTS, **inputs))
    assert any(p.startswith(text) for p in found), found


def test_raw_labels_and_replay_are_switches():
    torch.manual_seed(0)
    method = replace(TINY, standardise=False, replay=False).build(INPUTS)
    batch = galaxies(4)
    batch["answers"][:] = -1
    prepared = method.prepare(batch, key(4))
    with torch.no_grad():
        number = float(method.training_step(prepared, {}).terms["number"])
        reading = method.reader(prepared)
        predicted = method.reader.number(reading, prepared["answer_start"], replayed=False)
    std, mean = torch.tensor(INPUTS.target_std), torch.tensor(INPUTS.target_mean)
    wanted = (batch["targets"] * std + mean).gather(1, prepared["asked"][:, None])[:, 0]
    assert number == pytest.approx(float(torch.nn.functional.smooth_l1_loss(predicted, wanted)), rel=1e-5)


def test_tokens_have_the_learnt_length_and_are_zero_where_unknown():
    tokens = ModalTokens(16, 8, 3, 24, scale=0.3)
    spectrum, geometry = torch.randn(2, 16) * 1e5, torch.randn(2, 3, 8)
    spectrum[1, 3] = math.nan
    made = tokens(spectrum, geometry)
    assert made.shape == (2, 4, 24) and made.dtype == torch.float32
    expected = torch.full((2, 4), 0.3)
    expected[1, 0] = 0
    torch.testing.assert_close(made.norm(dim=-1), expected)
    torch.testing.assert_close(tokens.bfloat16()(spectrum, geometry), made, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_are_those_of_the_model_s_own_processor(merge):
    image = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=merge, temporal_patch_size=2, do_resize=False, do_convert_rgb=False
    )
    theirs = processor(images=[x.permute(1, 2, 0).numpy() for x in image], return_tensors="pt")
    ours = patches(image / 255, 56, 14, merge, 2, clip_colours=True)
    assert theirs["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    torch.testing.assert_close(ours, theirs["pixel_values"], rtol=1e-5, atol=1e-5)


def test_crops_of_another_size_are_resized():
    crop = torch.full((1, 3, 40, 40), 0.5)
    made = patches(crop, 56, 14, 2, 2, clip_colours=False)
    assert made.shape == (16, 3 * 2 * 14 * 14)
    torch.testing.assert_close(made, torch.zeros_like(made), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "text, number",
    [("(a)", 0), (" (c) no", 2), ("(d)", -1), ("(A)", -1), ("bar (a)", -1), ("", -1), ("a", -1), ("(ab)", -1)],
)
def test_answers_are_parsed_strictly(text, number):
    assert parse_answer(text, 3) == number


@pytest.mark.parametrize(
    "change, inputs, text",
    [
        ({"image_side": 60}, {}, "image_side: must be a multiple of 28 for this model, got 60"),
        ({"placeholders": ("<|quad_start|>", "galaxy", "<|box_start|>", "<|box_end|>")}, {},
         "placeholders: must be one token each of the model's vocabulary, got 'galaxy', which is not"),
        ({"placeholders": ("<|quad_start|>", "<|quad_end|>")}, {}, "placeholders: must be 4"),
        ({"placeholders": ("<|quad_start|>",) * 4}, {}, "placeholders: must differ"),
        ({"number_weight": -1.0}, {}, "number_weight: must be at least 0"),
        ({"tiny_dim": 40}, {}, "tiny_dim: must be a multiple of 32"),
        ({"tiny": "llama"}, {}, "tiny: must be one of qwen2_vl"),
        ({"adapter": GeometryAdapter(every=-1)}, {}, "adapter.every: must be at least 0"),
        ({}, {"targets": (), "questions": ()}, "views.targets: must be labels to ask for"),
        ({}, {"channels": 4}, "views.image.stretch: must give red, green and blue, got 4 channels"),
        ({}, {"n_global": 2}, "views.image: must give one crop"),
        ({}, {"channels": 0, "spaces": 0, "spectrum_features": 0}, "views: must show an image"),
    ],
)  # fmt: skip
def test_broken_rules(change, inputs, text):
    config, spec = replace(TINY, **change), replace(INPUTS, **inputs)
    assert any(p.startswith(text) for p in config.problems(spec)), config.problems(spec)
    with pytest.raises(ValueError, match="GalaxyWalker: "):
        config.build(spec)


def test_without_transformers_it_names_the_extra(monkeypatch):
    monkeypatch.setattr(vlms, "is_installed", lambda: False)
    (problem,) = TINY.problems(INPUTS)
    assert problem == "base: needs the package transformers, of the extra `vlm`: pip install 'armillary[vlm]'"


@pytest.mark.parametrize("shown", ["image", "spectrum", "geometry"])
def test_each_modality_alone_will_do(shown):
    inputs = replace(
        INPUTS,
        channels=3 * (shown == "image"),
        spectrum_features=16 * (shown == "spectrum"),
        spaces=3 * (shown == "geometry"),
    )
    method = TINY.build(inputs)
    keep = {"image": "crop", "spectrum": "spectrum_vector", "geometry": "geometry_vectors"}
    batch = {k: v for k, v in galaxies(3).items() if k not in keep.values() or k == keep[shown]}
    assert method.training_step(method.prepare(batch, key(3)), {}).total.isfinite()
    assert method.encode(batch)["properties"].shape == (3, 2)
    assert method.flops_per_sample() > 0 and method.activation_bytes(2, 4) > 0


def test_the_smallest_set_of_questions(tmp_path):
    inputs = replace(INPUTS, questions=(), options=())
    method = TINY.build(inputs)
    batch = {k: v for k, v in galaxies(3).items() if k != "answers"}
    assert method.training_step(method.prepare(batch, key(3)), {}).total.isfinite()
    only = replace(INPUTS, targets=(), target_mean=(), target_std=())
    method = TINY.build(only)
    batch = {k: v for k, v in galaxies(3).items() if k != "targets"}
    assert list(method.encode(batch)) == ["hidden"] == list(method.readouts())
    losses = method.training_step(method.prepare(batch, key(3)), {})
    assert losses.terms["number"] == 0 and losses.total.isfinite()
