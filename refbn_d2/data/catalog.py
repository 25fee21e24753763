"""Look up data sets by name: COCO by Detectron2's names, your own, and the synthetic shapes.

Paths start from the folder in the environment variable DETECTRON2_DATASETS ("./datasets" by
default), which is read at each look-up. `refbn_d2.data.shapes` describes the sets `shapes_*`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from refbn_d2.data.names import DOMAINS, SPLITS, datasets_root
from refbn_d2.utils.errors import ConfigError
from refbn_d2.utils.extras import needs

# name -> (image root, json), both relative to the root of the data sets
_COCO = {
    "coco_2014_train": ("coco/train2014", "coco/annotations/instances_train2014.json"),
    "coco_2014_val": ("coco/val2014", "coco/annotations/instances_val2014.json"),
    "coco_2014_minival": ("coco/val2014", "coco/annotations/instances_minival2014.json"),
    "coco_2014_minival_100": ("coco/val2014", "coco/annotations/instances_minival2014_100.json"),
    "coco_2014_valminusminival": (
        "coco/val2014",
        "coco/annotations/instances_valminusminival2014.json",
    ),
    "coco_2017_train": ("coco/train2017", "coco/annotations/instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", "coco/annotations/instances_val2017.json"),
    "coco_2017_val_100": ("coco/val2017", "coco/annotations/instances_val2017_100.json"),
    "coco_2017_test": ("coco/test2017", "coco/annotations/image_info_test2017.json"),
    "coco_2017_test-dev": ("coco/test2017", "coco/annotations/image_info_test-dev2017.json"),
}
_SHAPES = {
    f"shapes_{part}": (f"shapes/{split}", f"shapes/annotations/instances_{part}.json")
    for split in SPLITS
    for part in (split, *(f"{split}_{domain}" for domain in DOMAINS))
}
_BUILTIN = _COCO | _SHAPES
SHAPES = tuple(_SHAPES)  # names of the synthetic sets, which are drawn on first use


@dataclass(frozen=True)
class Dataset:
    """A data set in COCO's format; the image names in `json_file` are relative to `image_root`."""

    name: str
    json_file: Path
    image_root: Path


_registered: dict[str, Dataset] = {}


def builtin(name: str) -> Dataset | None:
    """Return the data set that has this name without being registered, or None."""
    if name not in _BUILTIN:
        return None
    image_root, json_file = _BUILTIN[name]
    root = datasets_root()
    return Dataset(name, root / json_file, root / image_root)


def names() -> list[str]:
    """Return all names that `get` knows, sorted."""
    return sorted(_BUILTIN | _registered)


def find(name: str) -> Dataset:
    """Return the data set called `name`, without a check that its files exist.

    Raises:
        ConfigError: no data set has this name.
    """
    dataset = _registered.get(name) or builtin(name)
    if dataset is None:
        raise ConfigError(
            f"no data set is called {name!r}. Known: {', '.join(names())}. Register your own with "
            f"DATASETS.REGISTER (({name!r}, json, image_root),) in the config, or with "
            "register_coco_instances"
        )
    return dataset


def get(name: str) -> Dataset:
    """Return the data set called `name`; a `shapes_*` set is drawn on first use.

    Raises:
        ConfigError: no data set has this name.
        DataError, FileExistsError: a `shapes_*` set cannot be written to the folder of data sets.
        MissingDependencyError: a `shapes_*` set is not there yet, and OpenCV is not installed.
    """
    dataset = find(name)
    if name in SHAPES and name not in _registered:
        with needs("train"):  # only here: the plugin reads the catalog, and works without OpenCV
            from refbn_d2.data import shapes
        shapes.ensure_detection(datasets_root())
    return dataset


def register_coco_instances(
    name: str, json_file: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """Register your own data in COCO's format under a name; a repeated call changes nothing.

    Args:
        name: the name for DATASETS.TRAIN and DATASETS.TEST.
        json_file: its annotations.
        image_root: the folder that the file names in the json are relative to.

    Raises:
        ConfigError: the name is empty, or other data has it.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"the name of a data set must be a non-empty string, not {name!r}")
    dataset = Dataset(name, Path(json_file), Path(image_root))
    known = _registered.get(name) or builtin(name) or dataset
    if known != dataset:
        raise ConfigError(
            f"data set {name!r} is already {known.json_file} with images in {known.image_root}; "
            f"give {dataset.json_file} with images in {dataset.image_root} another name"
        )
    if name not in _BUILTIN:
        _registered[name] = dataset


def register_from_config(cfg) -> None:
    """Register the data sets of DATASETS.REGISTER: ((name, json file, image folder), ...).

    Raises:
        ConfigError: an entry has another form, or other data has its name.
    """
    for entry in cfg.DATASETS.get("REGISTER", ()):
        if not (
            isinstance(entry, tuple | list)
            and len(entry) == 3
            and all(isinstance(part, str) and part for part in entry)
        ):
            raise ConfigError(
                f"DATASETS.REGISTER holds {entry!r}; write each entry as "
                '("name", "annotations.json", "image folder")'
            )
        register_coco_instances(*entry)
