"""Datasets in COCO's format: from the names in a config to checked dataset dicts."""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pycocotools.mask as mask_util

from refbn_d2.data import catalog
from refbn_d2.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedDataset:
    """Dataset dicts with what is needed to read them and to evaluate on them.

    `id_map`: category id in the file -> contiguous class 0..K-1. Of several training sets
    joined, `id_map` and `json_file` are the first one's.
    """

    name: str
    dicts: list[dict]
    class_names: list[str]
    id_map: dict[int, int]
    json_file: Path


def load_train_dicts(cfg) -> LoadedDataset:
    """Loads and joins all of DATASETS.TRAIN.

    Raises:
        ConfigError: no name given, or the classes differ in number from
            MODEL.ROI_HEADS.NUM_CLASSES.
        DataError: the classes differ between the sets, or masks are trained and missing.
    """
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN = () names no training data; give it a dataset's name")
    catalog.register_from_config(cfg)
    parts = [_load(cfg, name) for name in cfg.DATASETS.TRAIN]
    first = parts[0]
    for other in parts[1:]:
        if other.class_names != first.class_names:
            raise DataError(
                f"DATASETS.TRAIN joins {first.name} and {other.name}, whose classes differ: "
                f"{_shown(first.class_names)} and {_shown(other.class_names)}. Joined datasets "
                "need the same class names in the same order of category ids"
            )
    if cfg.MODEL.MASK_ON:
        for part in parts:
            _check_masks(part)
    dicts = [dataset_dict for part in parts for dataset_dict in part.dicts]
    name = "+".join(part.name for part in parts)
    return LoadedDataset(name, dicts, first.class_names, first.id_map, first.json_file)


def load_test_dicts(cfg, name: str) -> LoadedDataset:
    """Loads one dataset of DATASETS.TEST; a file without annotations will do.

    Raises:
        ConfigError: its classes differ in number from MODEL.ROI_HEADS.NUM_CLASSES.
    """
    catalog.register_from_config(cfg)
    return _load(cfg, name, require_annotations=False)


