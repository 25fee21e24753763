"""Convert the 2018 Data Science Bowl (BBBC038, stage1_train) to COCO's format, with domains.

    python -m refbn_d2.data.nuclei FOLDER OUT [--seed N]

    FOLDER/<image id>/images/<image id>.png     a microscope picture
    FOLDER/<image id>/masks/*.png               one nucleus each, not 0 inside

    OUT/images/<image id>.png                   the same files
    OUT/train.json, OUT/val.json                COCO: one class, "nucleus", masks as run lengths

Each image has a `domain`, the imaging modality. It follows from the mean saturation and value
(OpenCV's HSV, 0-255, without transparency) and from the shorter side in pixels:

    saturation > 12:  value > 200 and saturation < 75   stain_white
                      else                              stain_purple
    else:             value > 110                       brightfield
                      shorter side <= 256               fluorescence_small
                      else                              fluorescence_large

A quarter of each domain, drawn by the seed, goes to val: at least one picture if there are two. A
pixel in several masks belongs to the first by file name. A mask without pixels is left out. The log
counts both cases.

Image source: Caicedo et al., "Nucleus segmentation across imaging experiments: the 2018 Data
Science Bowl", Nature Methods 2019. License: CC0.
"""

import argparse
import json
import logging
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from refbn_d2.data.images import read_image
from refbn_d2.utils.errors import DataError
from refbn_d2.utils.extras import needs

with needs("train"):
    import cv2
    import pycocotools.mask
    from tqdm import tqdm

logger = logging.getLogger(__name__)

# fmt: off
DOMAINS = (
    "fluorescence_small", "fluorescence_large", "stain_purple", "stain_white", "brightfield",
)
# fmt: on


def domain_of(image: np.ndarray) -> str:
    """Return the imaging modality of a picture (H, W, 3) uint8 RGB, by the rule of this module."""
    _, saturation, value = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).mean(axis=(0, 1))
    if saturation > 12:
        return "stain_white" if value > 200 and saturation < 75 else "stain_purple"
    if value > 110:
        return "brightfield"
    return "fluorescence_small" if min(image.shape[:2]) <= 256 else "fluorescence_large"


def convert(folder: Path | str, out: Path | str, seed: int = 0) -> dict[str, dict[str, int]]:
    """Write the COCO dataset `out`, whole or not at all.

    Returns:
        {"train": {domain: number of pictures}, "val": ...}

    Raises:
        DataError: `folder` does not have this module's layout, a file cannot be read, a mask has
            another size than its picture, there are too few pictures for a val set, or `out`
            exists.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise DataError(f"{out} exists: remove it, or choose another folder to write")
    pictures = _pictures(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as own:
        new = Path(own, "new")
        (new / "images").mkdir(parents=True)
        images, annotations = _read(pictures, new / "images")
        counts = {}
        for split, chosen in _split(images, seed).items():
            coco = {
                "info": {
                    "description": f"Data Science Bowl 2018, stage1_train: {split}",
                    "generator": "refbn_d2.data.nuclei",
                    "seed": seed,
                },
                "licenses": [{"id": 1, "name": "CC0"}],
                "categories": [{"id": 1, "name": "nucleus"}],
                "images": chosen,
                "annotations": _numbered(annotations, chosen),
            }
            (new / f"{split}.json").write_text(json.dumps(coco, separators=(",", ":")))
            counts[split] = dict(Counter(image["domain"] for image in chosen))
        try:
            new.rename(out)
        except OSError as error:  # another process wrote it meanwhile
            raise DataError(f"{out} cannot be written: {error.strerror}") from error
    return counts


def _pictures(folder: Path) -> list[Path]:
    """Return the pictures, sorted by name; raise unless every subfolder has one."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the unpacked stage1_train")
    cases = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._")
    pictures = [case / "images" / f"{case.name}.png" for case in cases]
    missing = [picture for picture in pictures if not picture.is_file()]
    if len(missing) == len(pictures):
        raise DataError(
            f"{folder} has no <image id>/images/<image id>.png: give the unpacked stage1_train of "
            "the 2018 Data Science Bowl (BBBC038)"
        )
    if missing:
        raise DataError(f"{missing[0]} is missing: complete or remove {missing[0].parents[1]}")
    return pictures


