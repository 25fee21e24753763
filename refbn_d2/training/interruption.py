"""Handle SIGINT and SIGTERM: a run ends after its current step, with a checkpoint."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stop:
    """The signal that asked to stop; 0 if none did."""

    number = 0

    def __call__(self, number: int, frame) -> None:
        self.number = number
        print(
            "Stopping: a checkpoint will be written. A second signal stops at once.",
            file=sys.stderr,
        )
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


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
