"""Read pictures from files."""

import os
from collections.abc import Hashable
from pathlib import Path

import numpy as np
from PIL import Image

from refbn_d2.utils.errors import DataError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_pictures(folder: str | os.PathLike) -> list[Path]:
    """Return the pictures in `folder` and below it, sorted: files with one of SUFFIXES, not hidden.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        DataError: it has no pictures.
    """
    if not str(folder):
        raise FileNotFoundError("The folder of the pictures has an empty name. Give its path.")
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such folder of pictures. Check the path.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give the folder of the pictures.")
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(
            f"{folder} has no pictures. Known are {', '.join(SUFFIXES)}. Folders in it that are "
            "symbolic links are not searched."
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read_image(file_name: str, format: str, image_id: Hashable = None) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8 in `format` "RGB" or "BGR", upright by its EXIF tag.

    Gray becomes three equal channels, and a palette its colors. Transparency is dropped. 16-bit
    gray keeps its high byte, as 16-bit color does in PIL.

    Raises:
        FileNotFoundError: the file does not exist. The message names it and the image's id.
        DataError: the file is truncated or not a picture, or its values do not fit 8 or 16 bits.
    """
    of_image = "" if image_id is None else f" (image id {image_id})"
    try:
        with Image.open(file_name) as file:
            file.load()
            rgb = np.asarray(to_rgb(_upright(file)))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {file_name}{of_image} does not exist: check the dataset's image folder"
        ) from None
    except Exception as e:  # PIL may raise nearly anything on a broken picture
        raise DataError(
            f"image {file_name}{of_image} cannot be read: {e}. Repair or remove it."
        ) from e
    return rgb[:, :, ::-1] if format == "BGR" else rgb


_Transpose = getattr(Image, "Transpose", Image)  # an enum since Pillow 9.1
_UPRIGHT = {  # EXIF orientation -> its inverse
    2: _Transpose.FLIP_LEFT_RIGHT,
    3: _Transpose.ROTATE_180,
    4: _Transpose.FLIP_TOP_BOTTOM,
    5: _Transpose.TRANSPOSE,
    6: _Transpose.ROTATE_270,
    7: _Transpose.TRANSVERSE,
    8: _Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(274)
    except Exception:  # a broken EXIF block does not make the picture useless
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture in RGB; 16-bit gray keeps its high byte, where PIL would make it white.

    32-bit gray counts as 16-bit, or as 8-bit if no value is above 255.

    Raises:
        ValueError: its values do not fit 8 or 16 bits.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image)
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"it is of mode {image.mode}; convert it to 8 or 16 bits per channel")
    eight_bits = image.mode == "I" and values.max() <= 255
    return Image.fromarray((values >> (0 if eight_bits else 8)).astype(np.uint8)).convert("RGB")
