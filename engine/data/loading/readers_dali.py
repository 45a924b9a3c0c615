"""Planned reads through NVIDIA DALI's webdataset reader, and its padding and copy to the GPU.

DALI reads what its index files say, in their order, so the plan is handed over as index files: one a run of samples of
the same shard. It would keep 315 MB for every million samples it is told of; therefore a pipeline is given one segment
of the plan at a time, and the next segment's pipeline is built by a helper thread while the current one is read. DALI
reads the index files when it is built; they are deleted at once (see `index_folder`).

Files are read, not mapped: a mapped tar that is truncated under the run ends the process with SIGBUS, and mapping is
slow on network file systems. That costs one descriptor a run, which bounds a segment.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.plugin.pytorch import feed_ndarray

from armillary.engine.data.format.shards import INDEX_VERSION
from armillary.engine.data.format.survey import MODALITIES
from armillary.engine.data.loading.epoch_order import MicroBatch
from armillary.engine.data.loading.index_folder import index_folder, remove_leftovers
from armillary.engine.data.loading.shard_files import PAD_TO, Blobs, ShardFiles

__all__ = ["DaliReader", "segments"]

log = logging.getLogger(__name__)

SEGMENT_SAMPLES = 8192  # index files of about 0.5 MB
SEGMENT_RUNS = 128  # open files a pipeline; two pipelines live at once and 1,024 descriptors is a usual limit
EXPECTED_BLOB_BYTES = 65536  # first allocation of a sample; a packed 3x152x152 cutout has about 50,000

Run = tuple[int, list[int]]


def _runs(request: MicroBatch) -> list[Run]:
    """Stretches of one shard in a request, as (shard, indices)."""
    cuts = np.flatnonzero(np.diff(request.shard)) + 1
    shards = request.shard[np.concatenate([[0], cuts])]
    return [(int(s), part.tolist()) for s, part in zip(shards, np.split(request.index, cuts), strict=True)]


def segments(requests: Iterator[MicroBatch]) -> Iterator[tuple[list[MicroBatch], list[Run]]]:
    """Group requests of equal size into segments that are small enough for one pipeline.

    Yields:
        (requests, runs): at least one request, and the stretches of each shard to read for all of them in order.
    """
    following = next(requests, None)
    while following is not None:
        taken, runs = [following], _runs(following)
        size = len(following.position)
        following = next(requests, None)
        while (
            following is not None
            and len(following.position) == size
            and (len(taken) + 1) * size <= SEGMENT_SAMPLES
            and len(runs) < SEGMENT_RUNS
        ):
            taken.append(following)
            for shard, indices in _runs(following):
                if shard == runs[-1][0]:
                    runs[-1][1].extend(indices)
                else:
                    runs.append((shard, indices))
            following = next(requests, None)
        yield taken, runs


class DaliReader:
    """Reads planned members with DALI.

    Args:
        files: The split's files.
        device: Where the batches go. On a GPU, DALI also pads the blobs to one length and copies them there.
        threads: Threads of the pipeline; reading itself has its own.
    """

    def __init__(self, files: ShardFiles, *, device: torch.device, threads: int) -> None:
        self._files = files
        self._device = device
        self._threads = threads
        self._builder: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def read(self, requests: Iterator[MicroBatch]) -> Generator[tuple[MicroBatch, Blobs], None, None]:
        """Yield every request with its blobs, in order; see `readers.Reader`."""
        if self._builder is None:
            remove_leftovers()
            self._builder = ThreadPoolExecutor(1, thread_name_prefix="armillary-dali")
        source = segments(requests)
        following = self._builder.submit(self._next_pipeline, source)
        try:
            while (current := following.result()) is not None:
                following = self._builder.submit(self._next_pipeline, source)
                yield from self._run(*current)
                del current
        finally:
            following.cancel()

    def close(self) -> None:
        """Stop building ahead and close the tars; pipelines end with the iterators that run them."""
        if self._builder is not None:
            self._builder.shutdown(cancel_futures=True)
            self._builder = None
        self._files.close()

    def _next_pipeline(
        self, source: Iterator[tuple[list[MicroBatch], list[Run]]]
    ) -> tuple[list[MicroBatch], Pipeline | RuntimeError] | None:
        """The next segment with the pipeline that reads it, or why DALI cannot."""
        segment = next(source, None)
        if segment is None:
            return None
        requests, runs = segment
        on_gpu = self._device.type == "cuda"
        with index_folder() as folder:
            indices = []
            for number, (shard, members) in enumerate(runs):
                lines = self._files.lines(shard)
                index = folder / f"{number}.idx"
                index.write_bytes(
                    b"\n".join([f"{INDEX_VERSION} {len(members)}".encode(), *(lines[i] for i in members), b""])
                )
                indices.append(str(index))
            pipeline = Pipeline(
                batch_size=len(requests[0].position),
                num_threads=self._threads,
                device_id=self._device.index if on_gpu else None,
                prefetch_queue_depth=2,
                exec_dynamic=True,  # outputs own their memory: batches outlive the next run and the pipeline
            )
            with pipeline:
                blobs = fn.readers.webdataset(  # one output a modality
                    paths=[str(self._files.path(shard)) for shard, _ in runs],
                    index_paths=indices,
                    ext=[MODALITIES[name] for name in self._files.modalities],
                    dont_use_mmap=True,
                    missing_component_behavior="empty",
                    tensor_init_bytes=EXPECTED_BLOB_BYTES,
                )
                outputs = list(blobs) if isinstance(blobs, list | tuple) else [blobs]
                if on_gpu and "image" in self._files.modalities:
                    images = outputs[self._files.modalities.index("image")]
                    outputs.append(fn.pad(images, fill_value=0, align=[PAD_TO]).gpu())
                pipeline.set_outputs(*outputs)
            try:
                pipeline.build()
            except RuntimeError as error:
                return requests, error
        return requests, pipeline

    def _run(self, requests: list[MicroBatch], pipeline: Pipeline | RuntimeError) -> Iterator[tuple[MicroBatch, Blobs]]:
        names = self._files.modalities
        if isinstance(pipeline, RuntimeError):
            yield from self._read_without(requests, pipeline)
            return
        for number, request in enumerate(requests):
            try:
                outputs = pipeline.run()
            except RuntimeError as error:
                yield from self._read_without(requests[number:], error)
                return
            host = {
                name: [blob if (blob := np.asarray(output[i])).size else None for i in range(len(request.position))]
                for name, output in zip(names, outputs, strict=False)
            }
            yield request, Blobs(host, self._on_gpu(outputs[-1]) if len(outputs) > len(names) else None)

    def _read_without(self, requests: list[MicroBatch], error: RuntimeError) -> Iterator[tuple[MicroBatch, Blobs]]:
        """Read the rest of a segment sample by sample: DALI tries nothing again, and names neither sample nor file.

        An error that passes costs a slow segment; one that does not is raised with the sample's name and place.
        """
        # Its text, not itself: a log record that is kept would keep the pipeline and its files.
        log.warning("DALI could not read (%s); reading the rest of this segment sample by sample", str(error))
        for request in requests:
            together = []
            for number in range(len(request.position)):
                try:
                    together.append(self._files.read_planned(request, number))
                except (OSError, ValueError) as found:
                    raise found from error
            yield request, Blobs({name: [blobs[name] for blobs in together] for name in self._files.modalities})

    def _on_gpu(self, padded: Any) -> torch.Tensor:
        """Copy DALI's padded blobs within the GPU to memory of torch's."""
        source = padded.as_tensor()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        # A stream of its own, so that the memory is not one that another stream has not finished with.
        with torch.cuda.stream(self._stream):
            copy = torch.empty(source.shape(), dtype=torch.uint8, device=self._device)
            feed_ndarray(source, copy, cuda_stream=self._stream)
        self._stream.synchronize()
        return copy
