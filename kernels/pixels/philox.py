"""Keyed random numbers: every draw is a pure function of (seed, epoch, position, crop, purpose, index).

Philox4x32-10 (Salmon et al. 2011) turns a 128-bit counter and a 64-bit key into four 32-bit words, with no state:

    key      seed
    counter  [index, purpose * 2^16 + crop, position, epoch]      each 32 bits, lowest word first

`position` is the sample's place in the epoch's global order, so a draw depends neither on the batch a sample falls into
nor on the rank that computes it. `crop` numbers the views of a sample (all global crops, then all local ones) and
`purpose` keeps the draws of different decisions apart. Different (purpose, crop, position, epoch) never share a counter.

Shape legend: N streams, K draws of each.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from armillary import _C

__all__ = ["Purpose", "normals", "philox_reference", "streams", "uniforms", "words"]

_WORD = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a stream of draws decides. A new purpose takes a new number; a number never changes its meaning."""

    CROP = 1  # where a crop lies, how it is turned, whether blur and noise apply
    BLUR = 2  # widths of the point-spread functions
    NOISE_LEVEL = 3  # noise levels
    FLUX = 4  # achromatic flux factor
    PIXEL_NOISE = 5  # the noise of every pixel
    MASK_PLAN = 6  # which crops of a global batch are masked
    MASK = 7  # the masked tokens of a crop
    SPECTRUM_MASK = 8  # where the hidden chunks of a spectrum begin
    TOKEN_MASK = 9  # the hidden tokens of a modality
    MODALITY_MASK = 10  # which modalities of a sample are hidden
    NEIGHBOUR_SHUFFLE = 11  # which rows change places in the control of a graph
    NEIGHBOURS = 12  # which neighbours of a node are sampled
    WALK = 13  # the steps of a random walk
    QUESTION = 16  # which question a language model is asked about a sample
    ANSWER = 14  # the draws of an answer
    MEASUREMENT_NOISE = 21  # the noise of measured quantities
    COMPONENT_MASK = 22  # which components of a quantity are hidden
    MIXUP = 30  # how much of its neighbour is mixed into a sample


def philox_reference(counter: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """Philox4x32-10 in numpy: the specification of the C++ and Triton ones.

    Args:
        counter: [N, 4] uint32, lowest word first.
        seed: 64-bit key.

    Returns:
        Random words, [N, 4] uint32.
    """
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(10):
        product0, product2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0 = (product2 >> np.uint64(32)) ^ c1 ^ np.uint64(key0)
        c1 = product2 & np.uint64(_WORD)
        c2 = (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1)
        c3 = product0 & np.uint64(_WORD)
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def streams(purpose: Purpose, crop: ArrayLike, position: ArrayLike, epoch: int) -> NDArray[np.uint32]:
    """Name N streams of draws: the upper three words of their counters.

    Args:
        purpose: What the draws decide.
        crop: [N] or scalar, crop numbers, 0 .. 65535.
        position: [N] or scalar, places in the epoch's global order, 0 .. 2^32 - 1.
        epoch: Pass over the survey, 0 .. 2^32 - 1.

    Returns:
        [N, 3] uint32.

    Raises:
        ValueError: A number does not fit its place in the counter.
    """
    crops, positions = np.broadcast_arrays(np.atleast_1d(np.asarray(crop)), np.atleast_1d(np.asarray(position)))
    for name, values, bits in (("crop", crops, 16), ("position", positions, 32), ("epoch", np.asarray(epoch), 32)):
        if values.size and (values.min() < 0 or values.max() >> bits):
            raise ValueError(
                f"random stream: {name} must be in 0 .. 2^{bits} - 1, got {values.min()} .. {values.max()}"
            )
    out = np.empty((len(positions), 3), np.uint32)
    out[:, 0] = (int(purpose) << 16) + crops
    out[:, 1] = positions
    out[:, 2] = epoch
    return out


def words(stream: NDArray[np.uint32], seed: int, count: int) -> NDArray[np.uint32]:
    """First `count` random words of every stream.

    Args:
        stream: [N, 3] uint32 from `streams`.
        seed: The run's seed, 0 .. 2^64 - 1.
        count: Words K of each stream.

    Returns:
        [N, K] uint32.

    Raises:
        ValueError: The seed is negative or has more than 64 bits.
    """
    check_seed(seed)
    quads = -(-count // 4)
    counter = np.empty((len(stream), quads, 4), np.uint32)
    counter[:, :, 0] = np.arange(quads)
    counter[:, :, 1:] = stream[:, None]
    return _C.philox(counter.reshape(-1, 4), seed).reshape(len(stream), 4 * quads)[:, :count]


def uniforms(stream: NDArray[np.uint32], seed: int, count: int) -> NDArray[np.float64]:
    """First `count` draws [N, K] float64 of every stream, uniform on (0, 1) in steps of 2^-32; arguments as `words`."""
    return (words(stream, seed, count).astype(np.float64) + 0.5) * 2.0**-32


def normals(stream: NDArray[np.uint32], seed: int, count: int) -> NDArray[np.float64]:
    """First `count` standard normal draws [N, K] float64 of every stream (Box-Muller); arguments as `words`."""
    u = uniforms(stream, seed, count + count % 2).reshape(len(stream), (count + 1) // 2, 2)
    radius, angle = np.sqrt(-2.0 * np.log(u[..., 0])), 2.0 * np.pi * u[..., 1]
    z = np.empty_like(u)
    z[..., 0], z[..., 1] = radius * np.cos(angle), radius * np.sin(angle)
    return z.reshape(len(stream), count + count % 2)[:, :count]


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` is a 64-bit key."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: must be in 0 .. 2^64 - 1, got {seed}")
