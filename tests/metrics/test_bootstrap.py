"""AP of a resample against COCOeval on a dataset with copies of the drawn images."""

import copy
import json
import math

import numpy as np
import pycocotools.mask
import pytest

from refbn_d2.metrics.bootstrap import match_images, paired_bootstrap
from refbn_d2.metrics.coco_ap import evaluate
from refbn_d2.utils.errors import DataError

CATEGORIES = [2, 5, 9]
IMAGES = list(range(10, 22))


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture(scope="module")
def dataset():
    """Return random objects and detections: with crowds, misses, empty images and classes."""
    rng = np.random.default_rng(3)
    annotations, results = [], []
    for image in IMAGES[:-1]:  # the last image is empty
        for category in CATEGORIES:
            for _ in range(rng.integers(0, 4) if category != 9 or image == 12 else 0):
                box = rng.integers([0, 0, 10, 10], [200, 200, 90, 90]).tolist()
                about = {"image_id": image, "category_id": category}
                crowd = int(rng.random() < 0.1)
                area = box[2] * box[3]
                annotations.append(
                    {"id": len(annotations) + 1, **about, "bbox": box, "area": area,
                     "iscrowd": crowd, "segmentation": polygon(*box)}
                )  # fmt: skip
                if rng.random() < 0.75:
                    near = [float(v) for v in np.array(box) + rng.integers(-6, 7, 4)]
                    results.append({**about, "bbox": near})
            for _ in range(rng.integers(0, 3)):
                box = rng.integers([0, 0, 10, 10], [200, 200, 90, 90]).astype(float).tolist()
                results.append({"image_id": image, "category_id": category, "bbox": box})
    for result, score in zip(results, rng.permutation(len(results)), strict=True):
        result["score"] = (score + 1) / 500  # no two are equal
        height_width = [300, 300]
        mask = np.zeros(height_width, np.uint8, order="F")
        x, y, w, h = (int(v) for v in result["bbox"])
        mask[max(y, 0) : y + h, max(x, 0) : x + w] = 1
        rle = pycocotools.mask.encode(mask)
        result["segmentation"] = {"size": height_width, "counts": rle["counts"].decode()}
    return annotations, results


def write(path, annotations, images):
    data = {
        "images": [{"id": i, "height": 300, "width": 300, "file_name": f"{i}.png"} for i in images],
        "categories": [{"id": c, "name": str(c)} for c in CATEGORIES],
        "annotations": annotations,
    }
    path.write_text(json.dumps(data))
    return path


def resampled(path, dataset, counts):
    """Return json and results that contain image i counts[i] times, with new ids."""
    copies = [i for i, count in zip(IMAGES, counts, strict=True) for _ in range(count)]
    chosen = ([], [])
    for new, image in enumerate(copies, start=1):
        for target, entries in zip(chosen, dataset, strict=True):
            for entry in entries:
                if entry["image_id"] == image:
                    target.append({**copy.deepcopy(entry), "image_id": new})
    return write(path, chosen[0], range(1, len(copies) + 1)), chosen[1]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_a_resample_is_what_cocoeval_says(tmp_path, dataset, iou_type):
    annotations, results = dataset
    matches = match_images(write(tmp_path / "a.json", annotations, IMAGES), results, iou_type)
    assert matches.image_ids == IMAGES
    rng = np.random.default_rng(0)
    draws = [np.ones(len(IMAGES), int), *rng.multinomial(12, np.ones(12) / 12, size=6)]
    seen = set()
    for counts in draws:
        truth, detections = resampled(tmp_path / "b.json", dataset, counts)
        expected = evaluate(truth, detections, [iou_type])[iou_type]
        assert matches.ap(counts) == pytest.approx(expected["AP"], abs=1e-9)
        assert matches.ap(counts, iou=0.5) == pytest.approx(expected["AP50"], abs=1e-9)
        assert matches.ap(counts, iou=0.75) == pytest.approx(expected["AP75"], abs=1e-9)
        seen.add(round(expected["AP"], 3))
    assert len(seen) == len(draws) and min(seen) > 5  # the draws differ, and AP is not 0
    assert matches.ap() == matches.ap(draws[0])


