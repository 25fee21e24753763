"""Handle SIGINT and SIGTERM: a run ends after its current step, with a checkpoint."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

AT_ONCE = 1.0  # seconds in which several signals are the same request


class _Stop:
    """The signal that asked to stop; 0 if none did."""

    number = 0
    time = 0.0

    def __call__(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.number == 0:
            self.number, self.time = number, now
            print(
                "Stopping: a checkpoint will be written. A second signal stops at once.",
                file=sys.stderr,
            )
        elif now - self.time > AT_ONCE:  # a batch system signals the launcher and its workers
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stop_signal() -> Iterator[_Stop]:
    stop = _Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
