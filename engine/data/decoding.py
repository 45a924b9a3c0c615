"""From blobs to a batch: check, decode on the CPU or the GPU, and what happens to a corrupt sample."""

from __future__ import annotations

import logging
import weakref
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

__all__ = ["BatchMaker", "OnCorrupt", "decode_padded", "pad_blobs"]

log = logging.getLogger(__name__)

OnCorrupt = Literal["error", "replace", "drop"]

SPARE_BUFFERS = 4
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
        packed: Put checked blobs into batches, `blobs` and `sizes`, and leave decoding to who takes them.
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
        packed: bool = False,
    ) -> None:
        self._plan = plan
        self._files = files
        self._shape = (len(survey.bands), survey.height, survey.width)
        self._codec = survey.codec
        self._device = device
        self._threads = threads
        self._on_corrupt = on_corrupt
        self._packed = packed
        self._images = _Buffers()

    def make(self, request: MicroBatch, blobs: Blobs) -> tuple[Batch, int]:
        """Make one batch.

        Returns:
            The batch (row, position, image, and valid where a sample is masked; or blobs and sizes in place of these two)
            and how many samples were corrupt.

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
        decoded["row"] = torch.from_numpy(row).to(self._device)
        decoded["position"] = torch.from_numpy(position).to(self._device)
        return decoded, len(corrupt)

    def describe(self, request: MicroBatch) -> str:
        """A micro-batch in words, for an error that is not about one sample."""
        shards = dict.fromkeys(self._files.path(int(shard)).name for shard in request.shard)
        return (
            f"positions {request.position[0]} ... {request.position[-1]} of epoch {request.epoch} (from "
            f"{', '.join(shards)} in {self._files.folder})"
        )

    def _decode(self, blobs: Blobs) -> Batch | list[int]:
        """Make the pixels of a batch (image, and valid where any are masked; or blobs and sizes), or say which are corrupt."""
        kinds = [_kind(blob) for blob in blobs.host]
        masked = any(has_mask for _, has_mask in kinds)
        if self._device.type == "cuda" or self._packed:
            corrupt = set(codec.check_batch(blobs.host, *self._shape, threads=self._threads))
            corrupt |= self._of_another_codec(kinds)
            if corrupt:
                return sorted(corrupt)
            padded = pad_blobs(blobs.host, self._device) if blobs.padded is None else blobs.padded
            sizes = [len(blob) for blob in blobs.host]
            if self._packed:
                return {"blobs": padded, "sizes": torch.tensor(sizes, dtype=torch.int64, device=padded.device)}
            image, valid = decode_padded(padded, sizes, self._codec, *self._shape, masks=masked)
        else:
            shape = (len(blobs.host), *self._shape)
            image = self._images.take(shape)
            valid = torch.empty(shape, dtype=torch.bool) if masked else None
            mask = None if valid is None else valid.numpy()
            corrupt = set(codec.decode_batch(blobs.host, image.numpy(), mask, threads=self._threads))
            corrupt |= self._of_another_codec(kinds)
            if corrupt:
                return sorted(corrupt)
        return {"image": image} if valid is None else {"image": image, "valid": valid}

    def _of_another_codec(self, kinds: Sequence[tuple[str, bool]]) -> set[int]:
        """Blobs that a GPU, which decodes all of a survey with one kernel, would turn into zeros."""
        return {i for i, (name, _) in enumerate(kinds) if name != self._codec}

    def _fault(self, blob: Blob) -> str:
        """What is wrong with a blob; empty where nothing is."""
        found = codec.check_batch([blob], *self._shape)
        if not found and self._of_another_codec([_kind(blob)]):
            return f"its codec is {_kind(blob)[0]}, the survey's is {self._codec}"
        return found.get(0, "")

    def _complaint(self, request: MicroBatch, number: int, blob: Blob) -> str:
        """Which sample is corrupt, where it lies, and what is wrong with it."""
        shard, index = int(request.shard[number]), int(request.index[number])
        member = self._files.member(shard, index)
        return (
            f"{self._files.path(shard)}: sample {member.key!r} (position {request.position[number]} of epoch "
            f"{request.epoch}, row {request.row[number]} of catalog.parquet, {member.size} bytes from byte "
            f"{member.offset}) is corrupt: {self._fault(blob)}"
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
            if not self._fault(candidate):
                key = self._files.member(int(other.shard[0]), int(other.index[0])).key
                log.warning("%s; replaced by sample %r (row %d)", complaint, key, other.row[0])
                return candidate, int(other.row[0])
        raise codec.CorruptBlob(
            f"{complaint}, and so are the samples after it; check the survey with "
            f"`armillary data check {self._files.folder}`"
        )


def pad_blobs(blobs: Sequence[Blob], device: torch.device) -> Tensor:
    """Copy blobs to a device as [B, P] uint8, with zeros behind each; P is a multiple of 16."""
    longest = max((len(blob) for blob in blobs), default=0)
    width = max(-(-longest // PAD_TO), 1) * PAD_TO
    padded = torch.zeros((len(blobs), width), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for line, blob in zip(padded.numpy(), blobs, strict=True):
        line[: len(blob)] = np.frombuffer(blob, np.uint8)
    return padded.to(device, non_blocking=True)


def decode_padded(
    padded: Tensor, sizes: Sequence[int], name: str, channels: int, height: int, width: int, *, masks: bool
) -> tuple[Tensor, Tensor | None]:
    """Decode checked blobs where they lie.

    Args:
        padded: [B, P] uint8.
        sizes: Bytes of each blob.
        name: Codec of all blobs, "bitplane" or "float16".
        channels: Bands C of all blobs.
        height: Pixels.
        width: Pixels.
        masks: Whether any blob has a mask.

    Returns:
        image [B, C, H, W] float32 and valid [B, C, H, W] bool, None without `masks`.
    """
    # Imported here because it brings Triton, which a CPU that decodes with C++ does not need.
    from armillary.kernels.decode import decode_bitplane, decode_float16

    decode = decode_bitplane if name == "bitplane" else decode_float16
    return decode(
        padded, torch.tensor(sizes, dtype=torch.int64, device=padded.device), channels, height, width, masks=masks
    )


class _Buffers:
    """Float32 arrays whose memory is used again once nothing refers to them: fresh pages cost a third of a decoding."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape with any content."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(0, np.float32)
        if memory.shape != shape:
            memory = np.empty(shape, np.float32)
        # Every tensor and view that shares this memory holds on to `lent`, so its end is the end of them all.
        lent = memory[...]
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return torch.from_numpy(lent)

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < SPARE_BUFFERS:
            self._free.append(memory)


def _kind(blob: Blob) -> tuple[str, bool]:
    """Codec of a blob and whether it has a mask, without the checks of `codec.read_header`: decoding makes them."""
    view = blob.data if isinstance(blob, np.ndarray) else blob
    if len(view) < codec.HEADER.size:
        return "", False
    _, _, _, number, flags, *_ = codec.HEADER.unpack_from(view)
    return codec.CODECS[number] if number < len(codec.CODECS) else "", bool(flags & codec.MASKED)
