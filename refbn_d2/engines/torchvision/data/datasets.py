"""Load COCO data sets by the names in a config, as checked dataset dicts."""

import json
import logging
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pycocotools.mask as mask_util

from refbn_d2.data import catalog
from refbn_d2.data.coco import (
    CocoFile,
    check_pictures,
    match_classes,
    read_class_names,
    read_coco,
    repaired_file,
    silenced,
)
from refbn_d2.data.coco_values import clip_box
from refbn_d2.utils.errors import ConfigError, DataError, listing
from refbn_d2.utils.file_io import write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedDataset:
    """Dataset dicts, and what is needed to read them and to evaluate on them.

    `id_map`: category id in the file -> contiguous class 0..K-1. Of several training sets that are
    joined, `id_map` and `json_file` are those of the first. `repaired`: what to evaluate on, if the
    file is not right as it is.
    """

    name: str
    dicts: list[dict]
    class_names: list[str]
    id_map: dict[Hashable, int]
    json_file: Path
    repaired: dict | None = None

    def write_truth(self, output_dir: Path) -> Path:
        """Return the file to evaluate on: a repaired one is written into `output_dir`."""
        path = repaired_file(output_dir, self.name)
        if self.repaired is None:
            path.unlink(missing_ok=True)  # of an earlier run, before the file was put right
            return self.json_file
        write_text(path, json.dumps(self.repaired))
        return path

    def check_pictures(self) -> None:
        """Check that all pictures exist.

        Raises:
            FileNotFoundError: a folder or pictures are missing; counts and names them.
        """
        where = f"{self.json_file} (dataset {self.name})"
        check_pictures([d["file_name"] for d in self.dicts], where)


def load_train_dicts(cfg) -> LoadedDataset:
    """Load and join all of DATASETS.TRAIN.

    Raises:
        ConfigError: no name is given, a name is unknown, or the number of classes is not
            MODEL.ROI_HEADS.NUM_CLASSES.
        FileNotFoundError: a file does not exist.
        DataError: a file is broken, the classes differ between the sets, or MODEL.MASK_ON is set
            and masks are missing.
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
                f"{listing(first.class_names, 5)} and {listing(other.class_names, 5)}. Joined "
                "datasets need the same class names in the same order of category ids"
            )
    dicts = [dataset_dict for part in parts for dataset_dict in part.dicts]
    name = "+".join(part.name for part in parts)
    return LoadedDataset(name, dicts, first.class_names, first.id_map, first.json_file)


def load_test_dicts(cfg, name: str, class_names: Sequence[str] | None = None) -> LoadedDataset:
    """Load one dataset of DATASETS.TEST; a file without annotations will do.

    Args:
        class_names: the training set's, to match by name; None: the file has them in that order.

    Raises:
        ConfigError: the name is unknown, or the number of classes is not
            MODEL.ROI_HEADS.NUM_CLASSES.
        FileNotFoundError: the file does not exist.
        DataError: the file is broken, has objects of a class that `class_names` does not have, or
            MODEL.MASK_ON is set and masks are missing.
    """
    catalog.register_from_config(cfg)
    return _load(cfg, name, False, class_names)


def train_class_names(cfg) -> list[str] | None:
    """Return the class names of DATASETS.TRAIN, None if its first file is not on this machine.

    Raises:
        DataError: the file is broken.
    """
    catalog.register_from_config(cfg)
    for name in cfg.DATASETS.TRAIN[:1]:
        try:
            return read_class_names(catalog.get(name).json_file, name)
        except (ConfigError, FileNotFoundError) as error:
            logger.info("Classes are not matched by name with DATASETS.TRAIN: %s", error)
    return None


def check_datasets(cfg, eval_only: bool) -> None:
    """Read all of DATASETS and forget it: its errors come out before workers are started.

    Raises:
        ConfigError, DataError, FileNotFoundError: a data set cannot be used.
    """
    with silenced():  # worker 0 says it
        if eval_only:
            class_names = train_class_names(cfg) if cfg.DATASETS.TEST else None
        else:
            data = load_train_dicts(cfg)
            data.check_pictures()
            class_names = data.class_names
            del data
        for name in cfg.DATASETS.TEST:
            load_test_dicts(cfg, name, class_names).check_pictures()


def _load(
    cfg, name: str, is_train: bool = True, trained: Sequence[str] | None = None
) -> LoadedDataset:
    dataset = catalog.get(name)
    file = read_coco(dataset.json_file, name, annotated=is_train, masks=cfg.MODEL.MASK_ON)
    matched = trained is not None and match_classes(file, trained)
    dicts = _to_dicts(file, dataset.image_root, is_train, cfg.DATALOADER.DOMAIN_FIELD)
    names = file.class_names()
    if len(names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        way_out = f"Set MODEL.ROI_HEADS.NUM_CLASSES {len(names)}, or use another dataset"
        if not is_train:
            way_out += (
                ". A test set that lacks some classes is evaluated on the others if DATASETS.TRAIN "
                "names the training data"
            )
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES = {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, and dataset {name} "
            f"({dataset.json_file}) has {len(names)} classes: {listing(names, 5)}. {way_out}"
        )
    repaired = file.content if not is_train and (matched or file.repairs) else None
    return LoadedDataset(name, dicts, names, file.id_map(), Path(dataset.json_file), repaired)


def load_coco_json(
    json_file,
    image_root,
    dataset_name: str,
    require_annotations: bool = True,
    domain_field: str = "domain",
) -> tuple[list[dict], list[str], dict[Hashable, int]]:
    """Read a file in COCO's instances format; check and repair all of it.

    Boxes are clipped to their image. What is repaired or left out is said in one warning.

    Args:
        domain_field: of the file's images. If an image has it, it is its dict's "domain".

    Returns:
        dataset dicts by rising image id, class names by rising category id, and the map from
        the file's category ids to 0..K-1.

    Raises:
        FileNotFoundError: no such file.
        DataError: not JSON, not COCO's format, or a category, image or annotation that cannot be
            understood; names the file, the annotation's id and the image.
    """
    file = read_coco(json_file, dataset_name, require_annotations)
    dicts = _to_dicts(file, image_root, require_annotations, domain_field)
    return dicts, file.class_names(), file.id_map()


def _to_dicts(file: CocoFile, image_root, require_annotations: bool, domain_field: str):
    content, id_map = file.content, file.id_map()
    file.warn()
    if not content.get("annotations") and not require_annotations:
        logger.warning("%s has no annotations: results can be written, not scored.", file.where)
    found = {}
    for image in sorted(content["images"], key=lambda image: image["id"]):
        found[image["id"]] = own = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
        if domain_field in image:
            own["domain"] = image[domain_field]
    for annotation in content.get("annotations", []):
        image = found[annotation["image_id"]]
        image["annotations"].append(_to_annotation(annotation, image, id_map))
    dicts = list(found.values())
    if require_annotations and not any(d["annotations"] for d in dicts):
        raise DataError(f"{file.where}: no usable annotation in {len(dicts)} images")
    logger.info("%s: %d images, %d classes", file.where, len(dicts), len(id_map))
    return dicts


def _to_annotation(annotation: dict, image: dict, id_map: dict[Hashable, int]) -> dict:
    out = {
        "id": annotation["id"],
        "bbox": clip_box(annotation["bbox"], image["width"], image["height"]),
        "category_id": id_map[annotation["category_id"]],
        "iscrowd": annotation["iscrowd"],
    }
    segmentation = annotation.get("segmentation")
    if segmentation:
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
        out["segmentation"] = segmentation
    return out
