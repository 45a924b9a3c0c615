"""A thread that makes batches ahead of need: reads, decodes and transforms them in the plan's order."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypedDict, TypeVar

import torch

from armillary.engine.data.format.survey import Survey
from armillary.engine.data.loading.epoch_order import EpochOrder, MicroBatch
from armillary.engine.data.loading.readers import ReaderName
from armillary.models.method import Batch, BatchKey

__all__ = ["BatchRecipe", "PlannedReads", "Prefetcher", "Skipped", "SplitStream", "StreamOptions", "Transform"]

DEEPER = 4  # times as many batches are kept ready, at most, where the consumer has had to wait

Transform = Callable[[Batch, BatchKey], Batch]
Skipped = Literal["replace", "drop"]
"""What becomes of a corrupt sample that is skipped: another one takes its place, or its batch is shorter."""

T = TypeVar("T")


class StreamOptions(TypedDict, total=False):
    """Keyword arguments that loaders share; all but the first two have a meaning only where shards are read.

    Attributes:
        prefetch: Batches kept ready, 2 by default; up to four times as many where the consumer has had to wait.
        timeout_s: How long to wait for a batch before giving up on the storage; 1800 by default.
        modalities: What to read, of "image", "spectrum" and "vectors"; all that the survey has by default.
        reader: "dali", "webdataset", or "auto" (the default): DALI where it is installed.
        on_corrupt: "error" (the default) raises and names the sample; "skip" logs and counts it. Endless loaders then
            take the sample at the next position of the epoch that is not corrupt (its row, at the corrupt sample's
            position), a single pass leaves it out of its batch.
        threads: Threads for reading and for decoding on the CPU; 2 by default.
        packed: Hand out checked blobs, as `blobs` and `sizes`, in place of images. It is also set by a true attribute
            `packed` of the first transform.
    """

    prefetch: int
    timeout_s: float
    modalities: Sequence[str] | None
    reader: ReaderName
    on_corrupt: Literal["error", "skip"]
    threads: int
    packed: bool


class Prefetcher(Generic[T]):
    """Runs an iterator in a thread that stays at most `depth` items ahead; itself an iterator that must be closed.

    Storage that is fast on average but stalls now and then needs more items ahead than a steady one: each time the
    consumer finds nothing ready, the depth grows by one, up to `deepest`.

    Args:
        source: The iterator; it is closed in the thread that runs it.
        depth: Items kept ready at first.
        name: Name of the thread.
        deepest: Items kept ready at most; `depth` by default.
        timeout_s: How long the consumer waits for an item before it gives up; forever by default.

    Attributes:
        depth: Items kept ready now.
    """

    def __init__(
        self,
        source: Generator[T, None, None],
        depth: int,
        name: str,
        *,
        deepest: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._source = source
        self.depth = depth
        self._deepest = max(depth, deepest or depth)
        self._timeout_s = timeout_s
        self._handed_out = 0
        self._hangs = False
        self._ready: deque[T] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._stopped = False
        self._process = os.getpid()
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._source:
                with self._change:
                    self._change.wait_for(lambda: self._stopped or len(self._ready) < self.depth)
                    if self._stopped:
                        break
                    self._ready.append(item)
                    self._change.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            try:
                self._source.close()
            finally:
                with self._change:
                    self._ended = True
                    self._change.notify_all()

    def __iter__(self) -> Iterator[T]:
        """The prefetcher itself."""
        return self

    def __next__(self) -> T:
        """The next item.

        Raises:
            BaseException: What the iterator raised, after the items before it; again at every further call.
            TimeoutError: Nothing came for `timeout_s`.
        """
        with self._change:
            if not self._ready and not self._ended and self._handed_out:  # the first item is always waited for
                self.depth = min(self.depth + 1, self._deepest)
                self._change.notify_all()
            if not self._change.wait_for(lambda: self._ready or self._ended, self._timeout_s):
                self._hangs = True
                raise TimeoutError(
                    f"no batch came for {self._timeout_s:g} s: the storage hangs, or is far slower than training; look "
                    "at it, then start the same command: the run goes on from its last checkpoint"
                )
            if self._ready:
                item = self._ready.popleft()
                self._handed_out += 1
                self._change.notify_all()
                return item
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """End the thread and drop what it had ready. Does nothing in a forked child, which has no such thread."""
        if self._process != os.getpid():
            return
        with self._change:
            self._stopped = True
            self._ready.clear()
            self._change.notify_all()
        if self._thread is not threading.current_thread() and not self._hangs:
            self._thread.join()


class PlannedReads(Protocol):
    """Planned micro-batches with what was read for each; must be closed."""

    def __iter__(self) -> Iterator[tuple[MicroBatch, Any]]:
        """In the plan's order."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


