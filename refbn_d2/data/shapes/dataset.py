"""Write the shapes to disk on first use, in COCO's format or as class folders."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from refbn_d2.data.names import DOMAINS, SPLITS, datasets_root
from refbn_d2.data.shapes.drawing import (
    CLASSES,
    Scene,
    draw_classification,
    draw_detection,
    polygons,
)
from refbn_d2.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


GENERATOR = "refbn_d2.data.shapes"
VERSION = "1"  # raise it with every change of a pixel or annotation: folders on disk are remade
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1]
_PNG += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]  # a third faster, a sixth larger
if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # remove the condition with OpenCV < 4.12: same pixels
    _PNG += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]


def make_detection(root=None, *, seed=0, size=128, num_train=4000, num_val=500) -> Path:
    """Make the COCO set unless it exists; return its folder, `root`/shapes.

    Files:

        shapes/{train,val}/000001.png
        shapes/annotations/instances_{train,val}.json
        shapes/annotations/instances_{train,val}_{domain}.json    the same, one domain each

    Image dicts have a "domain". Masks are polygons of the visible part; boxes and areas are those
    of the mask. The folder appears whole or not at all, and several processes may make it at once.

    Args:
        root (path): the folder of datasets; None: `datasets_root()`.
        seed (int): the seed of the drawing.
        size (int or (H, W)): the size of the images, at least 64 pixels in height and width.
        num_train, num_val (int): the number of images.

    Raises:
        ConfigError: a parameter is out of range.
        DataError: `root` cannot be written to.
        FileExistsError: the folder has other files, or a set made with other parameters.
    """
    return _make("detection", root, seed, size, num_train, num_val)


def make_classification(root=None, *, seed=0, size=64, num_train=6000, num_val=1200) -> Path:
    """Make the ImageFolder set unless it exists; return its folder, `root`/shapes_cls.

    Files are shapes_cls/{train,val}/<class>/000123_<domain>.png, with one object per image.
    Arguments and errors are those of `make_detection`, except that the images are at least 32
    pixels high and wide.
    """
    return _make("classification", root, seed, size, num_train, num_val)


def ensure_detection(root=None) -> Path:
    """Make the default COCO set under `root` unless it exists; return its folder.

    Raises:
        DataError, FileExistsError: see `make_detection`.
    """
    return make_detection(root)


def _make(kind: str, root, seed: int, size, num_train: int, num_val: int) -> Path:
    folder, smallest, write, _ = _KINDS[kind]
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2 or min(size) < smallest:
        raise ConfigError(f"size is {size}: {kind} images need (H, W) of {smallest} pixels or more")
    if seed < 0 or min(num_train, num_val) < 1:
        raise ConfigError(
            f"seed is {seed}, num_train {num_train}, num_val {num_val}; allowed: seed 0 or more, "
            "num_train and num_val 1 or more"
        )
    info = {"generator": GENERATOR, "version": VERSION, "kind": kind, "seed": seed}
    info.update(size=list(size), num_train=num_train, num_val=num_val)
    root = datasets_root() if root is None else Path(root)
    target = root / folder
    if _is_made(target, info):
        return target
    own_folder = _folder_in(root, f".{folder}-")
    logger.info(f"Drawing {num_train} + {num_val} {kind} images of {size[0]}x{size[1]} pixels")
    # Every process builds in its own folder; the first to finish renames it to `target`.
    with own_folder as own:
        new = Path(own, "new")
        new.mkdir()
        (new / "info.json").write_text(json.dumps(info, indent=1))
        write(new, info)
        while True:
            try:
                os.rename(new, target)
                break
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            if _is_made(target, info):
                break
            with contextlib.suppress(FileNotFoundError):  # another process may have moved it away
                os.rename(target, Path(own, "old"))
                shutil.rmtree(Path(own, "old"))
    return target


def _folder_in(root: Path, prefix: str) -> tempfile.TemporaryDirectory:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=prefix, dir=root)
    except OSError as error:  # no permission, a read-only disk, a file in the way
        raise DataError(
            f"nothing can be written to the folder of data sets, {root.absolute()} "
            f"({error.strerror}): set the environment variable DETECTRON2_DATASETS to a folder of "
            "yours"
        ) from error


def _is_made(target: Path, info: dict) -> bool:
    """Return whether `target` holds the set of `info`; raise if it holds something else."""
    found = None
    for _ in range(2):  # twice: another process may rename the folder between the two checks
        try:
            found = json.loads((target / "info.json").read_text())
            break
        except FileNotFoundError:
            if not target.is_dir() or not os.listdir(target):
                return False
        except NotADirectoryError:
            if not target.exists():  # the folder of data sets is itself a file
                return False
            break
        except ValueError:
            break
    way = "or choose another root (--root or the environment's DETECTRON2_DATASETS)"
    if not isinstance(found, dict) or found.get("generator") != GENERATOR:
        raise FileExistsError(f"{target} exists, but {GENERATOR} did not make it: move it, {way}")
    kept = ("kind", "seed", "size", "num_train", "num_val")
    other = [f"{k} {found.get(k)} (asked for: {info[k]})" for k in kept if found.get(k) != info[k]]
    if other:
        raise FileExistsError(f"{target} has a set with {', '.join(other)}: remove it, {way}")
    if found != info:
        logger.warning(f"{target} has generator version {found.get('version')}: making it again")
        return False
    names = [name for place, _, names in os.walk(target) for name in names if place != str(target)]
    if len(names) < info["num_train"] + info["num_val"] + _KINDS[info["kind"]][3]:
        logger.warning(f"{target} has missing files: making it again")
        return False
    return True


def encode_png(image: np.ndarray) -> bytes:
    """Return `image` (H, W, 3) uint8 BGR as the bytes of a PNG file."""
    return cv2.imencode(".png", image, _PNG)[1].tobytes()


def scenes(info: dict, split: str) -> Iterator[tuple[int, Scene]]:
    """Yield (index, scene) of every image of `split`; `info` is the content of info.json."""
    draw = draw_detection if info["kind"] == "detection" else draw_classification
    indices = range(info[f"num_{split}"])
    for index in tqdm(indices, f"shapes {split}", unit="image", disable=None):
        yield index, draw(info["seed"], split, index, tuple(info["size"]))


def _write_detection(folder: Path, info: dict) -> None:
    height, width = info["size"]
    categories = [{"id": i + 1, "name": c, "supercategory": "shape"} for i, c in enumerate(CLASSES)]
    (folder / "annotations").mkdir()
    for split in SPLITS:
        (folder / split).mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        digest = hashlib.sha256()
        for index, scene in scenes(info, split):
            name = f"{index + 1:06d}.png"
            image = {"id": index + 1, "file_name": name, "height": height, "width": width}
            images.append({**image, "domain": scene.domain})
            (folder / split / name).write_bytes(encode_png(scene.image))
            digest.update(scene.image.tobytes())
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label + 1,
                        "iscrowd": 0,
                        "area": int(mask.sum()),
                        "bbox": list(cv2.boundingRect(mask.view(np.uint8))),
                        "segmentation": polygons(mask),
                    }
                )
        digest.update(json.dumps(annotations).encode())
        logger.info(f"{split}: {len(annotations)} objects, sha256 {digest.hexdigest()}")
        about = {
            **info,
            "description": f"Shapes, {split}: synthetic images in {len(DOMAINS)} domains",
            "sha256": digest.hexdigest(),  # of the split's pixels (BGR) and annotations
        }
        for domain in (None, *DOMAINS):
            kept = [image for image in images if domain in (None, image["domain"])]
            ids = {image["id"] for image in kept}
            coco = {"info": about, "licenses": [], "images": kept, "categories": categories}
            coco["annotations"] = [a for a in annotations if a["image_id"] in ids]
            name = f"instances_{split}_{domain}.json" if domain else f"instances_{split}.json"
            (folder / "annotations" / name).write_text(json.dumps(coco, separators=(",", ":")))


def _write_classification(folder: Path, info: dict) -> None:
    for split in SPLITS:
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index, scene in scenes(info, split):
            name = f"{index:06d}_{scene.domain}.png"
            (folder / split / CLASSES[scene.labels[0]] / name).write_bytes(encode_png(scene.image))


# kind -> folder, smallest side of an image, writer (folder, info), number of files not images
_KINDS = {
    "detection": ("shapes", 64, _write_detection, len(SPLITS) * (1 + len(DOMAINS))),
    "classification": ("shapes_cls", 32, _write_classification, 0),
}
