"""Read a COCO json whole, check it, and repair what can be understood.

    content     the json: {"images": [...], "categories": [...], "annotations": [...], ...}
    repaired    content in which nothing is broken; a correct file's objects are the file's own

A training and an evaluation see the same repaired content: nothing that was left out of the one
counts in the other. Fields that are not named here stay as they are.
"""

import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from refbn_d2.data.coco_annotations import Repairs, check_annotations
from refbn_d2.data.coco_values import number
from refbn_d2.utils.errors import DataError, listing

logger = logging.getLogger(__name__)

_MOST_PIXELS = 2**31  # of a picture: pycocotools counts them in 32 bits


@dataclass
class CocoFile:
    """A checked COCO json.

    `repairs`: what was repaired or left out -> ids of the annotations, or of the images.
    """

    name: str
    json_file: Path
    content: dict
    repairs: Repairs = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The file and the data set's name, for messages."""
        return f"{self.json_file} (dataset {self.name})"

    def class_names(self) -> list[str]:
        """Return the names by rising category id: class 0, 1, ..., K-1."""
        return [category["name"] for category in _sorted(self.content["categories"])]

    def id_map(self) -> dict[Hashable, int]:
        """Return category id -> class."""
        ordered = _sorted(self.content["categories"])
        return {category["id"]: i for i, category in enumerate(ordered)}

    def warn(self) -> None:
        """Say in one warning what was repaired, how often, and where."""
        if self.repairs:
            kinds = (
                f"{len(ids)} {'images' if kind.startswith(_OF_IMAGES) else 'annotations'} "
                f"{kind.removeprefix(_OF_IMAGES)} (ids {_shown(ids)})"
                for kind, ids in self.repairs.items()
            )
            logger.warning("%s: %s", self.where, "; ".join(kinds))


_OF_IMAGES = "images: "  # begins the kinds of repairs that are not of annotations
SIZE_AS_TEXT = _OF_IMAGES + "had their size as text; it is read as numbers"


def read_coco(
    json_file: str | os.PathLike, name: str, annotated: bool = True, masks: bool = False
) -> CocoFile:
    """Read, check and repair a file in COCO's instances format.

    Args:
        name: the data set's, for messages.
        annotated: False accepts a file without annotations.
        masks: each object needs a segmentation.

    Raises:
        FileNotFoundError: no such file.
        DataError: not JSON, not COCO's format, or a category, image or annotation that cannot be
            understood; names the file, the id and the value.
    """
    file = CocoFile(name, Path(json_file), read_json(json_file, name))
    repair(file, annotated, masks)
    return file


def repair(file: CocoFile, annotated: bool = True, masks: bool = False) -> None:
    """Check `file.content` and repair it in place; arguments and errors are `read_coco`'s."""
    where, content = file.where, file.content
    parts = ["images", "categories"] + ["annotations"] * annotated
    if not isinstance(content, dict) or any(
        not isinstance(content.get(part), list) for part in parts
    ):
        have = sorted(content) if isinstance(content, dict) else [type(content).__name__]
        lacks = [p for p in parts if not isinstance(content, dict) or p not in content] or parts
        raise DataError(
            f"{where} is not in COCO's instances format: it lacks the list {' and '.join(lacks)} "
            f"(it holds {_shown(have)})"
        )
    content["categories"] = _check_categories(content["categories"], where)
    repairs: Repairs = {}
    content["images"] = _check_images(content["images"], where, repairs)
    annotations = content.get("annotations")
    if annotations is not None and not isinstance(annotations, list):
        raise DataError(f"{where}: its annotations are {annotations!r:.80}, not a list")
    if annotations is not None:
        content["annotations"], found = check_annotations(
            annotations,
            {image["id"]: image for image in content["images"]},
            {category["id"] for category in content["categories"]},
            where,
            masks,
        )
        repairs |= found
    elif "annotations" in content:  # null
        del content["annotations"]
    file.repairs = repairs