def test_arguments_of_evaluate(tmp_path, dataset):
    annotations, results = dataset
    path = write(tmp_path / "a.json", annotations, IMAGES)
    some = IMAGES[2:9]
    expected = evaluate(path, results, ["bbox"], max_dets=2, image_ids=some)["bbox"]["AP"]
    matches = match_images(path, results, max_dets=2, image_ids=some[::-1])
    assert matches.image_ids == some
    assert matches.ap() == pytest.approx(expected, abs=1e-9)
    assert matches.ap() != pytest.approx(match_images(path, results, image_ids=some).ap(), abs=0.1)
    with pytest.raises(FileNotFoundError, match="no.json"):
        match_images(tmp_path / "no.json", results)
    with pytest.raises(DataError, match=r"0.52 is not among \[0.5, 0.55"):
        matches.ap(iou=0.52)
    with pytest.raises(ValueError, match="which .*a.json does not have"):
        match_images(path, [{**results[0], "image_id": 1}])


def test_without_detections_or_objects(tmp_path, dataset):
    path = write(tmp_path / "a.json", dataset[0], IMAGES)
    assert match_images(path, []).ap() == 0
    matches = match_images(path, dataset[1])
    nothing = np.eye(len(IMAGES))[-1]
    assert math.isnan(matches.ap(nothing))


def test_paired_bootstrap_of_a_mean_agrees_with_theory():
    """The mean of n values with deviation s: the resamples spread by s / sqrt(n)."""
    rng = np.random.default_rng(1)
    shared = 10 * rng.normal(size=400)
    left = shared + rng.normal(0.2, 1, 400)
    result = paired_bootstrap(
        lambda counts: counts @ left / 400, lambda counts: counts @ shared / 400, 400, 4000
    )
    differences = left - shared
    half = 1.96 * differences.std() / 20
    assert result.difference == pytest.approx(differences.mean())
    low, high = result.interval
    expected = (differences.mean() - half, differences.mean() + half)
    assert (low, high) == pytest.approx(expected, abs=0.01)
    z = abs(differences.mean()) / (differences.std() / 20)
    assert result.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01, rel=0.3)
    assert 0.001 < result.p_value < 0.05
    assert (result.n_images, result.n_resamples) == (400, 4000)


def test_paired_bootstrap_by_its_bounds():
    def zero(counts):
        return 0.0

    def one(counts):
        return 1.0

    same = paired_bootstrap(one, one, 5, 99)
    assert same[:3] == (0, (0, 0), 1)
    sure = paired_bootstrap(one, zero, 5, 99)
    assert sure[:3] == (1, (1, 1), pytest.approx(0.02))  # 2 (0 + 1) / (99 + 1)
    assert paired_bootstrap(zero, one, 5, 99).p_value == sure.p_value

    def first(counts):  # defined only if the first image is drawn
        return float(counts[0]) if counts[0] else math.nan

    partly = paired_bootstrap(first, zero, 5, 500)
    assert 300 < partly.n_resamples < 370  # 1 - 0.8^5 = 0.67
    again = paired_bootstrap(first, zero, 5, 500)
    assert partly == again != paired_bootstrap(first, zero, 5, 500, seed=1)
    with pytest.raises(DataError, match="1 images"):
        paired_bootstrap(one, zero, 1)
    with pytest.raises(DataError, match="not defined"):
        paired_bootstrap(lambda counts: math.nan, zero, 5)


def test_paired_bootstrap_of_ap(tmp_path, dataset):
    """Compare a model with itself with boxes that are too large: it is worse, significantly."""
    annotations, results = dataset
    path = write(tmp_path / "a.json", annotations, IMAGES)
    worse = [{**r, "bbox": [*r["bbox"][:2], *(1.3 * v for v in r["bbox"][2:])]} for r in results]
    a, b = match_images(path, results), match_images(path, worse)
    result = paired_bootstrap(a.ap, b.ap, len(IMAGES), 200)
    assert result.difference == pytest.approx(a.ap() - b.ap())
    assert result.interval[0] < result.difference < result.interval[1]
    assert result.interval[0] > 0 and result.p_value < 0.05
