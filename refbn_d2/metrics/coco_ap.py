"""Compute COCO's average precision of boxes and masks in percent, as Detectron2's COCOEvaluator.

    AP    mean over the IoU thresholds .50, .55, ... .95 and the classes (AP50, AP75: one threshold)
    APs   objects under 32^2 pixels;  APm  32^2 to 96^2;  APl  above

A result is a dict in COCO's result format: {"image_id", "category_id" (the json's), "bbox" (XYWH),
"score", "segmentation" (RLE)}.
"""

import contextlib
import io
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pycocotools.mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from refbn_d2.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# metric: (IoU threshold or None for all, object size)
_METRICS = {
    "AP": (None, "all"),
    "AP50": (0.5, "all"),
    "AP75": (0.75, "all"),
    "APs": (None, "small"),
    "APm": (None, "medium"),
    "APl": (None, "large"),
}


def evaluate(
    json_file: str | os.PathLike,
    results: Sequence[Mapping],
    iou_types: Sequence[str] = ("bbox", "segm"),
    class_names: Sequence[str] | None = None,
    max_dets: int = 100,
    image_ids: Iterable[int] | None = None,
) -> dict[str, dict[str, float]]:
    """Return COCO's metrics in percent.

        {"bbox": {"AP": ..., "AP50", "AP75", "APs", "APm", "APl", "AP-<class>"}, "segm": {...}}

    A metric is nan if the set has no such objects. Without any results AP is 0, with a warning;
    Detectron2 returns nan.

    Args:
        json_file: the ground truth.
        results: COCO results of all images.
        iou_types: "bbox", "segm" or both.
        class_names: in the order of the json's category ids; with two or more, the AP of each class
            is added.
        max_dets: the number of detections that count per image and class.
        image_ids: the images to evaluate on; None: all.

    Raises:
        FileNotFoundError: the json file does not exist.
        DataError: the json has no annotations, or "segm" is requested and it has no masks.
        ValueError: a result is of an image or category that the json does not have, or misses a key
            that `iou_types` needs; the number of `class_names` is not the json's.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{json_file}: there is no such annotation file.")
    with stdout_to_log():
        truth = COCO(os.fspath(json_file))
    image_ids = sorted(truth.getImgIds() if image_ids is None else image_ids)
    check_results(json_file, truth, results, iou_types, class_names, image_ids)
    complete_truth(truth)
    if not results:
        logger.warning("There are no detections to evaluate on %s: AP is 0.", json_file)

    metrics: dict[str, dict[str, float]] = {}
    for iou_type in iou_types:
        with stdout_to_log():
            evaluator = COCOeval(truth, load_results(truth, results, iou_type), iou_type)
            evaluator.params.maxDets = [max_dets]
            evaluator.params.imgIds = image_ids
            evaluator.evaluate()
            evaluator.accumulate()
        precision = evaluator.eval["precision"][..., 0]  # IoU, recall, class, size
        sizes, thresholds = evaluator.params.areaRngLbl, evaluator.params.iouThrs
        metrics[iou_type] = {}
        for metric, (threshold, size) in _METRICS.items():
            chosen = slice(None) if threshold is None else np.isclose(thresholds, threshold)
            metrics[iou_type][metric] = _mean(precision[chosen][..., sizes.index(size)])
        if class_names is not None and len(class_names) > 1:
            for index, name in enumerate(class_names):
                metrics[iou_type][f"AP-{name}"] = _mean(precision[:, :, index, 0])
    return metrics


def _mean(precision: np.ndarray) -> float:
    """Return the mean in percent, without undefined values, which COCOeval marks by -1."""
    precision = precision[precision > -1]
    return 100 * float(precision.mean()) if precision.size else math.nan


@contextlib.contextmanager
def stdout_to_log():
    """Send what pycocotools prints to the log."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    logger.debug("%s", printed.getvalue().strip())


def check_results(
    json_file: str | os.PathLike,
    truth: COCO,
    results: Sequence[Mapping],
    iou_types: Sequence[str],
    class_names: Sequence[str] | None,
    image_ids: Sequence[int],
) -> None:
    """Check the arguments of `evaluate` against the ground truth `truth` of `json_file`.

    Raises:
        ValueError: see `evaluate`.
    """
    if unknown := set(iou_types) - {"bbox", "segm"}:
        raise ValueError(f'iou_types are "bbox" and "segm", not {", ".join(sorted(unknown))}.')
    if "annotations" not in truth.dataset:
        raise DataError(
            f"{json_file} has no annotations (a test set?): give a file with ground truth."
        )
    images, categories = set(truth.getImgIds()), set(truth.getCatIds())
    if absent := set(image_ids) - images:
        raise ValueError(f"{json_file} has no image {min(absent)}: remove it from image_ids.")
    if class_names is not None and len(class_names) != len(categories):
        raise ValueError(
            f"{len(class_names)} class names were given for the {len(categories)} categories of "
            f"{json_file}: give one for each."
        )
    keys = {"bbox": "bbox", "segm": "segmentation"}
    needed = ["score", *(keys[iou_type] for iou_type in iou_types)]
    for index, result in enumerate(results):
        if result["image_id"] not in images:
            raise ValueError(
                f"Result {index} is of image {result['image_id']}, which {json_file} does not have."
            )
        if result["category_id"] not in categories:
            raise ValueError(
                f"Result {index} is of category {result['category_id']}, which {json_file} does "
                f"not have; it has {sorted(categories)}."
            )
        for key in needed:
            if key not in result:
                raise ValueError(f'Result {index} has no "{key}", which {iou_types} need.')
    if "segm" in iou_types:
        for annotation in truth.dataset["annotations"]:
            if not annotation.get("segmentation"):
                raise DataError(
                    f"{json_file}: annotation {annotation['id']} has no segmentation; evaluate "
                    'only boxes (iou_types=("bbox",)), or complete the file.'
                )


