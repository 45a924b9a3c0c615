"""Reading from storage that fails now and then: bounded retries with growing pauses.

Network file systems return errors that pass: a server restarts, a lease is lost, a connection times out. Such a read is
tried again; any other error, and one that does not pass, ends the run at once with what was read and for how long.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Retry"]

T = TypeVar("T")

log = logging.getLogger(__name__)

TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EREMOTEIO,
    errno.ENOTCONN,
}


@dataclass(frozen=True)
class Retry:
    """How often and how patiently to try again.

    Attributes:
        times: Tries after the first one.
        first_pause_s: Pause before the second try; each further one is twice as long.
        longest_pause_s: No pause is longer.
    """

    times: int = 6
    first_pause_s: float = 0.25
    longest_pause_s: float = 30.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.times < 0 or self.first_pause_s <= 0 or self.longest_pause_s < self.first_pause_s:
            raise ValueError(f"retry: needs times >= 0 and 0 < first_pause_s <= longest_pause_s, got {self}")

    def call(self, read: Callable[[], T], what: str) -> T:
        """The result of `read`, tried again after transient errors.

        Args:
            read: May raise OSError; must be safe to repeat.
            what: What is read, for the log and the error.

        Raises:
            OSError: The error does not pass, or is not of the passing kind.
        """
        start = time.monotonic()
        pause = self.first_pause_s
        for attempt in range(self.times + 1):
            try:
                return read()
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
                if attempt == self.times:
                    error.add_note(
                        f"{what}: given up after {attempt + 1} tries in {time.monotonic() - start:.1f} s; when the "
                        "storage is well again, start the same command: the run goes on from its last checkpoint"
                    )
                    raise
                log.warning("%s: %s; trying again in %.2f s", what, error, pause)
                time.sleep(pause)
                pause = min(2 * pause, self.longest_pause_s)
        raise AssertionError("unreachable")