class BatchRecipe(NamedTuple):
    """How a stream of batches is made.

    Attributes:
        reads: The micro-batches and what was read for them.
        make: Turns these two into a batch and the number of its corrupt samples.
        describe: A micro-batch in words, for an error.
    """

    reads: PlannedReads
    make: Callable[[MicroBatch, Any], tuple[Batch, int]]
    describe: Callable[[MicroBatch], str]


class SplitStream(ABC):
    """What all loaders share: a split of a survey, its order, and how a stream of batches is started.

    Args:
        folder: The survey.
        split: Split to read.
        device: Where batches are made.
        rank: This rank.
        world: Ranks.
        seed: Keys the order.
        shuffle: False for stored order in every epoch.
        transforms: Run on every batch, in this order; None does nothing.
        prefetch: See `StreamOptions`.
        timeout_s: See `StreamOptions`.

    Attributes:
        survey: Description of the survey.
        plan: The split's order.

    Raises:
        FileNotFoundError: No survey.
        ValueError: A field has no meaning, or the survey has no such split.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        *,
        device: torch.device | str,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        transforms: tuple[Transform | None, ...] = (),
        prefetch: int = 2,
        timeout_s: float = 1800.0,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank: must be in [0, world = {world}), got {rank}")
        if prefetch < 1:
            raise ValueError(f"prefetch: must be at least 1, got {prefetch}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: must be positive, got {timeout_s}")
        self.folder, self.split = Path(folder), split
        self.survey = Survey.load(folder)
        self.plan = EpochOrder.of(self.survey, split, seed=seed, shuffle=shuffle)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # The current device is one of the caller's thread; the loader's threads begin with device 0.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.transforms = tuple(t for t in transforms if t is not None)
        self.prefetch = prefetch
        self.timeout_s = timeout_s

    @abstractmethod
    def _begin(self, requests: Iterator[MicroBatch], skipped: Skipped) -> BatchRecipe:
        """Begin to read these micro-batches. Runs in the loader's thread."""

    @abstractmethod
    def after_fork(self) -> None:
        """Begin anew in a forked child: locks may have been taken by threads that do not exist here."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and memory. Does no harm twice."""

    def start(
        self, requests: Iterator[MicroBatch], skipped: Skipped, global_batch: int
    ) -> Prefetcher[tuple[Batch, int]]:
        """Start a thread that makes these batches, each with the number of its corrupt samples."""
        return Prefetcher(
            self._produce(requests, skipped, self.plan.seed, global_batch),
            self.prefetch,
            "armillary-loader",
            deepest=DEEPER * self.prefetch,
            timeout_s=self.timeout_s,
        )

    def _produce(
        self, requests: Iterator[MicroBatch], skipped: Skipped, seed: int, global_batch: int
    ) -> Generator[tuple[Batch, int], None, None]:
        """Finished batches. Runs in a thread."""
        stream = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            stream = torch.cuda.Stream(self.device)
        reads, make, describe = self._begin(requests, skipped)
        try:
            for request, read in reads:
                key = BatchKey(seed, request.epoch, request.first, global_batch)
                try:
                    with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else nullcontext():
                        batch, corrupt = make(request, read)
                        for transform in self.transforms if len(batch["row"]) else ():
                            batch = transform(batch, key)
                except Exception as error:
                    error.add_note(f"in the loader's thread, while making the batch of {describe(request)}")
                    raise
                if stream is not None:
                    # Finished before it is handed out and before what was read is let go. Blocking: waiting costs no CPU.
                    done = torch.cuda.Event(blocking=True)
                    done.record(stream)
                    done.synchronize()
                yield batch, corrupt
        finally:
            reads.close()
            self.close()

    def hand_out(self, batch: Batch) -> Batch:
        """Tell the GPU's allocator that the consumer's stream uses memory of the loader's stream."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            for tensor in batch.values():
                tensor.record_stream(stream)  # type: ignore[attr-defined]
        return batch
