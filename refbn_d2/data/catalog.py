"""Datasets by name: Detectron2's names and paths for COCO, one's own, and the synthetic shapes.

Paths lie under the folder named by the environment's DETECTRON2_DATASETS ("./datasets" by default),
read when a name is asked for. See `refbn_d2.data.shapes` for the set behind `shapes_*`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from refbn_d2.data import shapes
from refbn_d2.utils.errors import ConfigError

# name -> (image root, json), both under the datasets' root
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
    for split in shapes.SPLITS
    for part in (split, *(f"{split}_{domain}" for domain in shapes.DOMAINS))
}
_BUILTIN = _COCO | _SHAPES
SHAPES = tuple(_SHAPES)  # names of the synthetic sets, made where they are first used


@dataclass(frozen=True)
class Dataset:
    """A COCO-format dataset: images named in `json_file` lie under `image_root`."""

    name: str
    json_file: Path
    image_root: Path


_registered: dict[str, Dataset] = {}


def _builtin(name: str) -> Dataset:
    image_root, json_file = _BUILTIN[name]
    root = shapes.datasets_root()
    return Dataset(name, root / json_file, root / image_root)


def names() -> list[str]:
    """All names `get` knows, sorted."""
    return sorted(_BUILTIN | _registered)


def find(name: str) -> Dataset:
    """Where the dataset called `name` lies. Whether its files exist is for its reader to find out.

    Raises:
        ConfigError: no dataset has this name.
    """
    if name in _registered:
        return _registered[name]
    if name not in _BUILTIN:
        raise ConfigError(
            f"no dataset is called {name!r}. Register it, by DATASETS.REGISTER (({name!r}, json, "
            f"image_root),) in the config or register_coco_instances. Known: {', '.join(names())}"
        )
    return _builtin(name)


def get(name: str) -> Dataset:
    """As `find`; a `shapes_*` set is made on first use.

    Raises:
        ConfigError: no dataset has this name.
        FileExistsError: something else lies where a `shapes_*` set belongs.
    """
    dataset = find(name)
    if name in SHAPES and name not in _registered:
        shapes.ensure_detection(shapes.datasets_root())
    return dataset


def register_coco_instances(
    name: str, json_file: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """Gives a name to one's own COCO-format data. The same again changes nothing.

    Args:
        name: to be used in DATASETS.TRAIN and DATASETS.TEST.
        json_file: its annotations.
        image_root: the folder that the json's file names start from.

    Raises:
        ConfigError: the name is empty, or belongs to other files.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a dataset's name must be a non-empty string, not {name!r}")
    dataset = Dataset(name, Path(json_file), Path(image_root))
    known = _registered.get(name) or (_builtin(name) if name in _BUILTIN else dataset)
    if known != dataset:
        raise ConfigError(
            f"dataset {name!r} is already {known.json_file} with images in {known.image_root}; "
            f"give {dataset.json_file} with images in {dataset.image_root} another name"
        )
    if name not in _BUILTIN:
        _registered[name] = dataset


def register_from_config(cfg) -> None:
    """Registers the datasets of DATASETS.REGISTER: ((name, json file, image folder), ...).

    Raises:
        ConfigError: an entry has another form, or its name is taken by other data.
    """
    for entry in cfg.DATASETS.get("REGISTER", ()):
        if not (
            isinstance(entry, tuple | list)
            and len(entry) == 3
            and all(isinstance(part, str) and part for part in entry)
        ):
            raise ConfigError(
                f"DATASETS.REGISTER holds {entry!r}; each entry is "
                '("name", "annotations.json", "image folder")'
            )
        register_coco_instances(*entry)
