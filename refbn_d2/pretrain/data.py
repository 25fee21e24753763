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
import re
import tarfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from refbn_d2.utils import distributed
from refbn_d2.config import ConfigError
from refbn_d2.data import shapes
from refbn_d2.data.samplers import GroupedBatchSampler, start_worker
from refbn_d2.training.loop import seed_everything

logger = logging.getLogger(__name__)

ATTEMPTS = 10  # images that may be unreadable one after the other


# ---- where images are


class ReaderShards(Reader):
    """WebDataset shards by index: tar files of `<key>.<jpg, png, ...>` beside `<key>.cls`.

    timm's own reader of them streams: what it gives cannot be taken up again in the middle of an
    epoch, nor grouped, nor read twice for a reference batch. This one reads the headers of all
    shards once (local files), and then each image by its place.

    Raises:
        ValueError: a shard is broken, or a sample has no image or no .cls with a number.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__()
        self.files = files
        self.samples: list[tuple[str, int, int, int]] = []  # name, shard, offset, bytes
        self.targets: list[int] = []
        for number, file in enumerate(files):
            try:
                self._add(number, file)
            except tarfile.TarError as error:
                raise ValueError(f"{file} is cut off or no tar file: {error}") from error
        self.class_to_idx = {str(label): label for label in sorted(set(self.targets))}

    def _add(self, number: int, file: Path) -> None:
        with tarfile.open(file) as tar:
            for key, members in _by_key(tar).items():
                image = next((m for e, m in members.items() if e in _IMAGES), None)
                label = tar.extractfile(members["cls"]).read() if "cls" in members else b""
                if image is None or not label.strip().isdigit():
                    raise ValueError(
                        f"sample {key!r} of {file} lacks an image or its .cls with a number; is "
                        "the file whole?"
                    )
                place = number, image.offset_data, image.size
                self.samples.append((f"{file.name}/{image.name}", *place))
                self.targets.append(int(label))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        _, shard, offset, size = self.samples[index]
        with open(self.files[shard], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), self.targets[index]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.samples[index][0]


_IMAGES = {extension.removeprefix(".") for extension in get_img_extensions()}


def _by_key(tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """{key: {extension: member}}, a key being all up to the first dot of the base name."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.isfile():
            samples.setdefault(folder + slash + key, {})[extension.lower()] = member
    return samples


class ImageSet(Sequence):
    """The images under one path, as dataset dicts: image_id, file_name, label, read() -> bytes.

    A folder of class folders, a tar of class folders, a folder of tars of one class each (what
    timm's readers read), or WebDataset shards: a folder of them, one, or a pattern of names with
    `{000..127}`, `*` or `?`.

    Raises:
        FileNotFoundError: nothing is there.
        ConfigError: there are no images, or a tar is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader, self.class_to_idx, labels = _open(path)
        except (RuntimeError, ValueError, tarfile.TarError) as error:
            raise ConfigError(
                f"DATASETS: {path} holds no images that can be read: {error}"
            ) from error
        self.labels = [int(label) for label in labels]
        self.num_classes = 1 + max(self.class_to_idx.values())
        logger.info("%s: %d images of %d classes", path, len(self), len(self.class_to_idx))

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> dict:
        name = self.reader.filename(index)
        read = partial(self.read, index)
        return {"image_id": name, "file_name": name, "label": self.labels[index], "read": read}

    def read(self, index: int) -> bytes:
        """The image's file."""
        with self.reader[index][0] as file:
            return file.read()


def _open(path: Path) -> tuple[Reader, dict[str, int], Sequence[int]]:
    """A reader, its classes' labels by name, and its images' labels."""
    tars = _tars(path)
    if not tars:
        reader = ReaderImageFolder(str(path))
        return reader, reader.class_to_idx, [label for _, label in reader.samples]
    if _is_shard(tars[0]):
        reader = ReaderShards(tars)
        return reader, reader.class_to_idx, reader.targets
    # opened for each image: worker processes must not share an open file's position
    reader = ReaderImageInTar(str(path), cache_tarfiles=False)
    return reader, reader.class_name_to_idx, reader.targets


def _is_shard(file: Path) -> bool:
    """A tar of WebDataset's, not one of class folders or of a class."""
    try:
        with tarfile.open(file) as tar:
            return any(member.name.endswith(".cls") for member in islice(tar, 8))
    except tarfile.TarError as error:
        raise ValueError(f"{file} is cut off or no tar file: {error}") from error


def _tars(path: Path) -> list[Path]:
    """The tar files that `path` is, holds, or is a pattern of; [] for another folder."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if span := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path.name):
        before, first, last, behind = span.groups()
        numbers = range(int(first), int(last) + 1)
        files = [path.with_name(f"{before}{i:0{len(first)}d}{behind}") for i in numbers]
    else:
        files = sorted(path.parent.glob(path.name))
    missing = [file for file in files or [path] if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"DATASETS: {missing[0]} does not exist; DATASETS.ROOT, DATASETS.TRAIN and "
            "DATASETS.TEST say where images are (docs/pretraining.md has the layouts)"
        )
    return files


class ImageSets(NamedTuple):
    """DATASETS.TRAIN (None where only validation is to be run) and DATASETS.TEST."""

    train: ImageSet | None
    test: ImageSet


def load_images(cfg, training: bool) -> ImageSets:
    """Finds the images; the embedded shapes where DATASETS.ROOT is "", drawn on first use.

    Raises:
        FileNotFoundError, ConfigError: as `ImageSet`; or the classes of both sets differ, or their
            number from MODEL.NUM_CLASSES.
    """
    if cfg.DATASETS.ROOT:
        root = shapes.datasets_root() / Path(cfg.DATASETS.ROOT).expanduser()
    else:
        if distributed.rank() == 0:
            shapes.make_classification()
        distributed.barrier()
        root = shapes.make_classification()
    test = ImageSet(root / cfg.DATASETS.TEST)
    train = ImageSet(root / cfg.DATASETS.TRAIN) if training else None
    if train and train.class_to_idx != test.class_to_idx:
        raise ConfigError(_differing_classes(train, test))
    if cfg.MODEL.NUM_CLASSES not in (0, test.num_classes):
        raise ConfigError(
            f"MODEL.NUM_CLASSES = {cfg.MODEL.NUM_CLASSES}, but {(train or test).path} has "
            f"{test.num_classes} classes: complete the data, or set it to 0 to take what is there"
        )
    return ImageSets(train, test)


def _differing_classes(train: ImageSet, test: ImageSet) -> str:
    problems = []
    for one, other in ((train, test), (test, train)):
        lacking = sorted(one.class_to_idx.keys() - other.class_to_idx.keys())
        if lacking:
            names = ", ".join(name or "(outside of class folders)" for name in lacking[:5])
            more = ", ..." if len(lacking) > 5 else ""
            problems.append(
                f"{other.path} has none of {len(lacking)} of the {len(one.class_to_idx)} classes "
                f"of {one.path}: {names}{more}"
            )
    return (
        "the training and the validation images are not of the same classes: "
        + "; ".join(problems)
        + ". Each set needs one folder (or label) for every class"
    )


# ---- samples and batches


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
            ValueError: ten images in a row cannot be read.
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
            raise ValueError(
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
            ValueError: more than the share of this worker's part of the images are broken.
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
            raise ValueError(
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
        ValueError: SOLVER.IMS_PER_BATCH cannot be shared out.
        ConfigError: DATALOADER.BATCH_COMPOSITION is "domain", and an image's name tells none.
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
