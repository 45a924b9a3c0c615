"""From blobs to a batch: check, decode on the CPU or the GPU, and what happens to a corrupt sample."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data.format import codec, spectra
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.format.vectors import decode_vectors
from armillary.engine.data.loading.epoch_order import EpochOrder, MicroBatch
from armillary.engine.data.loading.shard_files import PAD_TO, Blob, Blobs, ShardFiles
from armillary.models.method import Batch

__all__ = ["BatchMaker", "decode_padded", "pad_blobs"]

log = logging.getLogger(__name__)

SPARE_BUFFERS = 4
REPLACEMENT_TRIES = 64  # a run of as many corrupt samples is a broken shard, not a broken sample


class BatchMaker:
    """Makes batches of a split from blobs.

    Args:
        plan: The global order; it says where a replacement lies.
        files: The split's files.
        survey: Their description.
        device: Where batches are made. On a GPU the blobs are checked by the CPU and decoded there.
        threads: Threads that decode on the CPU.
        on_corrupt: "error" raises; "replace" takes the sample at the next position of the epoch that is not corrupt
            (the batch then holds that sample's row, at the corrupt one's position), so that global batches stay the
            same for any number of ranks; "drop" leaves it out.
        packed: Batches hold checked blobs, as `blobs` and `sizes`, in place of images.
    """

    def __init__(
        self,
        plan: EpochOrder,
        files: ShardFiles,
        survey: Survey,
        *,
        device: torch.device,
        threads: int,
        on_corrupt: Literal["error", "replace", "drop"],
        packed: bool = False,
    ) -> None:
        self._plan = plan
        self._files = files
        self._survey = survey
        self._image = _Kind(survey.codec, (len(survey.bands), survey.height, survey.width))
        if survey.spectrum is not None:
            self._spectrum = _Kind(survey.spectrum.codec, spectra.shape(survey.spectrum.grid.count))
        self._device = device
        self._threads = threads
        self._on_corrupt = on_corrupt
        self._packed = packed
        self._images = _Buffers()

    def make(self, request: MicroBatch, blobs: Blobs) -> tuple[Batch, int]:
        """Make one batch.

        Returns:
            The batch (see `Batch`: row, position and the modalities that were read, with `packed` blobs and sizes in place of
            images) and how many samples were corrupt.

        Raises:
            codec.CorruptBlob: A sample is corrupt and may be neither replaced nor dropped.
        """
        position, row = request.position, request.row
        decoded = self._decode(blobs)
        corrupt = decoded if isinstance(decoded, list) else []
        if isinstance(decoded, list):
            samples = [dict(zip(blobs.host, sample, strict=True)) for sample in zip(*blobs.host.values(), strict=True)]
            keep = np.ones(len(samples), bool)
            row = row.copy()
            for i in corrupt:
                if self._on_corrupt == "drop":
                    log.warning("%s; left out", self._complaint(request, i, samples[i]))
                    keep[i] = False
                else:
                    samples[i], row[i] = self._replacement(request, i, samples[i])
            position, row = position[keep], row[keep]
            kept = [sample for sample, k in zip(samples, keep, strict=True) if k]
            decoded = self._decode(Blobs({name: [sample[name] for sample in kept] for name in blobs.host}))
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
        """Decode what was read, or say which samples are corrupt."""
        batch = Batch()
        corrupt: set[int] = set()
        for name, host in blobs.host.items():
            if name == "vectors":
                corrupt |= self._decode_vectors(batch, host)
            else:
                corrupt |= self._decode_planes(batch, name, host, blobs.padded if name == "image" else None)
        return sorted(corrupt) if corrupt else batch

    def _decode_planes(self, batch: Batch, name: str, host: Sequence[Blob | None], padded: Tensor | None) -> set[int]:
        """Add images or spectra to the batch; the corrupt samples instead, where there are any."""
        there = [i for i, blob in enumerate(host) if blob is not None]
        kind = self._image if name == "image" else self._spectrum
        if len(there) < len(host):
            present = torch.zeros(len(host), dtype=torch.bool)
            present[there] = True
            batch["has_image" if name == "image" else "has_spectrum"] = present.to(self._device)
        if name == "image" and self._packed:
            return self._keep_packed(batch, host, padded)
        if padded is not None and len(there) < len(host):
            padded = padded[torch.tensor(there, device=padded.device)]
        found = self._planes([blob for blob in host if blob is not None], kind, padded)
        if isinstance(found, set):
            return {there[i] for i in found}
        planes, valid = found
        if len(there) < len(host):
            planes = _spread(planes, there, len(host))
            valid = None if valid is None else _spread(valid, there, len(host))
        if name == "image":
            batch["image"] = planes
            if valid is not None:
                batch["valid"] = valid
        else:
            batch["spectrum"], batch["spectrum_ivar"] = spectra.flux_and_ivar(planes, valid)
            if len(there) < len(host):  # a spectrum that is not there has no data, where decoded zeros would say ivar 1
                batch["spectrum_ivar"] *= batch["has_spectrum"][:, None]
        return set()

    def _keep_packed(self, batch: Batch, host: Sequence[Blob | None], padded: Tensor | None) -> set[int]:
        """Add checked image blobs to the batch; a sample without one has an empty blob, which decodes to flux 0."""
        there = {i: blob for i, blob in enumerate(host) if blob is not None}
        places = list(there)
        corrupt = {
            places[i] for i in codec.check_batch(list(there.values()), *self._image.shape, threads=self._threads)
        }
        corrupt |= {i for i, blob in there.items() if _header(blob)[0] != self._image.codec}
        if corrupt:
            return corrupt
        blobs = [b"" if blob is None else blob for blob in host]
        batch["blobs"] = pad_blobs(blobs, self._device) if padded is None else padded
        batch["sizes"] = torch.tensor([len(blob) for blob in blobs], dtype=torch.int64, device=self._device)
        return set()

    def _planes(
        self, blobs: Sequence[Blob], kind: _Kind, padded: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | set[int]:
        """Decode blobs of one kind to (planes, valid or None where nothing is masked), or say which are corrupt."""
        headers = [_header(blob) for blob in blobs]
        masked = any(has_mask for _, has_mask in headers)
        # A GPU decodes all of a survey with one kernel and would turn a blob of another codec into zeros.
        strangers = {i for i, (name, _) in enumerate(headers) if name != kind.codec}
        if self._device.type == "cuda":
            corrupt = strangers | set(codec.check_batch(blobs, *kind.shape, threads=self._threads))
            if corrupt:
                return corrupt
            rows = pad_blobs(blobs, self._device) if padded is None else padded
            return decode_padded(rows, [len(blob) for blob in blobs], kind.codec, *kind.shape, masks=masked)
        shape = (len(blobs), *kind.shape)
        planes = self._images.take(shape)
        valid = torch.empty(shape, dtype=torch.bool) if masked else None
        out = None if valid is None else valid.numpy()
        corrupt = strangers | set(codec.decode_batch(blobs, planes.numpy(), out, threads=self._threads))
        return corrupt or (planes, valid)

    def _decode_vectors(self, batch: Batch, host: Sequence[Blob | None]) -> set[int]:
        records = self._survey.vectors
        values = np.full((len(host), sum(record.size for record in records)), np.nan, np.float32)
        corrupt = set()
        for i, blob in enumerate(host):
            try:
                if blob is not None:
                    values[i] = decode_vectors(blob, records)
            except codec.CorruptBlob:
                corrupt.add(i)
        batch["vectors"] = torch.from_numpy(values).to(self._device)
        return corrupt

    def _fault(self, sample: Mapping[str, Blob | None]) -> str:
        """What is wrong with a sample; empty where nothing is."""
        for name, blob in sample.items():
            if blob is None:
                continue
            if name == "vectors":
                try:
                    decode_vectors(blob, self._survey.vectors)
                except codec.CorruptBlob as error:
                    return str(error)
                continue
            kind = self._image if name == "image" else self._spectrum
            if found := codec.check_batch([blob], *kind.shape):
                return found[0]
            if _header(blob)[0] != kind.codec:
                return f"its codec is {_header(blob)[0]}, the survey's is {kind.codec}"
        return ""

    def _complaint(self, request: MicroBatch, number: int, sample: Mapping[str, Blob | None]) -> str:
        """Which sample is corrupt, where it lies, and what is wrong with it."""
        shard, index = int(request.shard[number]), int(request.index[number])
        member = self._files.member(shard, index)
        return (
            f"{self._files.path(shard)}: sample {member.key!r} (position {request.position[number]} of epoch "
            f"{request.epoch}, row {request.row[number]} of catalog.parquet, {member.size} bytes from byte "
            f"{member.offset}) is corrupt: {self._fault(sample)}"
        )

    def _replacement(
        self, request: MicroBatch, number: int, sample: Mapping[str, Blob | None]
    ) -> tuple[dict[str, Blob | None], int]:
        """Blobs and row of the sample that takes the place of a corrupt one."""
        complaint = self._complaint(request, number, sample)
        if self._on_corrupt == "error":
            raise codec.CorruptBlob(
                f"{complaint}. Copy the shard again, or train without such samples: on_corrupt='skip' "
                "(--data.on-corrupt skip)"
            )
        samples = self._plan.samples
        for ahead in range(1, min(REPLACEMENT_TRIES, samples)):
            position = (request.position[number : number + 1] + ahead) % samples
            other = self._plan.read(request.epoch, request.first, position)
            candidate: dict[str, Blob | None] = {**self._files.read_planned(other, 0)}
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
    from armillary.kernels.pixels.decode import decode_bitplane, decode_float16

    decode = decode_bitplane if name == "bitplane" else decode_float16
    return decode(
        padded, torch.tensor(sizes, dtype=torch.int64, device=padded.device), channels, height, width, masks=masks
    )


class _Kind(NamedTuple):
    """What all blobs of a modality share."""

    codec: str
    shape: tuple[int, int, int]


def _spread(x: Tensor, places: list[int], count: int) -> Tensor:
    """Rows of x at some places among `count`, zeros elsewhere."""
    out = x.new_zeros(count, *x.shape[1:])
    out[torch.tensor(places, dtype=torch.int64, device=x.device)] = x
    return out


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


def _header(blob: Blob) -> tuple[str, bool]:
    """Codec of a blob and whether it has a mask, without the checks of `codec.read_header`: decoding makes them."""
    view = blob.data if isinstance(blob, np.ndarray) else blob
    if len(view) < codec.HEADER.size:
        return "", False
    _, _, _, number, flags, *_ = codec.HEADER.unpack_from(view)
    return codec.CODECS[number] if number < len(codec.CODECS) else "", bool(flags & codec.MASKED)
