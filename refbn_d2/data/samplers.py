"""Which images make a batch, in which order, in which process; and how those processes start."""

import signal
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import count, islice

import numpy as np
from torch.utils.data import Sampler

from refbn_d2.utils.errors import ConfigError, DataError


class GroupedBatchSampler(Sampler):
    """An endless stream of shuffled batches, each of images of one group.

    All epochs are one stream: images wait in their group until it has enough of them, over the
    end of an epoch too, so none is left out. Every process makes the same stream of batches
    and takes its share of each, hence a run does not depend on the number of processes.

    Args:
        groups: one hashable an image.
        batch_size: over all processes; a multiple of `world_size`.
        seed: 0 or more, the same in all processes.
        start_batch: batches that were used before.
        repeats: times that an image comes in a row (repeated augmentation, Hoffer et al. 2020,
            "Augment your batch").

    Yields:
        a list of (index, draw).
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
            raise DataError("there is no image to draw batches from")
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
            # the trailing 1 keeps this apart from the generators of augmentations
            rng = np.random.default_rng([self.seed, epoch, 1])
            yield from rng.permutation(len(self.groups)).repeat(self.repeats).tolist()


def domains_of(dataset_dicts: Sequence[dict], field: str) -> list[Hashable]:
    """Return each image's domain, for batches of one domain each.

    Args:
        dataset_dicts: with "domain", which was read from `field` of the json's images.

    Raises:
        DataError: an image has none, or one that is a list; names the image.
    """
    for d in dataset_dicts:
        domain = d.get("domain")
        if not isinstance(domain, str | int):
            raise DataError(
                "DATALOADER.BATCH_COMPOSITION = 'domain', and "
                f"image {d.get('image_id')} ({d['file_name']}) has {field!r} = {domain!r} in its "
                "json file; give every image a word or a whole number there, or name another field "
                "in DATALOADER.DOMAIN_FIELD"
            )
    return [d["domain"] for d in dataset_dicts]


def start_worker(worker: int) -> None:
    """Ctrl-C, which a terminal sends to workers too, is the main process's.

    SIGTERM ends them: that is how Python ends workers at exit. OpenCV would start a thread a core
    in each worker; torch limits itself there.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)
