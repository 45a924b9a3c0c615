"""Packed tokens: each sample's own and shown ones, there and back, and where sequences begin."""

import torch

from armillary.models.masked.packing import pack, shown_rows


def test_shown_tokens_go_to_their_samples_and_back():
    hidden = [torch.rand(5, 4) < 0.5, torch.rand(5, 3) < 0.5]
    hidden[0][2], hidden[1][2] = True, True  # nothing of a sample is shown
    hidden[0][3] = False
    packing = pack(hidden, [shown_rows(mask) for mask in hidden])
    own = torch.arange(5.0)[:, None] * 100
    tokens = [(torch.arange(m.numel()) // m.shape[1] * 100.0 + 1 + i)[:, None] for i, m in enumerate(hidden)]
    shown = [x[~m.flatten()] for x, m in zip(tokens, hidden, strict=True)]
    assert all(torch.equal(x[rows], s) for x, rows, s in zip(tokens, packing.rows, shown, strict=True))
    packed = packing.pack(own, shown)
    assert packed.flatten().tolist() == sorted(packed.flatten().tolist())  # by sample, then own, first, second
    edges = packing.layout.cu_seqlens.tolist()
    for sample, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        assert packed[a, 0] == 100 * sample and (packed[a:b] // 100 == sample).all()
        assert b - a == 1 + sum(int((~m[sample]).sum()) for m in hidden)
    assert edges[-1] == len(packed) and packing.layout.max_len >= max(
        b - a for a, b in zip(edges, edges[1:], strict=False)
    )
    for mine, theirs in zip(packing.unpack(packed), [own, *shown], strict=True):
        assert torch.equal(mine, theirs)
