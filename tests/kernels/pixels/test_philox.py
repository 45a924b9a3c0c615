import numpy as np
import pytest

from armillary import _C
from armillary.kernels.pixels.philox import Purpose, normals, philox_reference, streams, uniforms, words

# kat_vectors of Random123 1.14, philox4x32 with 10 rounds: counter, key, result
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("philox", [_C.philox, philox_reference], ids=["cpp", "reference"])
@pytest.mark.parametrize("case", KNOWN)
def test_published_vectors(case, philox):
    counter, key, expected = KNOWN[case]
    got = philox(np.array([counter], np.uint32), key[0] | key[1] << 32)
    assert got.dtype == np.uint32 and got.tolist() == [list(expected)]


def test_cpp_equals_the_reference():
    counter = np.random.default_rng(0).integers(0, 2**32, (1000, 4), dtype=np.uint32)
    np.testing.assert_array_equal(_C.philox(counter, 2**63 + 12345), philox_reference(counter, 2**63 + 12345))


def test_streams_of_different_names_never_meet():
    names = [
        streams(p, c, n, e)[0]
        for p in (Purpose.CROP, Purpose.BLUR)
        for c in (0, 1, 65535)
        for n in (0, 1, 2**32 - 1)
        for e in (0, 1, 2**32 - 1)
    ]
    assert len({tuple(n.tolist()) for n in names}) == len(names)
    heads = words(np.stack(names), 0, 4)
    assert len({tuple(h.tolist()) for h in heads}) == len(names)


def test_longer_streams_continue_shorter_ones():
    stream = streams(Purpose.CROP, 0, [5, 6], 1)
    np.testing.assert_array_equal(words(stream, 9, 13)[:, :6], words(stream, 9, 6))
    np.testing.assert_array_equal(normals(stream, 9, 7)[:, :4], normals(stream, 9, 4))
    assert uniforms(stream, 9, 0).shape == normals(stream, 9, 0).shape == (2, 0)
    assert uniforms(stream[:0], 9, 3).shape == normals(stream[:0], 9, 3).shape == (0, 3)


def test_distributions():
    stream = streams(Purpose.CROP, 0, np.arange(20000), 0)
    u, z = uniforms(stream, 0, 4), normals(stream, 0, 4)
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.001
    assert abs(z.mean()) < 0.015 and abs(z.std() - 1) < 0.01 and abs((z**4).mean() - 3) < 0.1
    np.testing.assert_allclose(np.corrcoef(z.T), np.eye(4), atol=0.03)


@pytest.mark.parametrize(
    "arguments, message",
    [((-1, 0, 0), "crop must be"), ((65536, 0, 0), "crop must be"), ((0, 2**32, 0), "position must be")],
    ids=["negative crop", "large crop", "large position"],
)
def test_numbers_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        streams(Purpose.CROP, *arguments)


def test_bad_epoch_and_seed_are_refused():
    with pytest.raises(ValueError, match="epoch must be"):
        streams(Purpose.CROP, 0, 0, -1)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed: must be"):
            words(streams(Purpose.CROP, 0, 0, 0), seed, 1)
