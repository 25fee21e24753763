"""Choose the images of each batch and process, and start the processes that load them."""

import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import count, islice

import numpy as np
from torch.utils.data import Sampler

from refbn_d2.utils.errors import ConfigError, DataError


class GroupedBatchSampler(Sampler):
    """An endless stream of shuffled batches, each with images of a single group.

    An image waits until its group has enough images for a batch, even beyond the end of the epoch,
    so none is left out. Every process computes the same batches and takes its share of each, so a
    run does not depend on the number of processes.

    Args:
        groups: one hashable per image.
        batch_size: over all processes; a multiple of `world_size`.
        seed: 0 or more, the same in all processes.
        start_batch: number of batches already used.
        repeats: number of times that an image comes in a row (repeated augmentation, Hoffer et al.
            2020, "Augment your batch").

    Yields:
        A list of (index, draw): the image's index, and the number of images drawn before it.
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        repeats: int = 1,
    ):
        if not len(groups):
            raise DataError("there is no image to draw batches from; check DATASETS.TRAIN")
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH = {batch_size} cannot be split evenly over {world_size} "
                f"worker(s); allowed: {world_size}, {2 * world_size}, {3 * world_size}, ..."
            )
        if seed < 0:
            raise ValueError(f"the seed of the shuffle is {seed}; allowed: 0 or more")
        self.groups = groups
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_batch = start_batch
        self.repeats = repeats

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in islice(self._batches(), self.start_batch, None):
            yield batch[self.rank :: self.world_size]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting = defaultdict(list)
        for draw, index in enumerate(self._indices()):
            group = self.groups[index]
            waiting[group].append((index, draw))
            if len(waiting[group]) == self.batch_size:
                yield waiting.pop(group)

    def _indices(self) -> Iterator[int]:
        for epoch in count():
            # The 1 makes this generator different from those of augmentations.
            rng = np.random.default_rng([self.seed, epoch, 1])
            yield from rng.permutation(len(self.groups)).repeat(self.repeats).tolist()


def domains_of(dataset_dicts: Sequence[dict], field: str) -> list[Hashable]:
    """Return each image's domain, for batches of a single domain.

    Args:
        dataset_dicts: with "domain", read from `field` of the json's images.

    Raises:
        DataError: an image has no domain, or its domain is a list; names the image.
    """
    for d in dataset_dicts:
        domain = d.get("domain")
        if not isinstance(domain, str | int):
            raise DataError(
                "DATALOADER.BATCH_COMPOSITION = 'domain', but "
                f"image {d.get('image_id')} ({d['file_name']}) has {field!r} = {domain!r} in its "
                "json file; give every image a word or a whole number there, or set "
                "DATALOADER.DOMAIN_FIELD to another field"
            )
    return [d["domain"] for d in dataset_dicts]


def start_worker(worker: int) -> None:
    """Prepare a loading process: only the main process ends it; OpenCV uses one thread.

    A terminal sends Ctrl-C to all processes, and some batch systems send SIGTERM to all. The main
    process handles both, and may need batches until it has written its checkpoint. Without a
    limit, OpenCV starts one thread per core in each worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)


def _end_with_parent(parent: int) -> None:
    """Wait for SIGTERM from the parent process, which ends its workers by it; ignore others'."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
