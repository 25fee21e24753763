"""Check the annotations of a COCO json, and repair what can be understood.

    box         [x, y, width, height] in pixels
    polygon     [x0, y0, x1, y1, ...]: 3 points or more
    runs        {"size": [height, width], "counts": str or list}: a mask as COCO's run lengths

A correct annotation is passed on as the very object that was read. A repaired one is a copy, which
keeps the fields that are not named here.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import pycocotools.mask as mask_util

from refbn_d2.data.coco_values import clip_box, flag, known_id, number
from refbn_d2.data.masks import run_lengths
from refbn_d2.utils.errors import DataError, listing

Repairs = dict[str, list]  # what was repaired -> ids of the annotations

FLAT = "have a box without width or height; they are left out"
STRAY = "belong to no image of the file; they are left out"
POINTLESS = "have no polygon of 3 points or more; they are left out"
CLIPPED = "reach more than a pixel out of their image; their boxes are clipped"
TEXT = "had numbers as text or whole numbers in another form; they are read as numbers"
CROWD = 'had no usable "iscrowd"; 0 is taken'
AREA = 'had no usable "area"; it is computed'
BOX = "had no bbox; it is computed from the segmentation"
NESTED = "had polygons nested too deep or not deep enough; they are put right"
SHORT = "had polygons of fewer than 3 points beside good ones; those polygons are removed"
NO_MASK = "had a null or empty segmentation; they are read as without one"
CROWD_MASK = "are crowds without a segmentation; their boxes are taken for it"
RENUMBERED = "had no usable id, or 0, which COCO's evaluation cannot count; they get new ids"

_FLAT_SIDE = 1e-5  # pixels: Detectron2 does not train on boxes that are as thin
_MISSING = object()


def check_annotations(
    annotations: list,
    images: Mapping[Hashable, Mapping],
    category_ids: Collection[Hashable],
    where: str,
    masks: bool = False,
) -> tuple[list[dict], Repairs]:
    """Return the annotations that can be used, and what was repaired.

    Args:
        images: id -> {"file_name", "height", "width"}, all checked.
        where: the file, for messages.
        masks: each object needs a segmentation.

    Raises:
        DataError: an annotation cannot be understood, or an id is used more than once; names the
            file, the annotation's id, the image and the value.
    """
    kept: list[dict] = []
    repairs: Repairs = defaultdict(list)
    unnumbered = []
    for place, ann in enumerate(annotations):
        if not _is_correct(ann, images, category_ids, masks):
            ann = _Repair(place, ann, images, category_ids, where, masks, repairs).run()
            if ann is None:
                continue
            if ann["id"] is None:
                unnumbered.append((ann, annotations[place].get("id")))
        kept.append(ann)
    _check_unique([ann["id"] for ann in kept if ann["id"] is not None], where)
    next_id = max((ann["id"] for ann in kept if ann["id"] is not None), default=0) + 1
    for new_id, (ann, old_id) in enumerate(unnumbered, start=next_id):
        ann["id"] = new_id
        repairs[RENUMBERED].append(repr(old_id))
    return kept, dict(repairs)


def _check_unique(ids: list, where: str) -> None:
    # Detectron2 knows that the minival files of COCO 2014 repeat some ids.
    if len(set(ids)) == len(ids) or "minival" in where:
        return
    repeated = [key for key, times in Counter(ids).items() if times > 1]
    raise DataError(
        f"{where}: {len(repeated)} annotation ids are used more than once: "
        f"{listing(map(repr, repeated), 5)}. Give each annotation an id of its own"
    )


def _is_correct(ann, images: Mapping, category_ids: Collection, masks: bool) -> bool:
    """Return whether nothing needs a second look. COCO has a million annotations: be quick."""
    try:
        image = images[ann["image_id"]]
        width, height = image["width"], image["height"]
        x, y, w, h = ann["bbox"]
        crowd, segmentation = ann["iscrowd"], ann.get("segmentation", _MISSING)
        if not (
            type(ann["id"]) is int
            and ann["id"] > 0
            and ann["category_id"] in category_ids
            and type(crowd) is int
            and 0 <= crowd <= 1
            and -1 <= x < width
            and -1 <= y < height
            and _FLAT_SIDE < w <= width + 1 - x
            and _FLAT_SIDE < h <= height + 1 - y
            and x + w > 0
            and y + h > 0
            and 0 <= ann["area"] < math.inf
            and not ann.get("ignore")
        ):
            return False
        if type(segmentation) is list:
            for p in segmentation:
                if len(p) < 6 or len(p) % 2 or not math.isfinite(sum(p)):
                    return False
                if min(p) < -max(width, height) or max(p) > 2 * max(width, height):
                    return False
            return bool(segmentation)
        return segmentation is _MISSING and not masks
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return False


class _Repair:
    """One annotation that needs a second look."""

    def __init__(self, place, ann, images, category_ids, where, masks, repairs) -> None:
        self.place, self.ann, self.masks, self.repairs = place, ann, masks, repairs
        self.images, self.category_ids = images, category_ids
        self.what = f"{where}: annotation number {place}"
        self.file = where
        self.noted: set[str] = set()

    def run(self) -> dict | None:
        """Return the repaired annotation, None if it is to be left out; an id of None is open.

        Raises:
            DataError: it cannot be understood.
        """
        ann = self.ann
        if not isinstance(ann, dict):
            self._fail("is {}; it should be an object with image_id, category_id and bbox", ann)
        key = self._key()
        self.name = ann["id"] if isinstance(ann.get("id"), int | str) else f"number {self.place}"
        self.what = f"{self.file}: annotation {self.name}"
        if not {"image_id", "category_id"} <= ann.keys():
            missing = next(k for k in ("image_id", "category_id") if k not in ann)
            self._fail(f"(number {self.place}) has no {missing}; each needs image_id, category_id")
        image_id = self._image_id()
        if image_id is None:
            self._leave_out(STRAY)
            return None
        self.image = self.images[image_id]
        self.what += f" of image {image_id} ({self.image['file_name']})"
        category_id = known_id(ann["category_id"], self.category_ids)
        if category_id is None:
            self._fail("has category_id {}, which the file's categories do not list",
                       ann["category_id"])  # fmt: skip
        fixed = {**ann, "id": key, "image_id": image_id, "category_id": category_id}
        for field in ("image_id", "category_id"):
            if type(fixed[field]) is not type(ann[field]):
                self._note(TEXT)
        self._check_ignore(fixed)
        fixed["iscrowd"] = self._crowd()
        segmentation = self._segmentation()
        if segmentation == []:
            self._leave_out(POINTLESS)
            return None
        fixed.pop("segmentation", None)
        if segmentation is not None:
            fixed["segmentation"] = segmentation
        box = self._box(segmentation)
        if box is None:
            self._leave_out(FLAT)
            return None
        fixed["bbox"] = box
        if self.masks and segmentation is None:
            fixed["segmentation"] = self._mask_of_crowd(fixed)
        fixed["area"] = self._area(fixed)
        for kind in sorted(self.noted):
            self.repairs[kind].append(self.name)
        return fixed

    def _leave_out(self, why: str) -> None:
        self.repairs[why].append(self.name)

    def _note(self, kind: str) -> None:
        self.noted.add(kind)

    def _fail(self, problem: str, value=_MISSING) -> None:
        shown = "" if value is _MISSING else repr(value)
        shown = shown if len(shown) < 120 else f"{shown[:120]}..."
        raise DataError(f"{self.what} {problem.replace('{}', shown)}")

    def _key(self) -> int | None:
        """Return the id that COCO's evaluation can count: a whole number above 0."""
        key = self.ann.get("id")
        try:
            value = number(key)
        except ValueError:
            return None
        if value != int(value) or not 0 < value < 2**53:
            return None
        if type(key) is not int:
            self._note(TEXT)
        return int(value)

    def _image_id(self):
        image_id = self.ann["image_id"]
        if image_id is None or isinstance(image_id, bool | list | dict):
            self._fail(
                f"(number {self.place}) has image_id {{}}; it should be an image's id", image_id
            )
        return known_id(image_id, self.images)

    def _check_ignore(self, fixed: dict) -> None:
        if "ignore" not in fixed:
            return
        try:
            ignored = fixed["ignore"] is not None and flag(fixed["ignore"])
        except ValueError:
            ignored = True
        if ignored:
            self._fail(
                'has "ignore" = {}; remove the annotation, or set "iscrowd"', fixed["ignore"]
            )
        fixed["ignore"] = 0

    def _crowd(self) -> int:
        value = self.ann.get("iscrowd")
        if value is None or value == "":
            self._note(CROWD)
            return 0
        try:
            crowd = flag(value)
        except ValueError:
            self._fail('has "iscrowd" = {}; allowed: 0 or 1', value)
        if type(value) is not int:
            self._note(TEXT)
        return crowd

    def _segmentation(self) -> list | dict | None:
        """Return polygons or runs; None if there are none, [] if no polygon is good."""
        value = self.ann.get("segmentation", _MISSING)
        if value is _MISSING:
            return None
        if value is None or value == [] or value == {} or value == "":
            if value != []:  # as it is in many files of boxes
                self._note(NO_MASK)
            return None
        if isinstance(value, dict):
            return self._runs(value)
        try:
            polygons = self._polygons(value)
        except (TypeError, ValueError, OverflowError):
            self._fail(
                "has the segmentation {}, which is neither a list of polygons [[x0, y0, x1, y1, "
                "...], ...] of finite numbers nor run lengths", value,
            )  # fmt: skip
        good = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
        if good and len(good) < len(polygons):
            self._note(SHORT)
        far = 2 * max(self.image["height"], self.image["width"])
        if any(min(p) < -far / 2 or max(p) > far for p in good):
            self._fail(
                "has a polygon far outside its picture of "
                f"{self.image['width']} x {self.image['height']} pixels (width x height): {{}}",
                value,
            )
        return good

    def _polygons(self, value) -> list[list[float]]:
        if not isinstance(value, list):
            raise TypeError
        if value and not any(isinstance(part, list) for part in value):
            self._note(NESTED)
            value = [value]
        elif len(value) > 2 and all(isinstance(part, list) and len(part) == 2 for part in value):
            value = [value]  # the points of one polygon
        polygons = []
        for part in value:
            if not isinstance(part, list):
                raise TypeError
            if not part or not isinstance(part[0], list):
                polygons.append(part)
                continue
            self._note(NESTED)
            if all(isinstance(point, list) and len(point) == 2 for point in part):
                polygons.append([coordinate for point in part for coordinate in point])
            else:
                polygons.extend(part)
        return [self._numbers(polygon) for polygon in polygons]

    def _numbers(self, values: Sequence) -> list[float]:
        if not isinstance(values, list):
            raise TypeError
        if any(isinstance(value, str) for value in values):
            self._note(TEXT)
        return [number(value) for value in values]

    def _runs(self, runs: dict) -> dict:
        size: Any = runs.get("size")
        counts: Any = runs.get("counts")
        expected = [self.image["height"], self.image["width"]]
        if size != expected or not isinstance(counts, str | list):
            self._fail(
                f"has a segmentation by run lengths with size {size!r} and counts of type "
                f"{type(counts).__name__}; it should have [height, width] of its image, "
                f"{expected}, and counts"
            )
        if isinstance(counts, str):
            try:
                run_lengths(counts.encode(), math.prod(expected))
            except ValueError as error:
                self._fail(f"has a broken segmentation: {error}")
        elif not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != math.prod(size):
            self._fail(f"has run lengths that do not add up to its {math.prod(size)} pixels")
        return runs

    def _box(self, segmentation: list | dict | None) -> list | None:
        """Return the box, None if it is flat; clipped if it reaches more than a pixel out."""
        value = self.ann.get("bbox")
        if value is None or value == [] or value == "":
            if segmentation is None:
                self._fail("has bbox {} and no segmentation to compute it from", value)
            self._note(BOX)
            if isinstance(segmentation, list):
                xs = [x for polygon in segmentation for x in polygon[0::2]]
                ys = [y for polygon in segmentation for y in polygon[1::2]]
                value = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            else:
                assert segmentation is not None  # `_fail` has raised
                value = mask_util.toBbox(self._encoded(segmentation)).tolist()
        try:
            box = self._numbers(value)
            x, y, w, h = box
            fits = w >= 0 and h >= 0
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            self._fail(
                "has bbox {}; it should be [x, y, width, height]: 4 finite numbers, width and "
                "height not negative", value,
            )  # fmt: skip
        if min(w, h) <= _FLAT_SIDE:
            return None
        width, height = self.image["width"], self.image["height"]
        right, bottom = x + w, y + h
        if x >= width or y >= height or right <= 0 or bottom <= 0:
            self._fail(
                "has bbox {} (x, y, width, height), wholly outside its picture of "
                f"{width} x {height} pixels (width x height)", value,
            )  # fmt: skip
        if max(-x, -y, right - width, bottom - height) <= 1:
            return box
        self._note(CLIPPED)
        return clip_box(box, width, height)

    def _encoded(self, segmentation: list | dict) -> dict:
        height, width = self.image["height"], self.image["width"]
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
            return segmentation
        runs = mask_util.frPyObjects(segmentation, height, width)
        return runs if isinstance(runs, dict) else mask_util.merge(runs)

    def _mask_of_crowd(self, fixed: dict) -> list:
        if not fixed["iscrowd"]:
            self._fail("has no segmentation. Add masks, or set MODEL.MASK_ON False")
        self._note(CROWD_MASK)
        x, y, w, h = fixed["bbox"]
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]

    def _area(self, fixed: dict) -> float:
        value = fixed.get("area")
        try:
            area = number(value)
            if area >= 0:
                if type(value) is str:
                    self._note(TEXT)
                return area
        except (ValueError, OverflowError):
            pass
        self._note(AREA)
        if "segmentation" in fixed:
            return float(mask_util.area(self._encoded(fixed["segmentation"])))
        return fixed["bbox"][2] * fixed["bbox"][3]
