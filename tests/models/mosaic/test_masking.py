"""What is hidden: rates, blocks, every subset, something shown always; a function of position alone."""

import numpy as np
import pytest
import torch
import toy_quantities as toy

from armillary.models.mosaic.layout import Layout
from armillary.models.mosaic.masking import Masking

INPUTS = toy.inputs()
LAYOUT = Layout(INPUTS.quantities)
SIZE = 4000


def hidden_of(masking, known=None, size=SIZE, epoch=0, position=None):
    known = torch.ones(size, LAYOUT.components, dtype=torch.bool) if known is None else known
    position = torch.arange(size) if position is None else position
    return masking.hidden(LAYOUT, known, position, toy.key(size, epoch))


def quantities_of(hidden):
    """[B, Q] bool: quantities hidden as a whole."""
    return torch.stack([hidden[:, s.components].all(1) for s in LAYOUT.spans], dim=1)


def test_something_is_shown_and_something_hidden():
    known = torch.rand(SIZE, LAYOUT.components, generator=torch.Generator().manual_seed(0)) < 0.3
    known[~known.any(1), 0] = True
    hidden = hidden_of(Masking(block=0.5, scattered=0.5), known)
    assert (known & ~hidden).any(1).all()
    several = torch.stack([known[:, s.components].any(1) for s in LAYOUT.spans]).sum(0) > 1
    assert (known & hidden).any(1)[several].all()


def test_every_subset_of_quantities_is_reached_and_each_is_hidden_half_of_the_time():
    whole = quantities_of(hidden_of(Masking(block=0.0, scattered=0.0)))
    codes = (whole * 2 ** torch.arange(len(LAYOUT.spans))).sum(1)
    counts = torch.bincount(codes, minlength=16)
    assert (counts[1:15] > 0).all() and not counts[[0, 15]].any()
    assert (whole.float().mean(0) - 0.5).abs().max() < 0.05  # sigma .008; keeping one shown shifts it by .02


def test_shares_of_blocks_and_scattered_runs_are_as_stated():
    history = LAYOUT.span("history").components
    for masking, blocks in ((Masking(1.0, 0.0, (0.5, 0.5)), True), (Masking(0.0, 1.0, (0.4, 0.4)), False)):
        hidden = hidden_of(masking)
        part = hidden[~quantities_of(hidden)[:, 3], history]
        steps = part.int().diff(dim=1, prepend=torch.zeros(len(part), 1), append=torch.zeros(len(part), 1))
        if blocks:
            assert (part.sum(1) == 3).all() and (steps > 0).sum(1).max() == 1  # contiguous
            ends = part[:, 0] | part[:, -1]
            assert 0.65 < ends.float().mean() < 0.85  # a half at an end, and a half of the others by chance
        else:
            assert (part.sum(1) == 2).all()  # one of three runs of two
            assert (part[:, ::2] == part[:, 1::2]).all()


def test_questions_are_shown_as_they_will_be_asked():
    masking = Masking(questions=(("flux",), ("flux", "history[0:2]")), question_share=1.0)
    hidden = hidden_of(masking)
    shown = (~hidden).int()
    assert (shown[:, LAYOUT.span("flux").components] == 1).all() and not shown[:, :2].any()
    begin = LAYOUT.span("history").components.start
    part = shown[:, begin : begin + 2].all(1)
    assert 0.45 < part.float().mean() < 0.55 and not shown[:, begin + 2 :].any()


def test_masks_are_a_function_of_seed_epoch_and_position():
    masking = Masking(questions=(("flux",),), question_share=0.3, asked=0.5)
    whole, order = hidden_of(masking, size=64), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(hidden_of(masking, size=64, position=order), whole[order])
    assert not torch.equal(hidden_of(masking, size=64, epoch=1), whole)
    tokens = torch.ones(64, LAYOUT.tokens, dtype=torch.bool)
    asked = masking.asked_of(LAYOUT, tokens, torch.arange(64), toy.key(64))
    assert torch.equal(masking.asked_of(LAYOUT, tokens, order, toy.key(64)), asked[order])
    assert asked[:, :2].all() and 0.35 < asked[:, 2:].float().mean() < 0.65


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": (0.5, 1.0)}, "masking.share: must stay below 1"),
        ({"share": (0.5, 0.2)}, "masking.share: must be two shares"),
        ({"block": 1.2}, r"masking.block: must be in \[0, 1\]"),
        ({"block": 0.7, "scattered": 0.4}, "masking.scattered: must be at most 1 - block"),
        ({"question_share": 0.1}, "masking.questions: must be listed"),
        ({"questions": (("sed",),)}, "masking.questions: 'sed': must be one of z, mass, flux, history"),
        ({"questions": (("history[4:9]",),)}, r"masking.questions: 'history\[4:9\]': must be components of 6"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_rules(change, message):
    with pytest.raises(ValueError, match=message):
        raise ValueError("; ".join(Masking(**change).problems(LAYOUT)))


def test_parts_are_named_as_slices():
    begin = LAYOUT.span("history").components.start
    for text, places in (
        ("history", range(6)),
        ("history[:2]", range(2)),
        ("history[4:]", (4, 5)),
        ("history[1:3]", (1, 2)),
    ):
        assert np.flatnonzero(LAYOUT.chosen((text,))).tolist() == [begin + p for p in places]
    for text in ("sed", "history[3:3]", "history[a:b]", "history[0:7]"):
        with pytest.raises(ValueError, match="must be"):
            LAYOUT.chosen((text,))
