"""Make batches of labeled images.

Shapes and names:

    H, W            INPUT.SIZE or INPUT.SIZE_TEST
    index           position of an image in its set
    draw            number of images drawn before this one in the run
    unreadable      (name, reason) of images that cannot be read
    sample          image (3, H, W) uint8 RGB, label, unreadable
    batch           images (N, 3, H, W) uint8, labels (N,) int64, unreadable

(seed, epoch) determines the order of images, and (seed, draw) the augmentation of one.
"""

import io
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from refbn_d2.config import ConfigError
from refbn_d2.data.images import to_rgb
from refbn_d2.data.names import DOMAINS, domain_of
from refbn_d2.data.samplers import GroupedBatchSampler, start_worker
from refbn_d2.pretrain.data.datasets import ImageSet
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import DataError
from refbn_d2.utils.random_state import seed_everything

logger = logging.getLogger(__name__)

ATTEMPTS = 10  # unreadable images in a row that raise an error


Sample = tuple[Tensor | None, int | None, list[tuple[str, str]]]


class Samples(Dataset):
    """Transformed images, indexed by (index, draw).

    A sample names an image that cannot be read. With `replace`, the next readable image takes its
    place; without, image and label are None.
    """

    def __init__(
        self, images: ImageSet, transform: Callable, seed: int = 0, replace: bool = True
    ) -> None:
        self.images, self.transform, self.seed, self.replace = images, transform, seed, replace

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, draw = item
        return self.sample(index, self.seed, draw)

    def sample(self, index: int, *entropy: int) -> Sample:
        """Return the sample of image `index`; `entropy` determines its augmentation.

        Raises:
            DataError: ten images in a row cannot be read.
        """
        unreadable: list[tuple[str, str]] = []
        for _ in range(ATTEMPTS if self.replace else 1):
            try:
                image = to_rgb(Image.open(io.BytesIO(self.images.read(index))))
            except Exception as error:  # PIL raises nearly anything for a broken picture
                is_none = isinstance(error, UnidentifiedImageError)
                reason = "no image" if is_none else str(error)
                unreadable.append((self.images.reader.filename(index), reason))
                index = (index + 1) % len(self.images)
                continue
            seed_everything(*entropy)
            return self.transform(image), self.images.labels[index], unreadable
        if self.replace:
            raise DataError(
                f"{self.images.path}: {ATTEMPTS} images in a row cannot be read: "
                + _named(unreadable)
            )
        return None, None, unreadable


def _named(unreadable: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in unreadable)


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    images = [image for image, _, _ in samples if image is not None]
    labels = [label for _, label, _ in samples if label is not None]
    unreadable = [what for _, _, several in samples for what in several]
    return (
        torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8),
        torch.tensor(labels, dtype=torch.int64),
        unreadable,
    )


class Unreadable:
    """Log each unreadable image once, and raise if they are too large a share of the set."""

    def __init__(self, images: ImageSet, share: float) -> None:
        self.images, self.share = images, share
        self.found: dict[str, str] = {}

    def note(self, unreadable: list[tuple[str, str]]) -> None:
        """Record the unreadable images of a batch.

        Raises:
            DataError: they are a larger share of this worker's part of the images than allowed.
        """
        for name, reason in unreadable:
            if name not in self.found:
                self.found[name] = reason
                logger.warning(
                    "Unreadable image number %d is skipped: %s (%s)",
                    len(self.found), name, reason,
                )  # fmt: skip
        part = len(self.images) / distributed.world_size()
        if len(self.found) > self.share * part:
            raise DataError(
                f"{self.images.path}: {len(self.found)} of {len(self.images)} images cannot be "
                f"read, which is more than DATALOADER.MAX_UNREADABLE = {self.share} of them: "
                + _named(islice(self.found.items(), 5))
                + ". Repair or remove them (log.txt names all), or allow a larger share"
            )


def build_transform(cfg, training: bool) -> Callable[[Image.Image], Tensor]:
    """Return timm's transforms of INPUT.*: PIL image -> uint8 (3, H, W).

    Raises:
        ConfigError: INPUT.AUTO_AUGMENT is not in timm's notation.
    """
    inputs = cfg.INPUT
    interpolation = inputs.INTERPOLATION
    if not training:
        return create_transform(
            inputs.SIZE_TEST, crop_pct=inputs.CROP_PCT, use_prefetcher=True,
            interpolation="bilinear" if interpolation == "random" else interpolation,
        )  # fmt: skip
    try:
        return create_transform(
            inputs.SIZE, is_training=True, scale=inputs.SCALE, ratio=inputs.RATIO,
            hflip=0.5 if inputs.RANDOM_FLIP == "horizontal" else 0.0,
            color_jitter=inputs.COLOR_JITTER or None, auto_augment=inputs.AUTO_AUGMENT or None,
            interpolation=interpolation, use_prefetcher=True,
            mean=[value / 255 for value in cfg.MODEL.PIXEL_MEAN],  # RandAugment fills with it
        )  # fmt: skip
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"INPUT.AUTO_AUGMENT = {inputs.AUTO_AUGMENT!r} is not in timm's notation ({error!r}); "
            "write it as 'rand-m7-mstd0.5-inc1'"
        ) from error


def build_train_loader(cfg, samples: Samples, seed: int, start_iteration: int) -> DataLoader:
    """Return an endless loader of this worker's shares of batches, starting at `start_iteration`.

    Raises:
        ConfigError: SOLVER.IMS_PER_BATCH cannot be split over the workers; or
            DATALOADER.BATCH_COMPOSITION is "domain", and an image's name has no domain.
    """
    sampler = GroupedBatchSampler(
        _groups(cfg, samples.images), cfg.SOLVER.IMS_PER_BATCH, seed, distributed.rank(),
        distributed.world_size(), start_iteration, cfg.DATALOADER.AUG_REPEATS,
    )  # fmt: skip
    return _loader(cfg, samples, sampler)


def _groups(cfg, images: ImageSet) -> Sequence[Hashable]:
    composition = cfg.DATALOADER.BATCH_COMPOSITION
    if composition == "class":
        return [label // cfg.DATALOADER.CLASSES_PER_BATCH for label in images.labels]
    if composition == "iid":
        return [None] * len(images)
    domains = []
    for name in images.reader.filenames():
        domains.append(domain_of(name))
        if domains[-1] is None:
            raise ConfigError(
                f"DATALOADER.BATCH_COMPOSITION = 'domain': the name of {name} in {images.path} has "
                f"no domain. Names must end with one, as in *_{DOMAINS[0]}.png; or use 'iid'"
            )
    return domains


def build_test_loader(cfg, images: ImageSet) -> DataLoader:
    """Return a loader of this worker's images; each image comes once over all workers."""
    samples = Samples(images, build_transform(cfg, training=False), replace=False)
    indices = range(distributed.rank(), len(images), distributed.world_size())
    size = max(1, cfg.SOLVER.IMS_PER_BATCH // distributed.world_size())
    batches = [[(i, i) for i in indices[k : k + size]] for k in range(0, len(indices), size)]
    return _loader(cfg, samples, batches)


def _loader(cfg, samples: Samples, batches: Iterator | Sequence) -> DataLoader:
    workers = cfg.DATALOADER.NUM_WORKERS
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        # Spawned processes, as those of --num-gpus are, would import everything in each validation.
        multiprocessing_context="fork" if workers else None,
        collate_fn=_collate,
        worker_init_fn=start_worker,
        pin_memory=cfg.MODEL.DEVICE == "cuda",
        # A separate generator, so that a new iterator does not change other random numbers.
        generator=torch.Generator(),
    )
