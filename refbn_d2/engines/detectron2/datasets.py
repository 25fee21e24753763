"""Check and repair the COCO files that Detectron2 is about to read.

Detectron2's catalogs have a loader and the metadata of each data set. A file that is right stays
Detectron2's to read. Of one that needs repairs, the repaired copy in the run's folder is read
instead, for training and evaluation.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

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
from refbn_d2.data.coco_annotations import AREA, FLAT, STRAY
from refbn_d2.utils.errors import ConfigError, DataError, listing
from refbn_d2.utils.file_io import write_text

logger = logging.getLogger(__name__)

# Loaders of these modules do nothing but load_coco_json; a user's own may do anything.
_PLAIN = ("detectron2.data.datasets.coco", "refbn_d2.plugin.registration")
# Detectron2 trains as it should in spite of these; COCO's own training set has some of them.
_HARMLESS_IN_TRAINING = {AREA, FLAT, STRAY}


def check_datasets(train: Sequence[str], test: Sequence[str], masks: bool = False) -> None:
    """Read all files and forget them: their errors come out before workers are started.

    Args:
        train: names of the training sets; () in an evaluation.
        test: names of the test sets.
        masks: each object needs a segmentation.

    Raises:
        ConfigError: no data set has this name.
        FileNotFoundError: a file, a folder or pictures are missing.
        DataError: a file cannot be understood, or the classes of two sets do not go together.
    """
    with silenced():  # worker 0 says it
        for _ in _changed(train, test, train, masks):
            pass


@contextmanager
def repaired_datasets(
    train: Sequence[str],
    test: Sequence[str],
    output_dir: str,
    trained: Sequence[str] = (),
    masks: bool = False,
) -> Iterator[None]:
    """Let Detectron2's catalogs name repaired copies in `output_dir` where files need repairs.

    Arguments and errors are those of `check_datasets`. `trained`: what names the classes in an
    evaluation, where `train` is ().
    """
    undo = []
    stale = {repaired_file(output_dir, name) for name in (*train, *test)}  # of an earlier run
    try:
        for file in _changed(train, test, trained or train, masks):
            path = repaired_file(output_dir, file.name)
            write_text(path, json.dumps(file.content))
            stale.discard(path)
            undo.append(_redirect(file.name, path))
        for path in stale:
            path.unlink(missing_ok=True)
        yield
    finally:
        for restore in undo:
            restore()


def _changed(
    train: Sequence[str], test: Sequence[str], trained: Sequence[str], masks: bool
) -> Iterator[CocoFile]:
    """Yield the files that Detectron2 must not read as they are."""
    for key, names in (("TRAIN", train), ("TEST", test)):
        for name in names:
            _check_name(name, key)
    first = None
    for name in filter(_is_plain, train):
        file = _read(name, masks)
        if first is not None and file.class_names() != first[1]:
            raise DataError(
                f"DATASETS.TRAIN joins {first[0]} and {name}, whose classes differ: "
                f"{listing(first[1], 5)} and {listing(file.class_names(), 5)}. Joined datasets "
                "need the same class names in the same order of category ids"
            )
        first = first or (name, file.class_names())
        if file.repairs.keys() - _HARMLESS_IN_TRAINING and name not in test:
            yield file
    class_names = first[1] if first else _class_names(trained) if test else None
    for name in filter(_is_plain, test):
        file = _read(name, masks, annotated=False)
        matched = class_names is not None and match_classes(file, class_names)
        if matched or file.repairs:
            yield file


def _check_name(name: str, key: str) -> None:
    if name not in DatasetCatalog.list():
        known = [n for n in DatasetCatalog.list() if n.split("_")[0] == name.split("_")[0]]
        raise ConfigError(
            f"DATASETS.{key}: no data set is called {name!r}. Register it, by DATASETS.REGISTER "
            f"(({name!r}, json, image_root),) in the config or register_coco_instances. "
            f"Known: {listing(sorted(known or DatasetCatalog.list()), 20)}"
        )


def _is_plain(name: str) -> bool:
    metadata = MetadataCatalog.get(name)
    is_coco = metadata.get("evaluator_type") == "coco" and metadata.get("json_file")
    return bool(is_coco) and DatasetCatalog[name].__module__ in _PLAIN


def _json_file(name: str) -> str:
    if name in catalog.SHAPES:
        catalog.get(name)  # made on first use
    json_file = MetadataCatalog.get(name).json_file
    try:
        return PathManager.get_local_path(json_file)
    except OSError as error:
        raise FileNotFoundError(f"dataset {name}: {json_file} does not exist: {error}") from error


def _read(name: str, masks: bool, annotated: bool = True) -> CocoFile:
    file = read_coco(_json_file(name), name, annotated, masks)
    file.warn()
    if annotated and not file.content["annotations"]:
        raise DataError(f"{file.where}: no usable annotation")
    root = MetadataCatalog.get(name).get("image_root", "")
    paths = [os.path.join(root, image["file_name"]) for image in file.content["images"]]
    check_pictures(paths, file.where)
    return file


def _class_names(trained: Sequence[str]) -> list[str] | None:
    """Return the class names of the training set, None if its file is not on this machine."""
    for name in trained[:1]:
        try:
            _check_name(name, "TRAIN")
            if _is_plain(name):
                return read_class_names(_json_file(name), name)
        except (ConfigError, FileNotFoundError) as error:
            logger.info("Classes are not matched by name with DATASETS.TRAIN: %s", error)
    return None


def _redirect(name: str, json_file: Path):
    """Let the catalogs name `json_file`; return what undoes it."""
    loader, metadata = DatasetCatalog[name], MetadataCatalog.get(name).as_dict()
    root = metadata.get("image_root", "")
    of_classes = ("thing_classes", "thing_dataset_id_to_contiguous_id")  # set by load_coco_json
    kept = {key: value for key, value in metadata.items() if key not in of_classes}
    kept |= {"json_file": str(json_file), "source_json_file": metadata["json_file"]}
    _register(name, lambda: load_coco_json(str(json_file), root, name), kept)
    return lambda: _register(name, loader, metadata)


def _register(name: str, loader, metadata: dict) -> None:
    DatasetCatalog.pop(name)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(**{k: v for k, v in metadata.items() if k != "name"})
