"""Types of the compiled extension; one block for each file of csrc/ that binds functions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# csrc/codec.cpp
Blob = bytes | bytearray | memoryview | NDArray[np.uint8]

def encode(
    image: NDArray[np.float32], step: NDArray[np.float32] | None = None, valid: NDArray[np.bool_] | None = None
) -> bytes: ...
def decode(blob: Blob) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]: ...
def decode_batch(
    blobs: Sequence[Blob], out: NDArray[np.float32], valid_out: NDArray[np.bool_] | None = None, threads: int = 1
) -> list[tuple[int, str]]: ...
def check_batch(
    blobs: Sequence[Blob], channels: int, height: int, width: int, threads: int = 1
) -> list[tuple[int, str]]: ...
def crc32(data: Blob) -> int: ...

# csrc/noise.cpp
def philox(counter: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]: ...
def add_noise(
    image: NDArray[np.float32],
    sigma: NDArray[np.float32],
    streams: NDArray[np.uint32],
    seed: int,
    threads: int = 1,
) -> None: ...
def crop(
    image: NDArray[np.float32],
    origin: NDArray[np.int64],
    orientation: NDArray[np.int64],
    out: NDArray[np.float32],
    threads: int = 1,
) -> None: ...
def blur(image: NDArray[np.float32], sigma: NDArray[np.float64], threads: int = 1) -> None: ...
def block_masks(
    wanted: NDArray[np.int64], streams: NDArray[np.uint32], seed: int, height: int, width: int
) -> NDArray[np.bool_]: ...
def asinh(x: NDArray[np.float32], threads: int = 1) -> None: ...
def rgb(
    flux: NDArray[np.float32],
    bands: NDArray[np.int64],
    scales: NDArray[np.float32],
    m: float,
    q: float,
    out: NDArray[np.float32],
    threads: int = 1,
) -> None: ...

# csrc/prototypes.cpp; uint16 holds the bits of bfloat16
def prototype_rows(
    x: NDArray[np.float32] | NDArray[np.uint16],
    y: NDArray[np.float32] | NDArray[np.uint16],
    factors: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    weight: NDArray[np.float32],
    scale: float,
    gradient: bool,
    loss: NDArray[np.float32],
    work: NDArray[np.float32],
) -> None: ...

# csrc/walks.cpp
def random_walks(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    rows: NDArray[np.int64],
    streams: NDArray[np.uint32],
    seed: int,
    length: int,
    threads: int = 1,
) -> NDArray[np.int64]: ...