def _load(cfg, name: str, require_annotations: bool = True) -> LoadedDataset:
    dataset = catalog.get(name)
    dicts, class_names, id_map = load_coco_json(
        dataset.json_file, dataset.image_root, name, require_annotations,
        cfg.DATALOADER.DOMAIN_FIELD,
    )  # fmt: skip
    if len(class_names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES = {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, and dataset {name} "
            f"({dataset.json_file}) has {len(class_names)} classes: {_shown(class_names)}. "
            f"Set MODEL.ROI_HEADS.NUM_CLASSES {len(class_names)}, or use another dataset"
        )
    return LoadedDataset(name, dicts, class_names, id_map, Path(dataset.json_file))


def _check_masks(dataset: LoadedDataset) -> None:
    for dataset_dict in dataset.dicts:
        for ann in dataset_dict["annotations"]:
            if "segmentation" not in ann and not ann["iscrowd"]:
                raise DataError(
                    f"MODEL.MASK_ON = True, and annotation {ann['id']} of image "
                    f"{dataset_dict['image_id']} in {dataset.json_file} (dataset {dataset.name}) "
                    "has no segmentation. Add masks, or set MODEL.MASK_ON False"
                )


def load_coco_json(
    json_file,
    image_root,
    dataset_name: str,
    require_annotations: bool = True,
    domain_field: str = "domain",
) -> tuple[list[dict], list[str], dict[int, int]]:
    """Reads a file in COCO's instances format, and checks all of it.

    Boxes are clipped to their image. Annotations with nothing to learn from (box of no width or
    height, no polygon of three points) are dropped, with one warning a kind.

    Args:
        domain_field: of the file's images; where an image has it, it is its dict's "domain".

    Returns:
        dataset dicts by rising image id, class names by rising category id, and the map from
        the file's category ids to 0..K-1.

    Raises:
        FileNotFoundError: no such file.
        DataError: not JSON, not COCO's format, or an image or annotation that cannot be
            right; names the file, the annotation's id and the image.
    """
    content = _read_json(Path(json_file), dataset_name)
    where = f"{json_file} (dataset {dataset_name})"
    parts = ["images", "categories"] + ["annotations"] * require_annotations
    if not isinstance(content, dict) or any(
        not isinstance(content.get(part), list) for part in parts
    ):
        have = sorted(content) if isinstance(content, dict) else [type(content).__name__]
        lacks = [p for p in parts if not isinstance(content, dict) or p not in content] or parts
        raise DataError(
            f"{where} is not in COCO's instances format: it lacks the list {' and '.join(lacks)} "
            f"(it holds {_shown(have)})"
        )
    id_map, class_names = _read_categories(content["categories"], where)
    images = _read_images(content["images"], image_root, where, domain_field)
    if not content.get("annotations") and not require_annotations:
        logger.warning("%s holds no annotations: results can be written, not scored", where)
    _read_annotations(content.get("annotations", []), images, id_map, where)
    dicts = [images[image_id] for image_id in sorted(images)]
    if require_annotations and not any(d["annotations"] for d in dicts):
        raise DataError(f"{where}: no usable annotation in {len(dicts)} images")
    logger.info("%s: %d images, %d classes", where, len(dicts), len(class_names))
    return dicts, class_names, id_map


def _read_json(json_file: Path, dataset_name: str):
    try:
        with open(json_file, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"dataset {dataset_name}: {json_file} does not exist. Built-in datasets are looked "
            "for under the folder in the environment variable DETECTRON2_DATASETS; "
            "one's own are named in DATASETS.REGISTER"
        ) from None
    except OSError as e:
        raise DataError(f"dataset {dataset_name}: {json_file} cannot be read: {e}") from e
    except ValueError as e:  # also UnicodeDecodeError
        raise DataError(f"dataset {dataset_name}: {json_file} is not JSON: {e}") from e


def _read_categories(categories: list, where: str) -> tuple[dict[int, int], list[str]]:
    names = {}
    for number, category in enumerate(categories):
        try:
            key, name = category["id"], category["name"]
        except (TypeError, KeyError):
            raise DataError(f"{where}: category number {number} lacks id or name") from None
        if key in names:
            raise DataError(f"{where}: category id {key} is given to {names[key]} and to {name}")
        names[key] = str(name)
    if not names:
        raise DataError(f"{where}: its list of categories is empty")
    ids = _sorted_ids(names, where)
    return {key: i for i, key in enumerate(ids)}, [names[key] for key in ids]


def _read_images(images: list, image_root, where: str, domain_field: str) -> dict[int, dict]:
    """Returns image id -> dataset dict without its annotations."""
    found = {}
    for number, image in enumerate(images):
        try:
            key, name = image["id"], image["file_name"]
            height, width = image["height"], image["width"]
            repeated = key in found
        except (TypeError, KeyError) as e:
            raise DataError(
                f"{where}: image number {number} is broken ({type(e).__name__}: {e}); each needs "
                "id, file_name, height and width"
            ) from None
        if not all(
            isinstance(side, int | float) and side >= 1 and side % 1 == 0
            for side in (height, width)
        ):
            raise DataError(
                f"{where}: image {key} ({name}) has height {height!r} and width {width!r}; "
                "both are whole pixels, 1 or more"
            )
        if repeated:
            raise DataError(
                f"{where}: image id {key} is given to {found[key]['file_name']} and to {name}"
            )
        found[key] = {
            "file_name": os.path.join(image_root, str(name)),
            "image_id": key,
            "height": int(height),
            "width": int(width),
            "annotations": [],
        }
        if domain_field in image:
            found[key]["domain"] = image[domain_field]
    if not found:
        raise DataError(f"{where}: its list of images is empty")
    return {key: found[key] for key in _sorted_ids(found, where)}


def _sorted_ids(ids, where: str) -> list:
    try:
        return sorted(ids)
    except TypeError:
        raise DataError(f"{where}: some ids are numbers and some are words") from None


def _read_annotations(
    annotations: list, images: dict[int, dict], id_map: dict[int, int], where: str
) -> None:
    """Checks the annotations and appends them to their images' dataset dicts."""
    strays, flat, pointless, clipped = [], [], [], []
    seen = set()
    for number, ann in enumerate(annotations):
        try:
            key, image_id, category_id = ann["id"], ann["image_id"], ann["category_id"]
            seen.add(key)
            image, class_id = images.get(image_id), id_map.get(category_id)
            bbox = ann["bbox"]
        except (TypeError, KeyError) as e:
            raise DataError(
                f"{where}: annotation number {number} is broken ({type(e).__name__}: {e}); each "
                "needs id, image_id, category_id and bbox"
            ) from None
        if image is None:
            strays.append(key)
            continue
        what = f"{where}: annotation {key} of image {image_id} ({image['file_name']})"
        if class_id is None:
            raise DataError(
                f"{what} has category_id {category_id!r}, which the file's categories do not list"
            )
        if ann.get("ignore", 0):
            raise DataError(f'{what} has "ignore" set; remove the annotation, or set "iscrowd"')
        box, beyond = _clip_box(bbox, image["width"], image["height"], what)
        if box is None:
            flat.append(key)
            continue
        if beyond > 1:
            clipped.append(key)
        out = {
            "id": key,
            "bbox": box,
            "category_id": class_id,
            "iscrowd": 1 if ann.get("iscrowd") else 0,
        }
        segmentation = ann.get("segmentation")
        if segmentation:
            segmentation = _check_segmentation(segmentation, image, what)
            if not segmentation:
                pointless.append(key)
                continue
            out["segmentation"] = segmentation
        image["annotations"].append(out)
    # Detectron2 knows that the minival files of COCO 2014 repeat some ids.
    if len(seen) < len(annotations) and "minival" not in where:
        raise DataError(
            f"{where}: {len(annotations) - len(seen)} annotation ids are used more than once; "
            "evaluation needs them unique"
        )
    _warn(where, strays, "belong to no image of the file; they are left out")
    _warn(where, flat, "have a box without width or height; they are left out")
    _warn(where, pointless, "have no polygon of 3 points or more; they are left out")
    _warn(where, clipped, "reach more than a pixel out of their image; their boxes are clipped")


def _warn(where: str, ids: list, what: str) -> None:
    if ids:
        logger.warning("%s: %d annotations %s (ids %s)", where, len(ids), what, _shown(ids))


def _clip_box(bbox, width: int, height: int, what: str) -> tuple[list[float] | None, float]:
    """Returns the box clipped to the image, None if it is flat, and how far it reached out."""
    try:
        x, y, w, h = bbox
        finite = math.isfinite(x + y + w + h)
    except (TypeError, ValueError):
        finite = False
    if not finite or w < 0 or h < 0:
        raise DataError(
            f"{what} has bbox {bbox!r}; it should be [x, y, width, height]: 4 finite numbers, "
            "width and height not negative"
        )
    if w == 0 or h == 0:
        return None, 0
    right, bottom = x + w, y + h
    if x >= 0 and y >= 0 and right <= width and bottom <= height:
        return [x, y, w, h], 0
    if x >= width or y >= height or right <= 0 or bottom <= 0:
        raise DataError(
            f"{what} has bbox {bbox!r} (x, y, width, height), wholly outside its picture of "
            f"{width} x {height} pixels (width x height)"
        )
    beyond = max(-x, -y, right - width, bottom - height)
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(right, width), min(bottom, height)
    return [x0, y0, x1 - x0, y1 - y0], beyond


def _check_segmentation(segmentation, image: dict, what: str) -> list | dict:
    """Returns the polygons of 3 points or more, or the run lengths in compressed form."""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [image["height"], image["width"]] or not isinstance(counts, str | list):
            raise DataError(
                f"{what} has a segmentation by run lengths with size {size!r} and counts of type "
                f"{type(counts).__name__}; it should have [height, width] of its image, "
                f"{[image['height'], image['width']]}, and counts"
            )
        if isinstance(counts, list):
            if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != math.prod(size):
                raise DataError(f"{what}: its run lengths do not add up to its image's pixels")
            return mask_util.frPyObjects(segmentation, *size)
        return segmentation
    try:
        kept = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
        finite = all(math.isfinite(sum(p)) for p in kept)
    except TypeError:
        finite = False
    if not finite:
        raise DataError(
            f"{what} has a segmentation that is neither a list of polygons "
            "[[x0, y0, x1, y1, ...], ...] of finite numbers nor run lengths"
        )
    return kept


def _shown(items: Sequence, most: int = 5) -> str:
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")
