"""Read labeled images from folders, tar files or WebDataset shards."""

import io
import logging
import re
import tarfile
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from refbn_d2.config import ConfigError
from refbn_d2.data.names import datasets_root
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import DataError
from refbn_d2.utils.extras import needs

logger = logging.getLogger(__name__)


class ReaderShards(Reader):
    """WebDataset shards with an index: tar files of `<key>.<jpg, png, ...>` and `<key>.cls`.

    timm's reader streams such shards. A stream cannot be resumed in the middle of an epoch, nor
    grouped, nor read again for a reference batch. This reader reads the headers of all shards once
    (they must be local files), and then any image by its position.

    Raises:
        DataError: a shard is broken, or a sample has no image or no .cls with a number.
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
                raise DataError(f"{file} is cut off or not a tar file: {error}") from error
        self.class_to_idx = {str(label): label for label in sorted(set(self.targets))}

    def _add(self, number: int, file: Path) -> None:
        with tarfile.open(file) as tar:
            for key, members in _by_key(tar).items():
                image = next((m for e, m in members.items() if e in _IMAGES), None)
                label = tar.extractfile(members["cls"]).read() if "cls" in members else b""
                if image is None or not label.strip().isdigit():
                    raise DataError(
                        f"sample {key!r} of {file} has no image, or no .cls file with a number; "
                        "write or download the file again"
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
    """Return {key: {extension: member}}; a key is the path up to the base name's first dot."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.isfile():
            samples.setdefault(folder + slash + key, {})[extension.lower()] = member
    return samples


class ImageSet(Sequence):
    """The images under one path, as dataset dicts: image_id, file_name, label, read() -> bytes.

    The path may be what timm's readers read: a folder of class folders, a tar of class folders, or
    a folder with a tar for each class. It may also be one WebDataset shard, a folder of shards, or
    a pattern of their names with `{000..127}`, `*` or `?`.

    Raises:
        FileNotFoundError: the path does not exist.
        ConfigError: there are no images, or a tar is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader, self.class_to_idx, labels = _open(path)
        except (RuntimeError, ValueError, tarfile.TarError) as error:
            raise ConfigError(
                f"DATASETS: {path} holds no images that can be read ({error}); docs/pretraining.md "
                "has the layouts"
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
        """Return the bytes of the image's file."""
        with self.reader[index][0] as file:
            return file.read()


def _open(path: Path) -> tuple[Reader, dict[str, int], Sequence[int]]:
    """Return a reader, its classes' labels by name, and its images' labels."""
    tars = _tars(path)
    if not tars:
        reader = ReaderImageFolder(str(path))
        return reader, reader.class_to_idx, [label for _, label in reader.samples]
    if _is_shard(tars[0]):
        reader = ReaderShards(tars)
        return reader, reader.class_to_idx, reader.targets
    # The tar is opened for each image: worker processes must not share an open file's position.
    reader = ReaderImageInTar(str(path), cache_tarfiles=False)
    return reader, reader.class_name_to_idx, reader.targets


def _is_shard(file: Path) -> bool:
    """Return whether it is a WebDataset shard, and not a tar of class folders or of a class."""
    try:
        with tarfile.open(file) as tar:
            return any(member.name.endswith(".cls") for member in islice(tar, 8))
    except tarfile.TarError as error:
        raise DataError(f"{file} is cut off or not a tar file: {error}") from error


def _tars(path: Path) -> list[Path]:
    """Return the tar files that `path` is, contains or matches; [] for a folder without any."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if span := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path.name):
        before, first, last, after = span.groups()
        numbers = range(int(first), int(last) + 1)
        files = [path.with_name(f"{before}{i:0{len(first)}d}{after}") for i in numbers]
    else:
        files = sorted(path.parent.glob(path.name))
    missing = [file for file in files or [path] if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"DATASETS: {missing[0]} does not exist; set DATASETS.ROOT, DATASETS.TRAIN and "
            "DATASETS.TEST to where the images are (docs/pretraining.md has the layouts)"
        )
    return files


class ImageSets(NamedTuple):
    """The images of DATASETS.TRAIN (None for validation only) and of DATASETS.TEST."""

    train: ImageSet | None
    test: ImageSet


def load_images(cfg, training: bool) -> ImageSets:
    """Return the images; if DATASETS.ROOT is "", the embedded shapes, drawn on first use.

    Raises:
        FileNotFoundError, ConfigError: see `ImageSet`; or the two sets have different classes, one
            class, or another number of classes than MODEL.NUM_CLASSES.
    """
    if cfg.DATASETS.ROOT:
        root = datasets_root() / Path(cfg.DATASETS.ROOT).expanduser()
    else:
        with needs("train"):  # only here: images of your own need no OpenCV
            from refbn_d2.data import shapes
        if distributed.rank() == 0:
            shapes.make_classification()
        distributed.barrier()
        root = shapes.make_classification()
    test = ImageSet(root / cfg.DATASETS.TEST)
    train = ImageSet(root / cfg.DATASETS.TRAIN) if training else None
    if train and train.class_to_idx != test.class_to_idx:
        raise ConfigError(_differing_classes(train, test))
    if test.num_classes < 2:
        raise ConfigError(
            f"{test.path} has only one class; a classifier needs two or more: put the images of "
            "each class into a folder that has its name (docs/pretraining.md has the layouts)"
        )
    if cfg.MODEL.NUM_CLASSES not in (0, test.num_classes):
        raise ConfigError(
            f"MODEL.NUM_CLASSES = {cfg.MODEL.NUM_CLASSES}, but {(train or test).path} has "
            f"{test.num_classes} classes: complete the data, or set it to 0 to use these classes"
        )
    return ImageSets(train, test)


def _differing_classes(train: ImageSet, test: ImageSet) -> str:
    problems = []
    for one, other in ((train, test), (test, train)):
        missing = sorted(one.class_to_idx.keys() - other.class_to_idx.keys())
        if missing:
            names = ", ".join(name or "(outside of class folders)" for name in missing[:5])
            more = ", ..." if len(missing) > 5 else ""
            problems.append(
                f"in {other.path}, {len(missing)} of the {len(one.class_to_idx)} classes of "
                f"{one.path} are missing: {names}{more}"
            )
    return (
        "the training images and the validation images have different classes: "
        + "; ".join(problems)
        + ". Each set needs one folder (or label) for every class"
    )