def _read(pictures: list[Path], target: Path) -> tuple[list[dict], list[dict]]:
    """Return all images and annotations in COCO's format, without ids of the annotations."""
    images, annotations = [], []
    empty, overlapping = [], []
    for number, path in enumerate(tqdm(pictures, "nuclei", unit="image", disable=None), start=1):
        picture = _open(path)
        height, width = picture.shape[:2]
        image = {"id": number, "file_name": path.name, "height": height, "width": width}
        images.append({**image, "domain": domain_of(picture)})
        masks = sorted((path.parents[1] / "masks").glob("*.png"))
        if not masks:
            raise DataError(
                f"{path} has no masks in {path.parents[1] / 'masks'}: give stage1_train, the only "
                "part of the data with masks for each picture"
            )
        taken = np.zeros((height, width), bool)
        for mask_path in masks:
            red, green, blue = np.moveaxis(_open(mask_path), 2, 0)
            mask = (red | green | blue) > 0
            if mask.shape != taken.shape:
                raise DataError(
                    f"{mask_path} has {mask.shape[1]} x {mask.shape[0]} pixels, its picture has "
                    f"{width} x {height}: replace the mask, or remove {path.parents[1]}"
                )
            if (mask & taken).any():
                overlapping.append(mask_path)
                mask &= ~taken
            if not mask.any():
                empty.append(mask_path)
                continue
            taken |= mask
            annotations.append(_annotation(number, mask))
        shutil.copyfile(path, target / path.name)
    if empty or overlapping:
        logger.warning(
            "%d masks overlap an earlier mask, which keeps the common pixels; %d masks had no "
            "pixels of their own and were left out. The first is %s.",
            *(len(overlapping), len(empty), min(overlapping + empty)),
        )
    return images, annotations


def _open(path: Path) -> np.ndarray:
    try:
        return read_image(str(path), "RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"{error}: replace the file, or remove {path.parents[1]}") from error


def _annotation(image_id: int, mask: np.ndarray) -> dict:
    """Return the annotation of one nucleus; `mask` is bool (H, W)."""
    rle = pycocotools.mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": pycocotools.mask.toBbox(rle).tolist(),
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
    }


def _split(images: list[dict], seed: int) -> dict[str, list[dict]]:
    rng = np.random.default_rng(seed)
    val = set()
    for domain in DOMAINS:
        ids = [image["id"] for image in images if image["domain"] == domain]
        share = max(round(len(ids) / 4), int(len(ids) > 1))
        val.update(rng.permutation(ids)[:share].tolist())
    if not val:
        raise DataError(
            f"{len(images)} pictures, no two of one domain, are too few for train and val: "
            "give all of stage1_train"
        )
    return {
        "train": [image for image in images if image["id"] not in val],
        "val": [image for image in images if image["id"] in val],
    }


def _numbered(annotations: list[dict], images: list[dict]) -> list[dict]:
    """Return the images' annotations, with ids from 1: COCOeval takes an id of 0 for no object."""
    ids = {image["id"] for image in images}
    chosen = (a for a in annotations if a["image_id"] in ids)
    return [{"id": number, **annotation} for number, annotation in enumerate(chosen, start=1)]


def main(arguments: list[str] | None = None) -> None:
    """Convert a folder from the command line: `python -m refbn_d2.data.nuclei FOLDER OUT`."""
    parser = argparse.ArgumentParser(
        description="Convert the 2018 Data Science Bowl's stage1_train (BBBC038) to COCO format."
    )
    parser.add_argument("folder", help="the unpacked stage1_train, one folder for each picture")
    parser.add_argument("out", help="the folder to make: images/, train.json and val.json")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    args = parser.parse_args(arguments)
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}; give an integer from 0")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        counts = convert(args.folder, args.out, args.seed)
    except (DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    for split, domains in counts.items():
        of = ", ".join(f"{domains[name]} {name}" for name in DOMAINS if name in domains)
        print(f"{Path(args.out, split)}.json: {sum(domains.values())} pictures ({of})")


if __name__ == "__main__":
    main()
