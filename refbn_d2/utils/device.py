"""The device of a run, and the memory of one that is the CPU."""

import ctypes
import logging
import sys

import torch

logger = logging.getLogger(__name__)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def resolve_device(device: str) -> str:
    """`device`, or "cpu" with a warning for a "cuda" that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        logger.warning("The config's device is cuda, and there is none here: using the CPU.")
        return "cpu"
    return device


def keep_freed_memory() -> None:
    """Have the C library keep what is freed: a step of training takes the same memory again.

    By default glibc returns large blocks to the system, and on the CPU every tensor then waits for
    its pages to be made anew. Of other C libraries nothing is asked.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)
