"""Labelled images in folders, tar files or WebDataset shards, and the batches made of them.

    H, W            INPUT.SIZE or INPUT.SIZE_TEST
    index, draw     which image; how many were drawn before it in this run
    unreadable      (name, reason) of images that cannot be read
    sample          image (3, H, W) uint8 RGB, label, unreadable
    batch           images (N, 3, H, W) uint8, labels (N,) int64, unreadable

The order of images follows from (seed, epoch), and the augmentation of one from (seed, draw).
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
from refbn_d2.data import shapes
from refbn_d2.data.samplers import GroupedBatchSampler, start_worker
from refbn_d2.pretrain.data.datasets import ImageSet
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import DataError
from refbn_d2.utils.random_state import seed_everything

logger = logging.getLogger(__name__)

ATTEMPTS = 10  # images that may be unreadable one after the other


Sample = tuple[Tensor | None, int | None, list[tuple[str, str]]]


class Samples(Dataset):
    """Transformed images, indexed by (index, draw).

    An image that cannot be read is named in the sample, and the next one that can takes its place
    (`replace`), or none does (image and label are None).
    """

    def __init__(
        self, images: ImageSet, transform: Callable, seed: int = 0, replace: bool = True
    ) -> None:
        self.images, self.transform, self.seed, self.replace = images, transform, seed, replace

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, draw = item
        return self.sample(index, self.seed, draw)

    def sample(self, index: int, *entropy: int) -> Sample:
        """Image `index`; `entropy` decides its augmentation.

        Raises:
            DataError: ten images in a row cannot be read.
        """
        unreadable: list[tuple[str, str]] = []
        for _ in range(ATTEMPTS if self.replace else 1):
            try:
                image = Image.open(io.BytesIO(self.images.read(index))).convert("RGB")
            except Exception as error:  # a broken picture makes PIL raise nearly anything
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
    """Names each image that could not be read once, until they are too large a share of the set."""

    def __init__(self, images: ImageSet, share: float) -> None:
        self.images, self.share = images, share
        self.found: dict[str, str] = {}

    def note(self, unreadable: list[tuple[str, str]]) -> None:
        """What of a batch could not be read.

        Raises:
            DataError: more than the share of this worker's part of the images are broken.
        """
        for name, reason in unreadable:
            if name not in self.found:
                self.found[name] = reason
                logger.warning(
                    "Image %d that cannot be read, and is skipped: %s (%s)",
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
    """timm's transforms under INPUT.*: PIL image -> uint8 (3, H, W).

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
            mean=[value / 255 for value in cfg.MODEL.PIXEL_MEAN],  # where RandAugment shifts
        )  # fmt: skip
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"INPUT.AUTO_AUGMENT = {inputs.AUTO_AUGMENT!r} is not in timm's notation ({error!r}); "
            "an example is 'rand-m7-mstd0.5-inc1'"
        ) from error


def build_train_loader(cfg, samples: Samples, seed: int, start_iteration: int) -> DataLoader:
    """An endless loader of this worker's shares of batches, from `start_iteration` on.

    Raises:
        ConfigError: SOLVER.IMS_PER_BATCH cannot be split over the workers; or
            DATALOADER.BATCH_COMPOSITION is "domain", and an image's name tells none.
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
        domains.append(shapes.domain_of(name))
        if domains[-1] is None:
            raise ConfigError(
                f"DATALOADER.BATCH_COMPOSITION = 'domain': the name of {name} in {images.path} "
                f"tells no domain. It ends on one in the embedded shapes: *_{shapes.DOMAINS[0]}.png"
            )
    return domains


def build_test_loader(cfg, images: ImageSet) -> DataLoader:
    """A loader of this worker's images, each image once over all workers."""
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
        # not spawned, as the processes of --num-gpus are: every validation would import all anew
        multiprocessing_context="fork" if workers else None,
        collate_fn=_collate,
        worker_init_fn=start_worker,
        pin_memory=cfg.MODEL.DEVICE == "cuda",
        generator=torch.Generator(),  # its own: making an iterator must not move others' numbers
    )
