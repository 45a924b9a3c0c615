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
