"""Say in a sentence what ended a process that loads data."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from refbn_d2.utils.errors import RefBNError, WorkerKilledError


def lost_loader(error: BaseException | None) -> bool:
    """Return whether `error` is DataLoader's for a process that was killed while it loaded data."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


@contextmanager
def loading_explained() -> Iterator[None]:
    """Turn the errors that DataLoader raises for its processes into sentences.

    DataLoader puts the traceback of the process into the message.

    Raises:
        RefBNError, OSError: a process raised it; without the traceback.
        WorkerKilledError: a signal ended a process.
    """
    try:
        yield
    except (RefBNError, OSError) as error:
        name, text = type(error).__name__, str(error)
        lines = list(re.finditer(rf"^[\w.]*\b{name}: ", text, re.M))
        if not (text.startswith(f"Caught {name} in DataLoader worker") and lines):
            raise
        raise type(error)(text[lines[-1].end() :].strip()) from error
    except RuntimeError as error:
        if not lost_loader(error):
            raise
        raise WorkerKilledError(
            f"{str(error).strip()} If nobody killed it, the machine may be out of memory: lower "
            "DATALOADER.NUM_WORKERS. Resume with --resume."
        ) from error