def complete_truth(truth: COCO) -> None:
    """Fill in, in place, what is often missing in custom files and COCOeval needs.

    Areas and "iscrowd" are added. Objects are numbered from 1, because COCOeval takes an id of 0
    for no object, and two objects with one id for one object.
    """
    for number, annotation in enumerate(truth.dataset["annotations"], start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            if annotation.get("segmentation"):
                annotation["area"] = float(pycocotools.mask.area(truth.annToRLE(annotation)))
            else:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    with stdout_to_log():
        truth.createIndex()


def load_results(truth: COCO, results: Sequence[Mapping], iou_type: str) -> COCO:
    """Return the detections as a COCO set.

    Masks are loaded without their boxes: with boxes, the areas would be those of the boxes.
    """
    if not results:
        detections = COCO()
        detections.dataset = {**truth.dataset, "annotations": []}
        detections.createIndex()
        return detections
    geometry = "bbox" if iou_type == "bbox" else "segmentation"
    keys = ("image_id", "category_id", "score", geometry)
    return truth.loadRes([{key: result[key] for key in keys} for result in results])


def to_coco_results(
    image_id: int,
    prediction: Mapping[str, Tensor],
    contiguous_to_dataset_id: Mapping[int, int] | Sequence[int],
) -> list[dict]:
    """Return one image's detections as COCO results, ready for json.

    Args:
        prediction: "pred_boxes" (N, 4) XYXY, "scores" (N,), "pred_classes" (N,) from 0, and, if
            there are masks, "pred_masks" bool (N, H, W).
        contiguous_to_dataset_id: class index -> the json's category id.

    Raises:
        ConfigError: a predicted class has no category id.
    """
    boxes = prediction["pred_boxes"].detach().cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    try:
        categories = [contiguous_to_dataset_id[c] for c in prediction["pred_classes"].tolist()]
    except LookupError:
        raise ConfigError(
            f"Class {int(prediction['pred_classes'].max())} was predicted, but the dataset has "
            f"{len(contiguous_to_dataset_id)} classes: set MODEL.ROI_HEADS.NUM_CLASSES to that."
        ) from None
    results = [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        for category, box, score in zip(
            categories, boxes.tolist(), prediction["scores"].tolist(), strict=True
        )
    ]
    if "pred_masks" in prediction and results:
        masks = prediction["pred_masks"].cpu().numpy().view(np.uint8).transpose(1, 2, 0)
        for result, rle in zip(
            results, pycocotools.mask.encode(np.asfortranarray(masks)), strict=True
        ):
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("utf-8")}
    return results


def verify_results(
    expected: Sequence[Sequence], results: Mapping[str, Mapping[str, float]]
) -> bool:
    """Return whether the results match TEST.EXPECTED_RESULTS; log each.

    Args:
        expected: a list of [task, metric, value, tolerance], such as ["bbox", "AP", 38.5, 0.2].
        results: what `evaluate` returned.

    Raises:
        ConfigError: a task or a metric is not among the results.
    """
    passed = True
    for task, metric, value, tolerance in expected:
        for name, where in ((task, results), (metric, results.get(task, ()))):
            if name not in where:
                raise ConfigError(
                    f"TEST.EXPECTED_RESULTS: there is no {name!r} for [{task!r}, {metric!r}, ...] "
                    f"among the results, which have {', '.join(where) or 'nothing'}."
                )
        actual = results[task][metric]
        met = abs(actual - value) <= tolerance  # False for nan
        level, word = (logging.INFO, "as expected") if met else (logging.ERROR, "NOT as expected")
        logger.log(
            level, "%s/%s = %.3f, %s: %s +- %s", task, metric, actual, word, value, tolerance
        )
        passed &= met
    return passed


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table with a row per metric and a column per task; "-" is nan."""
    metrics = list(dict.fromkeys(metric for task in results.values() for metric in task))
    rows = [["", *results], ["---", *["---:"] * len(results)]]
    for metric in metrics:
        values = (task.get(metric, math.nan) for task in results.values())
        rows.append([metric, *("-" if math.isnan(v) else f"{v:.2f}" for v in values)])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
