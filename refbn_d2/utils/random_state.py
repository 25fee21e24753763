"""Seed the random generators of Python, NumPy and torch."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from refbn_d2.utils import distributed


def seed_everything(*entropy: int) -> None:
    """Seed the generators of Python, NumPy and torch by a function of `entropy`."""
    (seed,) = np.random.SeedSequence(entropy).generate_state(1).tolist()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed is much slower
    if torch.cuda.is_initialized():  # not in data loading workers
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)


def seed_of_run(cfg) -> int:
    """Return SEED, or a random one if it is negative; the same on all workers."""
    return distributed.broadcast(
        cfg.SEED if cfg.SEED >= 0 else random.SystemRandom().randrange(2**31)
    )


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch (CPU and `devices`), and restore them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