def read_json(json_file: str | os.PathLike, name: str):
    """Return what a json file holds.

    Raises:
        FileNotFoundError: no such file.
        DataError: it cannot be read, or is not JSON.
    """
    try:
        with open(json_file, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"dataset {name}: {json_file} does not exist. Built-in datasets are looked for in the "
            "folder that the environment variable DETECTRON2_DATASETS names; register your own "
            "in DATASETS.REGISTER"
        ) from None
    except OSError as e:
        raise DataError(f"dataset {name}: {json_file} cannot be read: {e}") from e
    except (ValueError, RecursionError) as e:  # also UnicodeDecodeError
        raise DataError(f"dataset {name}: {json_file} is not JSON: {e}") from e


def read_class_names(json_file: str | os.PathLike, name: str) -> list[str]:
    """Return the class names of a file by rising category id, without a look at the rest of it.

    Raises:
        FileNotFoundError, DataError: as `read_coco`.
    """
    content = read_json(json_file, name)
    where = f"{json_file} (dataset {name})"
    categories = content.get("categories") if isinstance(content, dict) else None
    if not isinstance(categories, list):
        raise DataError(f"{where} is not in COCO's instances format: it lacks the list categories")
    return [c["name"] for c in _sorted(_check_categories(categories, where))]


def _check_categories(categories: list, where: str) -> list[dict]:
    names: dict[Hashable, str] = {}
    checked = []
    for place, category in enumerate(categories):
        if not isinstance(category, dict) or not {"id", "name"} <= category.keys():
            raise DataError(f"{where}: category number {place} lacks id or name")
        key, name = category["id"], category["name"]
        _check_id(key, f"{where}: category number {place} ({name!r:.80})")
        if isinstance(name, bool | list | dict) or name is None or not str(name).strip():
            raise DataError(f"{where}: category {key} has name {name!r:.80}; it should be a text")
        if key in names:
            raise DataError(f"{where}: category id {key} is given to {names[key]} and to {name}")
        names[key] = str(name)
        checked.append(category if isinstance(name, str) else {**category, "name": str(name)})
    if not names:
        raise DataError(f"{where}: its list of categories is empty")
    if equal := [name for name, times in Counter(names.values()).items() if times > 1]:
        ids = [key for key, name in names.items() if name == equal[0]]
        raise DataError(
            f"{where}: categories {' and '.join(map(str, ids))} are all called {equal[0]!r}. "
            "Classes are matched by name: give each a name of its own, or make them one category"
        )
    _check_sortable(names, where)
    return checked


def _check_images(images: list, where: str, repairs: Repairs) -> list[dict]:
    found: dict[Hashable, dict] = {}
    for place, image in enumerate(images):
        try:
            key, name = image["id"], image["file_name"]
            height, width = image["height"], image["width"]
        except (TypeError, KeyError) as e:
            raise DataError(
                f"{where}: image number {place} is broken ({type(e).__name__}: {e}); each needs "
                "id, file_name, height and width"
            ) from None
        what = f"{where}: image {key!r:.80} ({name!r:.200})"
        _check_id(key, f"{where}: image number {place} ({name!r:.200})")
        if isinstance(name, bool | list | dict) or name is None or not str(name).strip():
            raise DataError(f"{what} has file_name {name!r:.80}; it should be a path")
        try:
            sides = [number(side) for side in (height, width)]
        except ValueError:
            sides = [0, 0]
        if min(sides) < 1 or any(side % 1 for side in sides) or math.prod(sides) > _MOST_PIXELS:
            raise DataError(
                f"{where}: image {key} ({name}) has height {height!r:.80} and width {width!r:.80}; "
                f"both are whole pixels, 1 or more, together at most {_MOST_PIXELS}"
            )
        if key in found:
            raise DataError(
                f"{where}: image id {key} is given to {found[key]['file_name']} and to {name}"
            )
        if str in (type(height), type(width)):
            repairs.setdefault(SIZE_AS_TEXT, []).append(key)
        if type(height) is not int or type(width) is not int or type(name) is not str:
            h, w = map(int, sides)
            image = {**image, "file_name": str(name), "height": h, "width": w}
        found[key] = image
    if not found:
        raise DataError(f"{where}: its list of images is empty")
    _check_sortable(found, where)
    return list(found.values())


def _check_id(key, what: str) -> None:
    is_text = isinstance(key, str) and key.strip()
    is_number = isinstance(key, int | float) and not isinstance(key, bool) and abs(key) < 2**53
    if not (is_text or is_number):
        raise DataError(f"{what} has id {key!r:.80}; allowed: a number below 2^53, or a text")


