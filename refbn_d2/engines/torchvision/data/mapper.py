"""Turn a dataset dict into a sample: read, augment, annotate."""

import numpy as np
import torch

from refbn_d2.data.images import read_image
from refbn_d2.data.masks import decode_mask, rasterize
from refbn_d2.engines.torchvision.data.transforms import (
    Resize,
    Transform,
    build_augmentations,
    check_choice,
)
from refbn_d2.utils.errors import DataError


class Mapper:
    """Read, augment and annotate the image of one dataset dict, as Detectron2's mapper does.

    Crowds are dropped in training. Masks have the format of INPUT.MASK_FORMAT, except that run
    lengths always become bitmasks.
    """

    def __init__(self, cfg, is_train: bool):
        self.is_train = is_train
        self.format = cfg.INPUT.FORMAT
        self.mask_format = cfg.INPUT.MASK_FORMAT
        self.with_masks = cfg.MODEL.MASK_ON
        # a crop may cut an object so that its box is no longer tight: its mask gives the new box
        self.boxes_from_masks = cfg.INPUT.CROP.ENABLED and cfg.MODEL.MASK_ON
        check_choice("INPUT.FORMAT", self.format, ("BGR", "RGB"))
        check_choice("INPUT.MASK_FORMAT", self.mask_format, ("polygon", "bitmask"))
        self.augmentations = build_augmentations(cfg, is_train)

    def __call__(self, dataset_dict: dict, rng: np.random.Generator | None = None) -> dict:
        """Return the sample of `dataset_dict`, which is not changed; `rng` is for training.

        In a test, "height", "width" and "annotations" may be missing: the size is the picture's.

        Raises:
            FileNotFoundError: the image is missing; the message names the file.
            DataError: the image is broken or of another size, or a mask is missing or broken; the
                message names the file or the image.
        """
        picture = read_image(dataset_dict["file_name"], "RGB", dataset_dict["image_id"])
        height, width = picture.shape[:2]
        dataset_dict = {"height": height, "width": width, **dataset_dict}
        _check_size(dataset_dict, picture)
        transforms = self.draw(rng, *picture.shape[:2])
        for transform in transforms:
            picture = transform.picture(picture)
        channels = picture.transpose(2, 0, 1)
        if self.format == "BGR":
            channels = channels[::-1]
        sample = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        sample["image"] = torch.from_numpy(np.array(channels, order="C"))
        if self.is_train:
            sample.update(self._ground_truth(dataset_dict, transforms, picture.shape[:2]))
        return sample

    def draw(self, rng, h: int, w: int) -> list[Transform]:
        """Return the transforms that `rng` draws for an image of size (h, w)."""
        transforms = []
        for augmentation in self.augmentations:
            transform = augmentation(rng, h, w)
            if transform is not None:
                transforms.append(transform)
                h, w = _shape_after(transform)
        return transforms

    def _ground_truth(self, dataset_dict: dict, transforms: list, shape: tuple[int, int]) -> dict:
        anns = [ann for ann in dataset_dict["annotations"] if not ann.get("iscrowd")]
        boxes = _transform_boxes([ann["bbox"] for ann in anns], transforms, shape)
        truth = {"gt_classes": torch.tensor([a["category_id"] for a in anns], dtype=torch.int64)}
        masks = [self._mask(dataset_dict, ann, transforms, shape) for ann in anns]
        if self.boxes_from_masks:
            boxes = np.array([_box_of_mask(mask) for mask in masks], np.float32).reshape(-1, 4)
        truth["gt_boxes"] = torch.from_numpy(boxes)
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = (sides > 1e-5).all(axis=1)
        if self.with_masks:
            keep &= np.array([_has_pixels(mask) for mask in masks], dtype=bool)
        truth = {key: value[torch.from_numpy(keep)] for key, value in truth.items()}
        if self.with_masks:
            truth["gt_masks"] = [mask for mask, kept in zip(masks, keep, strict=True) if kept]
        return truth

    def _mask(self, dataset_dict: dict, ann: dict, transforms: list, shape: tuple[int, int]):
        """Return the transformed mask as polygons or bool (H, W); None if MODEL.MASK_ON is off."""
        if not self.with_masks:
            return None
        segmentation = ann.get("segmentation")
        what = f"annotation {ann['id']} of image {dataset_dict['image_id']}"
        if segmentation is None:
            raise DataError(
                f"MODEL.MASK_ON = True, and {what} has no segmentation: add it to the dataset, or "
                "set MODEL.MASK_ON to False"
            )
        if isinstance(segmentation, dict):
            try:
                mask = decode_mask(
                    segmentation["counts"], dataset_dict["height"], dataset_dict["width"]
                )
            except ValueError as e:
                raise DataError(f"{what} ({dataset_dict['file_name']}): {e}") from e
            for transform in transforms:
                mask = transform.mask(mask)
            return np.array(mask, dtype=bool, order="C")
        polygons = [np.asarray(p, dtype=np.float64).reshape(-1, 2) for p in segmentation]
        for transform in transforms:
            polygons = [transform.polygon(points) for points in polygons]
            polygons = [points for points in polygons if len(points)]
        polygons = [points.reshape(-1) for points in polygons]
        return polygons if self.mask_format == "polygon" else rasterize(polygons, *shape)


def _shape_after(transform: Transform) -> tuple[int, int]:
    if isinstance(transform, Resize):
        return transform.new_h, transform.new_w
    return transform.h, transform.w


def _check_size(dataset_dict: dict, picture: np.ndarray) -> None:
    height, width = picture.shape[:2]
    if (height, width) != (dataset_dict["height"], dataset_dict["width"]):
        turned = (width, height) == (dataset_dict["height"], dataset_dict["width"])
        raise DataError(
            f"image {dataset_dict['file_name']} (image id {dataset_dict['image_id']}) is "
            f"{width} x {height} pixels (width x height), and its dataset says "
            f"{dataset_dict['width']} x {dataset_dict['height']}: correct the one that is wrong"
            + (" (was it annotated before its EXIF orientation was applied?)" if turned else "")
        )


def _transform_boxes(boxes: list, transforms: list, shape: tuple[int, int]) -> np.ndarray:
    """(x, y, w, h) boxes -> (N, 4) float32 (x0, y0, x1, y1), transformed and clipped to `shape`.

    As in Detectron2, corners are computed in float32 and transformed in float64.
    """
    corners = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    points = corners.astype(np.float64).reshape(-1, 2)
    for transform in transforms:
        points = transform.points(points)
    pairs = points.reshape(-1, 2, 2)
    corners = np.concatenate([pairs.min(axis=1), pairs.max(axis=1)], axis=1)
    h, w = shape
    return np.minimum(np.maximum(corners, 0), [w, h, w, h]).astype(np.float32)


def _has_pixels(mask) -> bool:
    return bool(mask.any()) if isinstance(mask, np.ndarray) else len(mask) > 0


def _box_of_mask(mask) -> tuple[float, float, float, float]:
    """Return the tight box of polygons or a bool (H, W); all zeros if the mask is empty."""
    if not _has_pixels(mask):
        return 0, 0, 0, 0
    if isinstance(mask, np.ndarray):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    points = np.concatenate(mask).reshape(-1, 2)
    return *points.min(axis=0), *points.max(axis=0)
