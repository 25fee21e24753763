"""Test by a paired bootstrap whether the choice of test images explains a difference of AP.

    matches = match_images(json_file, results, "segm")
    matches.ap(counts)              AP of a test set that contains image i counts[i] times
    paired_bootstrap(a.ap, b.ap, len(matches.image_ids))

Every image is matched once, by COCOeval. A resample only reweights the matches. The test says
nothing about the variance over training seeds. To compare two norms, let the two functions return
the mean over seeds.

    N       images      D   detections of a class      T   IoU thresholds (10)
    counts  (N,) how often each image is drawn; the sum is N in a resample
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from refbn_d2.metrics.coco_ap import check_results, complete_truth, load_results, stdout_to_log
from refbn_d2.utils.errors import DataError


class _Class(NamedTuple):
    image: np.ndarray  # (D,) index of the detection's image; detections by descending score
    hit: np.ndarray  # (T, D) bool: matched to an object
    miss: np.ndarray  # (T, D) bool: matched to nothing; an ignored detection is neither
    objects: np.ndarray  # (N,) number of objects in each image


class Matches(NamedTuple):
    """The matches of one model's detections with the objects, for the AP of any set of images."""

    image_ids: list[int]  # index in `counts` -> the json's image id
    classes: list[_Class]
    thresholds: np.ndarray  # (T,) IoU
    recalls: np.ndarray  # (101,) where the precision is read

    def ap(self, counts: np.ndarray | None = None, iou: float | None = None) -> float:
        """Return AP in percent, over objects of all sizes; nan if the images have no objects.

        It equals COCOeval's AP on a dataset that contains image i counts[i] times. Only the order
        of detections of one image with equal scores may differ.

        Args:
            counts: (N,) how often each image counts; None: once.
            iou: one of the thresholds, .50, .55, ... .95; None: the mean over all.

        Raises:
            DataError: `iou` is not one of the thresholds.
        """
        counts = np.ones(len(self.image_ids)) if counts is None else np.asarray(counts, float)
        chosen: slice | np.ndarray = slice(None)
        if iou is not None:
            equal = np.isclose(self.thresholds, iou)
            if not equal.any():
                known = self.thresholds.round(2).tolist()
                raise DataError(f"IoU threshold {iou} is not among {known}")
            chosen = equal
        precisions = [self._precision(c, counts, chosen) for c in self.classes]
        defined = [p for p in precisions if p is not None]
        return 100 * float(np.mean(defined)) if defined else float("nan")

    def _precision(self, c: _Class, counts: np.ndarray, chosen) -> np.ndarray | None:
        """Return one class's precision (T, 101) at each recall; None without objects."""
        objects = counts @ c.objects
        if objects == 0:
            return None
        weight = counts[c.image]
        hits = np.cumsum(c.hit[chosen] * weight, axis=1)
        misses = np.cumsum(c.miss[chosen] * weight, axis=1)
        precision = hits / np.maximum(hits + misses, np.spacing(1))
        # The highest precision at this recall or a higher one; 0 above the highest recall.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))
        places = [np.searchsorted(row, self.recalls) for row in hits / objects]
        return np.take_along_axis(precision, np.array(places), axis=1)


class BootstrapDifference(NamedTuple):
    """A difference a - b over resamples of N images."""

    difference: float  # on the original images
    interval: tuple[float, float]  # percentiles of the resamples
    p_value: float  # two-sided: twice the share of resamples on the rarer side of 0
    n_images: int
    n_resamples: int  # only those in which a and b are defined


def match_images(
    json_file: str | os.PathLike,
    results: Sequence[Mapping],
    iou_type: str = "bbox",
    max_dets: int = 100,
    image_ids: Iterable[int] | None = None,
) -> Matches:
    """Match the detections of one model with the objects of a json file, image by image.

    Arguments and errors are those of `coco_ap.evaluate`, with one `iou_type`, "bbox" or "segm".
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{json_file}: there is no such annotation file.")
    with stdout_to_log():
        truth = COCO(os.fspath(json_file))
    image_ids = sorted(set(truth.getImgIds() if image_ids is None else image_ids))
    check_results(json_file, truth, results, [iou_type], None, image_ids)
    complete_truth(truth)
    with stdout_to_log():
        evaluator = COCOeval(truth, load_results(truth, results, iou_type), iou_type)
        evaluator.params.maxDets = [max_dets]
        evaluator.params.imgIds = image_ids
        evaluator.params.areaRng = evaluator.params.areaRng[:1]  # all sizes
        evaluator.params.areaRngLbl = evaluator.params.areaRngLbl[:1]
        evaluator.evaluate()
    n = len(image_ids)  # evalImgs has all images of a class, then those of the next
    per_class = (evaluator.evalImgs[i : i + n] for i in range(0, len(evaluator.evalImgs), n))
    thresholds = evaluator.params.iouThrs
    classes = [_class(images, len(thresholds)) for images in per_class]
    return Matches(image_ids, classes, thresholds, evaluator.params.recThrs)


def _class(images: Sequence[Mapping | None], n_thresholds: int) -> _Class:
    """Return one class's matches; None stands for an image without detections and objects."""
    objects = np.zeros(len(images))
    index, scores = [np.zeros(0, int)], [np.zeros(0)]
    matched, ignored = [np.zeros((n_thresholds, 0), bool)], [np.zeros((n_thresholds, 0), bool)]
    for i, image in enumerate(images):
        if image is not None:
            objects[i] = np.count_nonzero(np.asarray(image["gtIgnore"]) == 0)
            index.append(np.full(len(image["dtScores"]), i))
            scores.append(np.asarray(image["dtScores"], float))
            matched.append(np.asarray(image["dtMatches"]).astype(bool))
            ignored.append(np.asarray(image["dtIgnore"]).astype(bool))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit, out = (np.concatenate(parts, axis=1)[:, order] for parts in (matched, ignored))
    return _Class(np.concatenate(index)[order], hit & ~out, ~hit & ~out, objects)


def paired_bootstrap(
    a: Callable[[np.ndarray], float],
    b: Callable[[np.ndarray], float],
    n_images: int,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapDifference:
    """Compare two metrics on the same resamples of the test images, drawn with replacement.

    Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 13 and 16.

    Args:
        a, b: functions of counts (N,), how often each image is drawn, that return the metric.
        n_images: N, at least 2.
        n_resamples: the number of resamples, each of N images; at least 1.
        seed: the seed of the draws.
        confidence: the confidence of the interval.

    Raises:
        DataError: there are fewer than 2 images or no resamples, or the difference is not defined
            (no objects).
    """
    if n_images < 2 or n_resamples < 1:
        raise DataError(
            f"{n_images} images, {n_resamples} resamples: a bootstrap needs 2 images and 1 "
            "resample, or more"
        )
    ones = np.ones(n_images, int)
    difference = a(ones) - b(ones)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(n_images, ones / n_images, size=n_resamples)
    resampled = np.array([a(counts) - b(counts) for counts in draws])
    resampled = resampled[np.isfinite(resampled)]
    if not np.isfinite(difference) or not len(resampled):
        raise DataError(
            "the difference is not defined: a or b is not finite; give images with objects"
        )
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    rarer = min((resampled <= 0).sum(), (resampled >= 0).sum())
    # One is added to both counts: no finite number of resamples gives a p-value of 0.
    p_value = min(1.0, 2 * (rarer + 1) / (len(resampled) + 1))
    return BootstrapDifference(
        float(difference), (float(low), float(high)), float(p_value), n_images, len(resampled)
    )
