"""Masks of tokens and modalities: rates, blocks, every subset, what may not happen, and what the draws depend on."""

from itertools import product

import pytest
import torch

from armillary.models.masked.masking import batch_coin, modality_masks, share_problems, token_masks
from armillary.models.method import BatchKey

KEY = BatchKey(seed=3, epoch=1, first_position=0, global_batch=512)
MANY = torch.arange(4000)
TOKENS = 32
blocks = pytest.mark.parametrize("block", [False, True], ids=["single", "block"])


@blocks
@pytest.mark.parametrize(("share", "hidden"), [(0.0, 0), (0.75, 24), (0.8, 25), (1.0, 32)])
def test_a_fixed_share_hides_the_same_number_in_every_sample(block, share, hidden):
    mask = token_masks(MANY, KEY, TOKENS, (share, share), block=block)
    assert mask.shape == (4000, TOKENS) and mask.dtype == torch.bool
    assert (mask.sum(1) == hidden).all()


def test_single_tokens_are_hidden_alike():
    """Each token in .75 of the samples: 5 standard errors of .0068 for the extremes of 32."""
    rate = token_masks(MANY, KEY, TOKENS, (0.75, 0.75)).float().mean(0)
    assert (rate - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5


@blocks
def test_shares_are_uniform_on_their_range(block):
    """floor(s N), s uniform on (0, .75): 0 .. 23 with the same chance, within 5 standard errors."""
    count = token_masks(MANY, KEY, TOKENS, (0.0, 0.75), block=block).sum(1)
    found = count.bincount(minlength=24) / 4000
    assert len(found) == 24 and (found - 1 / 24).abs().max() < 5 * (1 / 24 / 4000) ** 0.5


def test_blocks_are_runs_that_begin_anywhere_they_fit():
    mask = token_masks(MANY, KEY, TOKENS, (0.0, 1.0), block=True)
    ends = (mask[:, 1:] != mask[:, :-1]).sum(1)
    inner = ends[~(mask[:, 0] | mask[:, -1]) & mask.any(1)]
    assert (inner == 2).all() and (ends[mask[:, 0] | mask[:, -1]] <= 1).all()
    halves = token_masks(MANY, KEY, TOKENS, (0.5, 0.5), block=True)
    start = halves.int().argmax(1)
    found = start.bincount(minlength=17) / 4000
    assert len(found) == 17 and (found - 1 / 17).abs().max() < 5 * (1 / 17 / 4000) ** 0.5


def drawn(position, key, modality=0):
    """All kinds of masks of some samples."""
    known = torch.ones(len(position), 3, dtype=torch.bool)
    return (
        token_masks(position, key, TOKENS, (0.0, 0.75), modality=modality),
        token_masks(position, key, TOKENS, (0.0, 0.75), modality=modality, block=True),
        modality_masks(position, key, known, (0.5, 0.5, 0.5)),
    )


def test_draws_depend_on_seed_epoch_and_position_only():
    """Not on the number of ranks, of accumulation steps, or on the batch that a sample falls into."""
    whole = drawn(MANY[:512], KEY)
    for ranks, steps in product((1, 2, 4), (1, 4)):
        size = 512 // (ranks * steps)
        parts = [drawn(MANY[i : i + size], BatchKey(3, 1, i, size)) for i in range(0, 512, size)]
        for mask, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(mask, torch.cat(pieces))
    order = torch.randperm(512)
    for mask, other in zip(whole, drawn(MANY[:512][order], KEY), strict=True):
        assert torch.equal(mask[order], other)
    for change in (BatchKey(4, 1, 0, 512), BatchKey(3, 2, 0, 512)):
        assert not any(torch.equal(a, b) for a, b in zip(whole, drawn(MANY[:512], change), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole[:2], drawn(MANY[:512], KEY, modality=1)[:2], strict=True))


def test_every_subset_of_modalities_is_shown_as_often_as_it_should():
    """All but the empty one; its draws are shared out among the single modalities. Within 5 standard errors."""
    p = (0.3, 0.5, 0.8, 0.5)
    hidden = modality_masks(MANY, KEY, torch.ones(4000, 4, dtype=torch.bool), p)
    nothing = 0.3 * 0.5 * 0.8 * 0.5
    for subset in product((False, True), repeat=4):
        rate = (hidden == torch.tensor(subset)).all(1).float().mean().item()
        expected = 1.0
        for is_hidden, chance in zip(subset, p, strict=True):
            expected *= chance if is_hidden else 1 - chance
        expected = 0.0 if all(subset) else expected + nothing / 4 * (sum(subset) == 3)
        assert abs(rate - expected) <= 5 * (expected * (1 - expected) / 4000) ** 0.5, subset


def test_with_everything_hidden_something_known_is_kept():
    known = torch.rand(4000, 3) < 0.5
    known[:, 1] |= ~known.any(1)
    hidden = modality_masks(MANY, KEY, known, (1.0, 1.0, 1.0))
    assert ((~hidden).sum(1) == 1).all() and not (~hidden & ~known).any()
    pair = known.all(1)
    kept = (~hidden[pair]).float().mean(0)
    assert (kept - 1 / 3).abs().max() < 5 * (2 / 9 / pair.sum()) ** 0.5


def test_probability_zero_shows_all_that_is_known():
    known = torch.rand(100, 3) < 0.5
    known[:, 1] |= ~known.any(1)
    assert torch.equal(modality_masks(MANY[:100], KEY, known, (0.0, 0.0, 0.0)), ~known)


def test_the_coin_is_one_for_a_global_batch():
    """Within 5 standard errors of its probability, and of every one of its micro-batches."""
    coins = [batch_coin(BatchKey(3, 1, first, 64), 0.3) for first in range(0, 64 * 2000, 64)]
    assert abs(sum(coins) / 2000 - 0.3) < 5 * (0.21 / 2000) ** 0.5
    assert {batch_coin(BatchKey(3, e, 64, 64), 0.5) for e in range(20)} == {True, False}
    assert batch_coin(KEY, 1.0) and not batch_coin(KEY, 0.0)


def test_wrong_arguments_are_refused():
    known = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="the sample at position 17 has no known modality"):
        modality_masks(torch.tensor([16, 17]), KEY, known, (0.5, 0.5))
    for p in ((0.5,), (0.5, 1.5), (0.5, float("nan"))):
        with pytest.raises(ValueError, match="must be given 2 probabilities"):
            modality_masks(torch.tensor([16]), KEY, known[:1], p)
    for share in ((0.5, 0.2), (-0.1, 0.2), (0.5, 1.1), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match="share: must be two shares"):
            token_masks(MANY, KEY, TOKENS, share)
        assert share_problems("x.share", share)[0].startswith("x.share: must be two shares 0 <= low <= high <= 1")
    assert share_problems("share", (0.0, 1.0)) == []


def test_no_sample_gives_no_mask():
    none = torch.arange(0)
    assert token_masks(none, KEY, TOKENS, (0.5, 0.5)).shape == (0, TOKENS)
    assert modality_masks(none, KEY, torch.zeros(0, 2, dtype=torch.bool), (0.5, 0.5)).shape == (0, 2)
