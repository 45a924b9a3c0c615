"""Compiled parts of Armillary (csrc/)."""

import numpy as np
from numpy.typing import NDArray

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
