"""From blobs to a batch: check, decode on the CPU or the GPU, and what happens to a corrupt sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data import codec
from armillary.engine.data.plan import MicroBatch, Plan
from armillary.engine.data.readers import PAD_TO, Blob, Blobs, ShardFiles
from armillary.engine.data.survey import Survey
from armillary.models.method import Batch

__all__ = ["BatchMaker", "OnCorrupt"]

log = logging.getLogger(__name__)

OnCorrupt = Literal["error", "replace", "drop"]

REPLACEMENT_TRIES = 64  # a run of as many corrupt samples is a broken shard, not a broken sample


class BatchMaker:
    """Makes batches of a split from blobs.

    Args:
        plan: The global order, for the place of a replacement.
        files: The split's files.
        survey: Their description.
        device: Where batches are made. On a GPU the blobs are checked by the CPU and decoded there.
        threads: Threads that decode on the CPU.
        on_corrupt: "error" raises; "replace" takes the sample at the next position of the epoch that is not corrupt
            (the batch then holds that sample's row, at the corrupt one's position), so that global batches stay the
            same for any number of ranks; "drop" leaves it out.
    """

    def __init__(
        self,
        plan: Plan,
        files: ShardFiles,
        survey: Survey,
        *,
        device: torch.device,
        threads: int,
        on_corrupt: OnCorrupt,
    ) -> None:
        self._plan = plan
        self._files = files
        self._shape = (len(survey.bands), survey.height, survey.width)
        self._codec = survey.codec
        self._device = device
        self._threads = threads
        self._on_corrupt = on_corrupt
        self._spare: list[Tensor] = []

    def make(self, request: MicroBatch, blobs: Blobs) -> tuple[Batch, int]:
        """Make one batch.

        Returns:
            The batch (row, position, image, and valid where a sample is masked) and how many samples were corrupt.

        Raises:
            codec.CorruptBlob: A sample is corrupt and may be neither replaced nor dropped.
        """
        position, row = request.position, request.row
        decoded = self._decode(blobs)
        corrupt = decoded if isinstance(decoded, list) else []
        if isinstance(decoded, list):
            host = list(blobs.host)
            keep = np.ones(len(host), bool)
            row = row.copy()
            for i in corrupt:
                if self._on_corrupt == "drop":
                    log.warning("%s; left out", self._complaint(request, i, host[i]))
                    keep[i] = False
                else:
                    host[i], row[i] = self._replacement(request, i, host[i])
            position, row = position[keep], row[keep]
            decoded = self._decode(Blobs([blob for blob, kept in zip(host, keep, strict=True) if kept]))
            assert not isinstance(decoded, list), "replacements are checked"
        image, valid = decoded
        batch: Batch = {
            "row": torch.from_numpy(row).to(self._device),
            "position": torch.from_numpy(position).to(self._device),
            "image": image,
        }
        if valid is not None:
            batch["valid"] = valid
        return batch, len(corrupt)

    def describe(self, request: MicroBatch) -> str:
        """A micro-batch in words, for an error that is not about one sample."""
        shards = dict.fromkeys(self._files.path(int(shard)).name for shard in request.shard)
        return (
            f"positions {request.position[0]} ... {request.position[-1]} of epoch {request.epoch} (from "
            f"{', '.join(shards)} in {self._files.folder})"
        )

    def recycle(self, image: Tensor) -> None:
        """Take back an image that nothing refers to any more: fresh pages cost about as much as decoding into them."""
        if image.device.type == "cpu" and len(self._spare) < 2:
            self._spare.append(image)

    def _decode(self, blobs: Blobs) -> tuple[Tensor, Tensor | None] | list[int]:
        """Decode to (image, valid or None where nothing is masked), or say which blobs are corrupt."""
        shape = (len(blobs.host), *self._shape)
        masked = any(_is_masked(blob) for blob in blobs.host)
        on_gpu = self._device.type == "cuda"
        if on_gpu and self._codec == "bitplane" and blobs.host:
            problems = codec.check_batch(blobs.host, *self._shape, threads=self._threads)
            return list(problems) or self._decode_on_gpu(blobs, masked)
        image = self._spare.pop() if self._spare else torch.empty(0)
        if image.shape != shape:
            image = torch.empty(shape, pin_memory=on_gpu)
        valid = torch.empty(shape, dtype=torch.bool, pin_memory=on_gpu) if masked else None
        corrupt = codec.decode_batch(
            blobs.host, image.numpy(), None if valid is None else valid.numpy(), threads=self._threads
        )
        if corrupt:
            return corrupt
        if on_gpu:
            image = image.to(self._device, non_blocking=True)
            valid = None if valid is None else valid.to(self._device, non_blocking=True)
        return image, valid

    def _decode_on_gpu(self, blobs: Blobs, masked: bool) -> tuple[Tensor, Tensor | None]:
        # Imported here because it brings Triton, which a CPU does not need.
        from armillary.kernels.decode import decode_bitplane

        sizes = torch.tensor([len(blob) for blob in blobs.host], device=self._device)
        padded = self._pad(blobs.host) if blobs.padded is None else blobs.padded
        image, valid = decode_bitplane(padded, sizes, *self._shape)
        return image, valid if masked else None

    def _pad(self, blobs: Sequence[Blob]) -> Tensor:
        """Copy blobs to the GPU as [B, P] uint8 with zeros behind them."""
        longest = max(len(blob) for blob in blobs)
        pinned = torch.zeros((len(blobs), -(-longest // PAD_TO) * PAD_TO), dtype=torch.uint8, pin_memory=True)
        for line, blob in zip(pinned.numpy(), blobs, strict=True):
            line[: len(blob)] = np.frombuffer(blob, np.uint8)
        return pinned.to(self._device, non_blocking=True)

    def _complaint(self, request: MicroBatch, number: int, blob: Blob) -> str:
        """Which sample is corrupt, where it lies, and what is wrong with it."""
        shard, index = int(request.shard[number]), int(request.index[number])
        member = self._files.member(shard, index)
        return (
            f"{self._files.path(shard)}: sample {member.key!r} (position {request.position[number]} of epoch "
            f"{request.epoch}, row {request.row[number]} of catalog.parquet, {member.size} bytes from byte "
            f"{member.offset}) is corrupt: {codec.check_batch([blob], *self._shape)[0]}"
        )

    def _replacement(self, request: MicroBatch, number: int, blob: Blob) -> tuple[Blob, int]:
        """Blob and row of the sample that takes the place of a corrupt one."""
        complaint = self._complaint(request, number, blob)
        if self._on_corrupt == "error":
            raise codec.CorruptBlob(
                f"{complaint}. Copy the shard again, or train without such samples: on_corrupt='skip' "
                "(--data.on-corrupt skip)"
            )
        samples = self._plan.samples
        for ahead in range(1, min(REPLACEMENT_TRIES, samples)):
            position = (request.position[number : number + 1] + ahead) % samples
            other = self._plan.read(request.epoch, request.first, position)
            candidate = self._files.read_planned(other, 0)
            if not codec.check_batch([candidate], *self._shape):
                key = self._files.member(int(other.shard[0]), int(other.index[0])).key
                log.warning("%s; replaced by sample %r (row %d)", complaint, key, other.row[0])
                return candidate, int(other.row[0])
        raise codec.CorruptBlob(
            f"{complaint}, and so are the samples after it; check the survey with "
            f"`armillary data check {self._files.folder}`"
        )


def _is_masked(blob: Blob) -> bool:
    try:
        return codec.read_header(blob).masked
    except codec.CorruptBlob:
        return False
