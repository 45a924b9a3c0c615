"""Chunk masks: the facts of the released code's draw, and independence of batches and ranks."""

import pytest
import torch

from armillary.models.method import BatchKey
from armillary.models.specformer.spectrum_masking import chunk_masks, chunk_problems

RELEASED = {"chunks": 6, "width": 50}
KEY = BatchKey(seed=3, epoch=1, first_position=0, global_batch=64)


def runs(row):
    """(start, length) of each run of True."""
    edges = torch.diff(row.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [(int(a), int(b - a)) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("width", [50, 30], ids=["released", "paper"])
def test_hidden_tokens_of_desi_spectra(width):
    mask = chunk_masks(torch.arange(4000), KEY, 778, chunks=6, width=width)
    assert mask.shape == (4000, 778) and mask.dtype == torch.bool
    assert (mask.sum(1) == 6 * width).all()  # 300 of 778 as released
    bases, choices = [0, 129, 259, 389, 518, 648], 129 - width
    offsets = [[start - base for (start, _), base in zip(runs(row), bases, strict=True)] for row in mask]
    assert all(length == width for row in mask for _, length in runs(row))
    seen = torch.tensor(offsets)
    assert (seen.amin(0) == 0).all() and (seen.amax(0) == choices - 1).all()
    expected = (choices - 1) / 2
    sigma = choices / 12**0.5 / 4000**0.5
    assert ((seen.double().mean(0) - expected).abs() < 5 * sigma).all()
    assert torch.corrcoef(seen.T.double()).fill_diagonal_(0).abs().max() < 0.08  # chunks are drawn independently


def test_ten_tokens_are_never_hidden_and_the_first_is():
    mask = chunk_masks(torch.arange(20_000), KEY, 778, **RELEASED)
    never = (~mask.any(0)).nonzero().flatten().tolist()
    assert never == [128, 257, 258, 387, 388, 517, 646, 647, 776, 777]
    assert mask[:, 0].double().mean().item() == pytest.approx(1 / 79, abs=0.004)


def test_a_mask_belongs_to_its_position():
    whole = chunk_masks(torch.arange(64), KEY, 778, **RELEASED)
    order = torch.randperm(64)
    assert torch.equal(chunk_masks(order, KEY, 778, **RELEASED), whole[order])
    parts = [chunk_masks(p, KEY, 778, **RELEASED) for p in torch.arange(64).split(17)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, chunk_masks(torch.arange(64), BatchKey(3, 2, 0, 64), 778, **RELEASED))
    assert not torch.equal(whole, chunk_masks(torch.arange(64), BatchKey(4, 1, 0, 64), 778, **RELEASED))
    assert torch.equal(whole, chunk_masks(torch.arange(64), BatchKey(3, 1, 32, 128), 778, **RELEASED))
    assert chunk_masks(torch.arange(0), KEY, 778, **RELEASED).shape == (0, 778)


@pytest.mark.parametrize(
    ("tokens", "chunks", "width"), [(2, 1, 1), (13, 6, 1), (40, 3, 12)], ids=["one of two", "parts of two", "tightest"]
)
def test_smallest_parts(tokens, chunks, width):
    mask = chunk_masks(torch.arange(200), KEY, tokens, chunks=chunks, width=width)
    assert (mask.sum(1) == chunks * width).all()
    part = tokens // chunks
    assert mask.any(0).sum() == chunks * (part - 1)


@pytest.mark.parametrize(
    ("tokens", "chunks", "width", "said"),
    [
        (778, 0, 50, "chunks: must be at least 1, got 0"),
        (778, 6, 129, r"chunk_tokens: must be in 1 .. 128, to fit into each of 6 parts of 129 tokens, got 129"),
        (778, 6, 0, "chunk_tokens: must be in 1 .. 128, .* got 0"),
        (11, 6, 1, "chunks: must leave parts of at least 2 tokens, of a spectrum's 11, got 6"),
    ],
    ids=["no chunk", "chunk as long as its part", "empty chunk", "too many chunks"],
)
def test_chunks_that_do_not_fit(tokens, chunks, width, said):
    assert len(chunk_problems(tokens, chunks, width)) == 1
    with pytest.raises(ValueError, match=said):
        chunk_masks(torch.arange(3), KEY, tokens, chunks=chunks, width=width)
