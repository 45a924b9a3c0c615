"""Building a survey on a Dask cluster: the same tasks, on many machines.

The cluster's workers need this package, the survey's folder and the source's files under the same paths, as on any
shared file system. Shards depend on the source and the options alone, so a build may change between one machine and a
cluster, and back, and goes on where it stopped. A task whose worker dies is run again on another one; the shard that it
was writing appears under its name only when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from armillary.engine.data.building.workers import in_order
from armillary.engine.data.sources.source import Source

__all__ = ["Cluster"]

Task = TypeVar("Task")
Result = TypeVar("Result")

IN_FLIGHT = 4  # tasks for each of the cluster's threads: enough that none waits for the next one
CONNECT_S = 30


class Cluster:
    """Runs functions of (source, task) on a Dask cluster; the interface of `workers.Workers`.

    Args:
        source: Sent once to each worker.
        address: Of the scheduler, such as tcp://10.0.0.1:8786.

    Raises:
        ModuleNotFoundError: The package distributed is not installed.
        OSError: There is no scheduler at the address, or it has no workers.
    """

    def __init__(self, source: Source, address: str) -> None:
        try:
            from distributed import Client
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("building on a cluster needs Dask: pip install 'armillary[dask]'") from error
        try:
            self._client = Client(address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise OSError(f"no Dask scheduler at {address}: {error}") from error
        threads = sum(worker["nthreads"] for worker in self._client.scheduler_info(n_workers=-1)["workers"].values())
        if not threads:
            self._client.close()
            raise OSError(f"the Dask scheduler at {address} has no workers; start some with `dask worker {address}`")
        self.source = source
        self._in_flight = IN_FLIGHT * threads
        self._sent: Any = None

    def __enter__(self) -> Cluster:
        """Send the source to the workers."""
        self._sent = self._client.scatter(self.source, broadcast=True, hash=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what waits, and let go of the cluster."""
        self._client.close()

    def map(self, function: Callable[[Source, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of tasks.

        Args:
            function: A module-level function.
            tasks: Picklable.

        Raises:
            RuntimeError: A task killed several workers, one after the other.
        """
        from distributed import KilledWorker

        def submit(task: Task) -> Any:
            return self._client.submit(function, self._sent, task, pure=False)

        try:
            yield from in_order(submit, tasks, self._in_flight)
        except KilledWorker as error:
            raise RuntimeError(
                f"several workers died on the same task ({error}); give them more memory, and run the same command "
                "again: what is finished is kept"
            ) from error
