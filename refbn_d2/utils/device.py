"""Choose the device of a run, and set up the C library's memory for the CPU."""

import ctypes
import logging
import sys

import torch

logger = logging.getLogger(__name__)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def resolve_device(device: str) -> str:
    """Return `device`; if it is "cuda" and there is no GPU, "cpu" with a warning."""
    if device == "cuda" and not torch.cuda.is_available():
        logger.warning("The config's device is cuda, but there is no GPU here: using the CPU.")
        return "cpu"
    return device


def keep_freed_memory() -> None:
    """Make the C library keep freed memory, because the next training step needs the same again.

    By default glibc returns large blocks to the system. On the CPU, every tensor then waits for new
    pages. Other C libraries than glibc are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)
