"""Answers of a language model: read by likeliest option and own words, scored by hand; gates add up and are the model's."""

import numpy as np
import pytest
import torch
from html_page import Page
from tiny_vlm import INPUTS, galaxies

from armillary.engine.evaluate.questions import answers
from armillary.engine.evaluate.questions.figures import QuestionResult, gates_section, questions_section
from armillary.engine.evaluate.questions.gates import gate_table, image_gates
from armillary.engine.evaluate.questions.task import impossible
from armillary.models.galaxy_walker.adapter import GeometryAdapter
from armillary.models.galaxy_walker.stage2 import GalaxyWalker

TINY = GalaxyWalker(adapter=GeometryAdapter(every=2), image_side=56)


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return TINY.build(INPUTS).eval()


class Writes(torch.nn.Module):
    """An LM head that wants the texts it was given, one a galaxy: looks for how much of them is there, and goes on."""

    def __init__(self, method, texts, start):
        super().__init__()
        self.start, self.step = start, 0
        self.rows = [method.tokenizer.encode(t, add_special_tokens=False) for t in texts]

    def forward(self, hidden):
        out = torch.zeros(len(self.rows), 288)
        for i, row in enumerate(self.rows):
            out[i, row[min(self.step, len(row) - 1)]] = 9.0
        self.step += 1
        return out


def test_probabilities_of_options_are_the_logits_where_they_differ(method):
    found = answers.option_probabilities(method, galaxies(3), 1)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    asked = method.ask(galaxies(3), method.templates.first[3])
    start = int(method.templates.starts[method.templates.first[3]])
    with torch.no_grad():
        logits = method.reader.vlm.lm_head(method.reader(asked).hidden[:, start])  # behind the bracket
    letters = [method.tokenizer.encode(c, add_special_tokens=False)[0] for c in "abcd"]
    torch.testing.assert_close(found, logits[:, letters].softmax(1))


def test_own_words_are_read_or_unreadable(method):
    start = int(method.templates.starts[method.templates.first[2]])
    texts = ["(b)<|im_end|>", "(d)<|im_end|>", "none<|im_end|>", "(a)(c)"]
    head = method.reader.vlm.lm_head
    method.reader.vlm.lm_head = Writes(method, texts, start)
    try:
        assert answers.generated_answers(method, galaxies(4), 0) == [1, -1, -1, 0]
    finally:
        method.reader.vlm.lm_head = head


def test_greedy_words_do_not_see_what_is_not_written_yet(method):
    """The template's own answer stands where words are written; another template of the question gives the same words."""
    batch = galaxies(5)
    found = answers.generated_answers(method, batch, 0)
    first = method.templates.first
    shifted = (first[0], first[1], first[2] + 1, *first[3:])
    other = method.templates
    object.__setattr__(other, "first", shifted)
    try:
        assert answers.generated_answers(method, batch, 0) == found
    finally:
        object.__setattr__(other, "first", first)


def test_scores_by_hand():
    true, likeliest = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    written = np.array([0, -1, 1, 1, -1])
    r = QuestionResult.of("bar", ("yes", "no"), true, likeliest, written, np.array([1, 1, 0]), 200, 0)
    assert r.likeliest.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert r.written.tolist() == [[1, 0, 1], [0, 2, 1], [0, 0, 0]]
    assert r.majority.tolist() == [[0, 2, 0], [0, 3, 0], [0, 0, 0]]
    assert r.unreadable == 0.4 and 0 < r.written_errors[0] < 0.5
    from sklearn.metrics import f1_score

    from armillary.engine.evaluate.morphology.task import accuracy, weighted_f1

    assert accuracy(r.written) == pytest.approx(0.6)
    for matrix, given in ((r.likeliest, likeliest), (r.written, written)):
        labels = [0, 1, -1]
        wanted = f1_score(true, given, labels=labels, average="weighted", zero_division=0)
        assert weighted_f1(matrix[:, [0, 1, 2]]) == pytest.approx(wanted)
    page = Page(questions_section([r], ["merging: left out, 3 galaxies"], 34))
    assert "40.0%" in page.text and "merging: left out" in page.text


def test_gates_by_task_block_and_kind(method):
    gates = gate_table(method, galaxies(6))
    assert [(g.kind, g.name) for g in gates] == [
        *(("task", n) for n in ("redshift", "log_mstar", "bar", "merging")),
        *(("block", n) for n in ("0", "2")),
        *(("token", n) for n in ("text", "image", "spectrum", "geometry", "answer")),
    ]
    for g in gates:  # gates start there, and are not trained
        assert g.share == pytest.approx((0.9, 0.05, 0.05), abs=1e-4) and g.galaxies == 6
    kinds = answers.token_classes(method, 0)
    assert [kinds.count(k) for k in answers.TOKEN_CLASSES] == [len(kinds) - 9, 4, 1, 3, 1]
    router = method.reader.vlm.model.language_model.layers[2].mlp.experts.router_weight
    with torch.no_grad():
        router[1] += 0.3 * torch.randn(64)
    try:
        images = image_gates(method, galaxies(6))
        assert images.block == 2 and images.shares.shape == (4, 3, 2, 2) and images.crops.shape == (4, 3, 48, 48)
        np.testing.assert_allclose(images.shares.sum(1), 1, rtol=1e-5)
        assert images.shares[:, 1].std() > 1e-3
        moved = {(g.kind, g.name): g for g in gate_table(method, galaxies(6))}
        assert moved["block", "2"].share != pytest.approx((0.9, 0.05, 0.05), abs=1e-3)
        assert moved["block", "0"].share == pytest.approx((0.9, 0.05, 0.05), abs=1e-4)
        assert moved["task", "bar"].error[1] > 0
        page = Page(gates_section(gate_table(method, galaxies(6)), images))
        assert page.tags.count("img") == 16
    finally:
        with torch.no_grad():
            router.zero_()
    for layer in method.reader.vlm.model.language_model.layers[::2]:
        assert layer.mlp.logits is None and not layer.mlp.record  # nothing is left behind


def test_what_it_needs(method):
    assert impossible(None, [method]) == ""
    assert impossible(None, [torch.nn.Identity()]) == "it needs a run of Galaxy-Walker's second stage"
    without = GalaxyWalker(adapter=GeometryAdapter(every=0), image_side=56).build(INPUTS)
    assert gate_table(without, galaxies(2)) == [] and image_gates(without, galaxies(2)) is None