def _check_sortable(ids: Iterable[Hashable], where: str) -> None:
    try:
        sorted(ids)  # type: ignore[type-var]
    except TypeError:
        raise DataError(f"{where}: some ids are numbers and some are words") from None


def _sorted(items: Sequence[dict]) -> list[dict]:
    return sorted(items, key=lambda item: item["id"])


def match_classes(file: CocoFile, class_names: Sequence[str]) -> bool:
    """Give a test set the classes of the training set, by their names; return if that changed it.

    Its categories become 1..K in the order of `class_names`, unless they are that already but for
    their numbers. A class that the test set lacks has no objects there: it is not scored.

    Raises:
        DataError: objects of the test set are of a class that is not trained.
    """
    own = file.class_names()
    if own == list(class_names):
        return False
    known = {name: i for i, name in enumerate(class_names, start=1)}
    names = {c["id"]: c["name"] for c in file.content["categories"]}
    annotations = file.content.get("annotations", [])
    used = {names[annotation["category_id"]] for annotation in annotations}
    if unknown := [name for name in own if name not in known and name in used]:
        raise DataError(
            f"{file.where} has objects of {listing(map(repr, unknown), 5)}, which the training "
            f"data does not have. It has {listing(map(repr, class_names), 10)}. Classes are "
            "matched by name: rename these categories, or remove them with their annotations"
        )
    if missing := [name for name in class_names if name not in used]:
        logger.warning(
            "%s: no objects of %s; these classes are not scored.",
            file.where,
            listing(map(repr, missing), 5),
        )
    logger.warning(
        "%s: its categories are matched by name with the training data's; detections and truth "
        "are written with the ids 1 to %d, in the training data's order.",
        file.where,
        len(class_names),
    )
    file.content = {
        **file.content,
        "categories": [{"id": i, "name": name} for name, i in known.items()],
    }
    if "annotations" in file.content:
        file.content["annotations"] = [
            {**annotation, "category_id": known[names[annotation["category_id"]]]}
            for annotation in annotations
        ]
    return True


def check_pictures(paths: Sequence[str], where: str) -> None:
    """Check that all pictures exist, by a look into each folder instead of one at each file.

    Raises:
        FileNotFoundError: a folder or pictures are missing; counts and names them.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if "://" not in path:  # of Detectron2's PathManager
            by_folder[os.path.dirname(path)].append(path)
    missing = []
    for folder, files in by_folder.items():
        try:
            there = set(os.listdir(folder or "."))
        except (OSError, ValueError):  # ValueError: a null byte
            there = set()
        doubtful = (path for path in files if os.path.basename(path) not in there)
        missing += [path for path in doubtful if not _exists(path)]
    if not missing:
        return
    folder = os.path.dirname(missing[0])
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{where}: its image folder {folder} does not exist, and {len(missing)} of "
            f"{len(paths)} pictures are missing. Correct the dataset's image folder"
        )
    raise FileNotFoundError(
        f"{where}: {len(missing)} of {len(paths)} pictures do not exist: {listing(missing, 3)}. "
        "Add them, remove them from the file, or correct the dataset's image folder"
    )


def _exists(path: str) -> bool:  # also where upper and lower case are one
    try:
        return os.path.exists(path)
    except ValueError:  # a null byte
        return False


@contextmanager
def silenced() -> Iterator[None]:
    """Hold back the package's warnings, where another process reads the same files and warns."""
    package = logging.getLogger(__name__.split(".")[0])
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def truth_file(output_dir: str | os.PathLike, name: str, json_file: Path) -> Path:
    """Return the file that a run's detections of a test set are to be compared with.

    It is the repaired file in the run's folder if there is one, else the data set's own.
    """
    repaired = repaired_file(output_dir, name)
    return repaired if repaired.is_file() else json_file


def repaired_file(output_dir: str | os.PathLike, name: str) -> Path:
    """Return where a run keeps the repaired file of the data set `name`."""
    return Path(output_dir) / "annotations" / f"{name.replace(os.sep, '_')}.json"


def _shown(items: Sequence, most: int = 5) -> str:
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")
