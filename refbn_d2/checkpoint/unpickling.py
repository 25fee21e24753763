"""Read pickles of numpy arrays without running their code."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from refbn_d2.utils.errors import CheckpointError


class _Refused(Exception):
    """The name of what an unpickler was asked to import."""


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain containers; imports nothing else."""

    _ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        # bytes, in protocols below 3; only the one codec pickle uses for them
        ("_codecs", "encode"): lambda text, codec: text.encode("latin1"),
    } | {
        (f"numpy.{core}.{module}", name): rebuild  # numpy 1's and numpy 2's place of it
        for core in ("core", "_core")
        for module, name, rebuild in (
            ("multiarray", "_reconstruct", np.zeros(1).__reduce__()[0]),
            ("multiarray", "scalar", np.float64(0).__reduce__()[0]),
            ("numeric", "_frombuffer", np.zeros(1).__reduce_ex__(5)[0]),
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise _Refused(f"{module}.{name}")
        return self._ALLOWED[module, name]


def read_pickle(path: Path) -> Any:
    """Return what the pickle at `path` holds: arrays and plain containers.

    Raises:
        CheckpointError: it asks for anything else, or is no pickle.
    """
    try:  # latin1 as in Detectron2: Python 2 wrote some of these files
        return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except _Refused as refused:
        raise holds_code(path, str(refused)) from None
    except Exception as error:  # anything may come out of bytes that are no pickle
        raise not_a_checkpoint(path, str(error)) from error


def holds_code(path: Path, what: str) -> CheckpointError:
    """Return the error of a file that would run code; `what` names it."""
    return CheckpointError(
        f"{path} holds code or objects ({what}); it was refused, and nothing of it was run. A "
        "checkpoint may hold tensors, arrays and plain containers alone: save a state_dict()."
    )


def not_a_checkpoint(path: Path, why: str) -> CheckpointError:
    """Return the error of a file that cannot be read; `why` is what the reader said."""
    why = why.strip().splitlines()
    return CheckpointError(
        f"{path} is cut off or no checkpoint ({why[-1] if why else 'unreadable'}): is it whole, "
        "and not a web page or a pointer to a file kept elsewhere?"
    )
