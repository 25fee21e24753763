"""Write a classifier's pictures as folders of class folders, unchanged or corrupted."""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from refbn_d2.data.corruptions import corrupt
from refbn_d2.data.images import to_rgb
from refbn_d2.study.sampling import SEED
from refbn_d2.utils.errors import DataError


def write_png(rgb: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8."""
    Image.fromarray(rgb).save(path, compress_level=1)


def copy_images(images, indices: Sequence[int], folder: Path, label: str = "") -> None:
    """Copy images into a folder of class folders, whole or not at all; `label` corrupts them."""
    if folder.exists():
        return
    if not len(indices):
        raise DataError(f"{images.path} has no pictures for {folder.name}; check the study's sets")
    classes = {label: name for name, label in images.class_to_idx.items()}
    corruption, _, severity = label.partition("/")
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for name in classes.values():
        (partial / name).mkdir(parents=True)
    for place, index in enumerate(indices):
        name = Path(images.reader.filename(index)).name
        target = partial / classes[images.labels[index]] / f"{index}_{name}"
        if corruption:
            rgb = corrupt(_rgb(images, index), corruption, int(severity), [SEED, place])
            write_png(rgb, target.with_suffix(".png"))
        else:
            target.write_bytes(images.read(index))
    partial.rename(folder)


def _rgb(images, index: int) -> np.ndarray:
    try:
        return np.asarray(to_rgb(Image.open(io.BytesIO(images.read(index)))))
    except Exception as error:  # PIL raises nearly anything for a broken picture
        name = images.reader.filename(index)
        raise DataError(f"{images.path}: {name} cannot be read: {error}") from error
