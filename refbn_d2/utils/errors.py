"""Define the errors that a user can fix; the command line prints each as one line."""

from collections.abc import Iterable


class RefBNError(ValueError):
    """An error that a user can fix. The message says what is wrong and what to do."""


class ConfigError(RefBNError):
    """A config file, key or value that cannot be used."""


class DataError(RefBNError):
    """A data set, image or annotation that cannot be used."""


class CheckpointError(RefBNError):
    """A checkpoint file that cannot be read, or that does not fit the model."""


class DivergedError(RefBNError, FloatingPointError):
    """A loss or a gradient is infinite or NaN: the training has diverged."""


class WorkerKilledError(RefBNError, ChildProcessError):
    """A worker process was ended by a signal."""


class MissingDependencyError(RefBNError, ImportError):
    """A package that the command needs is not installed, or cannot be imported."""


def listing(names: Iterable[str], limit: int = 20, separator: str = ", ") -> str:
    """Join the first `limit` names, and say how many more there are."""
    names = list(names)
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return separator.join(names[:limit] + more)
