"""Turn a COCO json into batches, as Detectron2's loaders do; resumable, with clear errors.

Shapes and names:
    H, W            image height and width in pixels, N instances of an image
    box             (x, y, width, height) in dataset dicts, (x0, y0, x1, y1) in samples, pixels
    polygon         [x0, y0, x1, y1, ...]; points is the same as (P, 2)
    dataset dict    {"file_name", "image_id", "height", "width", "annotations": [{"id", "bbox",
                    "category_id" (0..K-1), "iscrowd", "segmentation" (if the file has it)}]}
    sample          {"file_name", "image_id", "height", "width" (as stored), "image" (3, H, W) uint8
                    in INPUT.FORMAT, and in training "gt_boxes" (N, 4) float32, "gt_classes" (N,)
                    int64, "gt_masks" list of N: float64 polygons or bool (H, W), if MASK_ON}
    index           position of a dataset dict in its list
    draw            number of samples drawn before this one in the run

Nothing here keeps random state. (seed, epoch) determines the order of images, and (seed, draw) the
augmentation of one. So a run that resumes at step k continues as if it had never stopped, with any
number of workers and processes.
"""

from refbn_d2.engines.torchvision.data.datasets import (
    LoadedDataset,
    check_datasets,
    load_coco_json,
    load_test_dicts,
    load_train_dicts,
    train_class_names,
)
from refbn_d2.engines.torchvision.data.loaders import (
    build_test_loader,
    build_train_loader,
    has_objects,
)
from refbn_d2.engines.torchvision.data.mapper import Mapper
from refbn_d2.engines.torchvision.data.transforms import build_augmentations

__all__ = [
    "LoadedDataset",
    "Mapper",
    "build_augmentations",
    "build_test_loader",
    "build_train_loader",
    "check_datasets",
    "has_objects",
    "load_coco_json",
    "load_test_dicts",
    "load_train_dicts",
    "train_class_names",
]
