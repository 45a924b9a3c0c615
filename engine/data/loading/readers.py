"""The choice between the two readers of planned samples.

A reader turns the plan's micro-batches into blobs, in order. `readers_dali` gives the reads to NVIDIA DALI,
`readers_webdataset` to the webdataset package; both return the same bytes for the same plan.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from typing import Literal, Protocol

import torch

from armillary.engine.choices import check_choice
from armillary.engine.data.loading.epoch_order import MicroBatch
from armillary.engine.data.loading.shard_files import Blobs, ShardFiles

__all__ = ["Reader", "ReaderName", "make_reader"]

log = logging.getLogger(__name__)

ReaderName = Literal["auto", "dali", "webdataset"]


class Reader(Protocol):
    """Reads planned micro-batches."""

    def read(self, requests: Iterator[MicroBatch]) -> Generator[tuple[MicroBatch, Blobs], None, None]:
        """Yield every request with its blobs, in order. The iterator takes requests ahead of what it yields."""
        ...

    def close(self) -> None:
        """Stop reading ahead and let go of files and memory."""
        ...


def make_reader(name: ReaderName, files: ShardFiles, *, device: torch.device, threads: int) -> Reader:
    """Build the reader that a recipe names.

    Args:
        name: "dali", "webdataset", or "auto": DALI where it can be imported.
        files: The split's files.
        device: Where the batches go; DALI copies to a GPU itself.
        threads: Threads that read.

    Raises:
        ModuleNotFoundError: DALI was asked for and is not installed.
        ValueError: There is no reader of that name.
    """
    check_choice("reader", name, ReaderName)
    if name != "webdataset":
        try:
            from armillary.engine.data.loading.readers_dali import DaliReader

            log.info("reader: DALI")
            return DaliReader(files, device=device, threads=threads)
        except ImportError as error:
            if name == "dali":
                raise ModuleNotFoundError(
                    f"reader: DALI cannot be imported ({error}); install nvidia-dali-cuda130 or use reader='webdataset'"
                ) from error
            log.info("reader: webdataset, because DALI cannot be imported (%s)", error)
    else:
        log.info("reader: webdataset")
    from armillary.engine.data.loading.readers_webdataset import WebdatasetReader

    return WebdatasetReader(files, threads=threads)
