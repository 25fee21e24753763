import json
import logging
import math

import numpy as np
import pycocotools.mask
import pytest
import torch

from refbn_d2.metrics.coco_ap import evaluate, format_table, to_coco_results, verify_results

MAIN = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
CATEGORY_IDS = [3, 17]  # as in COCO: not from 0, and with gaps
MAPPING = dict(enumerate(CATEGORY_IDS))


def box_polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(id, box, category=3, image=1, **more):
    return {
        "id": id,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": box_polygon(*box),
        **more,
    }


def write_json(path, annotations, images=(1, 2), size=400):
    data = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": size, "width": size} for i in images
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in CATEGORY_IDS],
        "annotations": annotations,
    }
    path.write_text(json.dumps(data))
    return path


def prediction(boxes, scores, classes, size=400):
    """Return a prediction with boxes XYWH in whole pixels; the masks are the boxes."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return {
        "pred_boxes": boxes,
        "scores": torch.tensor(scores),
        "pred_classes": torch.tensor(classes, dtype=torch.int64),
        "pred_masks": masks,
    }


@pytest.fixture
def hand_made(tmp_path):
    """Return two objects and three detections: a hit, a miss, and a hit at IoU 0.62."""
    annotations = [annotation(1, (10, 10, 100, 100)), annotation(2, (200, 10, 100, 100))]
    boxes = [[10, 10, 100, 100], [10, 250, 100, 100], [200, 10, 62, 100]]
    results = to_coco_results(1, prediction(boxes, [0.9, 0.8, 0.7], [0, 0, 0]), MAPPING)
    return write_json(tmp_path / "a.json", annotations), results


def test_a_case_by_hand(hand_made):
    json_file, results = hand_made
    # Up to recall 1/2 (51 of the 101 recall points) precision is 1; then, for the IoU thresholds
    # .50, .55 and .60 that the third detection passes, 2/3.
    both, first = (51 + 50 * 2 / 3) / 101 * 100, 51 / 101 * 100
    expected = {"AP": 0.3 * both + 0.7 * first, "AP50": both, "AP75": first}
    expected |= {"APs": math.nan, "APm": math.nan, "APl": expected["AP"]}
    metrics = evaluate(json_file, results)
    assert list(metrics) == ["bbox", "segm"]
    for task in metrics.values():
        assert list(task) == MAIN
        assert task == pytest.approx(expected, nan_ok=True)


def test_only_boxes(hand_made):
    json_file, results = hand_made
    for result in results:
        del result["segmentation"]
    assert list(evaluate(json_file, results, ["bbox"])) == ["bbox"]
    with pytest.raises(ValueError, match='Result 0 has no "segmentation"'):
        evaluate(json_file, results)


def test_ap_of_each_class(hand_made):
    json_file, results = hand_made
    metrics = evaluate(json_file, results, ["bbox"], class_names=["left", "right"])["bbox"]
    assert list(metrics) == [*MAIN, "AP-left", "AP-right"]
    assert metrics["AP-left"] == metrics["AP"] and math.isnan(metrics["AP-right"])
    with pytest.raises(ValueError, match="3 class names .* 2 categories of .*a.json"):
        evaluate(json_file, results, class_names=["a", "b", "c"])


def test_detections_beyond_the_limit_do_not_count(hand_made):
    json_file, results = hand_made
    metrics = evaluate(json_file, results, max_dets=1)["bbox"]
    assert metrics["AP"] == pytest.approx(51 / 101 * 100)


def test_some_of_the_images(tmp_path):
    annotations = [annotation(1, (10, 10, 20, 20)), annotation(2, (10, 10, 50, 50), image=2)]
    json_file = write_json(tmp_path / "a.json", annotations)
    results = to_coco_results(1, prediction([[10, 10, 20, 20]], [0.9], [0]), MAPPING)
    assert evaluate(json_file, results)["segm"]["AP"] == pytest.approx(51 / 101 * 100)
    assert evaluate(json_file, results, image_ids=[1])["segm"]["APs"] == pytest.approx(100)
    assert evaluate(json_file, results, image_ids=[2])["segm"]["AP"] == 0
    with pytest.raises(ValueError, match="has no image 7"):
        evaluate(json_file, results, image_ids=[1, 7])


def test_no_detections_are_an_ap_of_zero(tmp_path, caplog):
    json_file = write_json(tmp_path / "a.json", [annotation(1, (10, 10, 20, 20))])
    metrics = evaluate(json_file, [], class_names=["a", "b"])
    assert metrics["bbox"] == metrics["segm"]
    assert [metrics["bbox"][m] for m in ["AP", "AP50", "AP75", "APs", "AP-a"]] == [0] * 5
    assert all(math.isnan(metrics["bbox"][m]) for m in ["APm", "APl", "AP-b"])
    assert "There are no detections" in caplog.text


def test_what_is_missing_in_custom_files_is_filled_in(tmp_path, hand_made):
    json_file, results = hand_made
    data = json.loads(json_file.read_text())
    for i, a in enumerate(data["annotations"]):
        del a["area"], a["iscrowd"]
        a["id"] = i  # COCOeval takes id 0 for "no object"
    (tmp_path / "b.json").write_text(json.dumps(data))
    expected = evaluate(json_file, results)
    for task, metrics in evaluate(tmp_path / "b.json", results).items():
        assert metrics == pytest.approx(expected[task], nan_ok=True)


def test_nothing_is_printed(hand_made, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    evaluate(*hand_made)
    assert capfd.readouterr().out == ""
    assert "Evaluate annotation type *segm*" in caplog.text


def test_inputs_are_not_changed(hand_made):
    json_file, results = hand_made
    before = json.dumps(results)
    evaluate(json_file, results)
    assert json.dumps(results) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 9}, "Result 1 is of image 9, which .*a.json does not have"),
        ({"category_id": 0}, r"Result 1 is of category 0, .*a.json.* \[3, 17\]"),
    ],
)
def test_results_of_another_dataset_are_an_error(hand_made, change, message):
    json_file, results = hand_made
    results[1] |= change
    with pytest.raises(ValueError, match=message):
        evaluate(json_file, results)


def test_unusable_ground_truth_is_an_error_with_the_file(tmp_path, hand_made):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        evaluate(tmp_path / "nowhere.json", [])
    data = json.loads(hand_made[0].read_text())
    del data["annotations"][1]["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(data))
    evaluate(tmp_path / "boxes.json", hand_made[1], ["bbox"])
    with pytest.raises(ValueError, match="boxes.json: annotation 2 has no segmentation"):
        evaluate(tmp_path / "boxes.json", hand_made[1])
    del data["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="test.json has no annotations"):
        evaluate(tmp_path / "test.json", hand_made[1])
    with pytest.raises(ValueError, match='"bbox" and "segm", not keypoints'):
        evaluate(*hand_made, iou_types=["keypoints"])


# ---- results


def test_to_coco_results():
    torch.manual_seed(0)
    made = prediction(
        [[1, 2, 3, 4], [0, 0, 5, 5], [7, 7, 1, 2]], [0.5, 0.25, 1.0], [1, 0, 1], size=9
    )
    made["pred_masks"] = torch.rand(3, 9, 11) > 0.5
    results = json.loads(json.dumps(to_coco_results(42, made, CATEGORY_IDS)))
    assert [r["image_id"] for r in results] == [42] * 3
    assert [r["category_id"] for r in results] == [17, 3, 17]
    assert [r["bbox"] for r in results] == [[1, 2, 3, 4], [0, 0, 5, 5], [7, 7, 1, 2]]
    assert [r["score"] for r in results] == [0.5, 0.25, 1.0]
    masks = [pycocotools.mask.decode(r["segmentation"]) for r in results]
    np.testing.assert_array_equal(masks, made["pred_masks"].numpy())
    assert made["pred_boxes"][0].tolist() == [1, 2, 4, 6]

    del made["pred_masks"]
    assert "segmentation" not in to_coco_results(42, made, MAPPING)[0]
    assert to_coco_results(42, prediction([], [], []), MAPPING) == []


def test_a_class_that_is_not_in_the_dataset_is_an_error():
    with pytest.raises(ValueError, match="Class 2 was predicted.* 2 classes.*NUM_CLASSES"):
        to_coco_results(1, prediction([[0, 0, 1, 1]], [0.5], [2]), MAPPING)


# ---- expectations and tables

RESULTS = {"bbox": {"AP": 38.5, "APs": math.nan}, "segm": {"AP": 35.0}}


@pytest.mark.parametrize(
    "expected, passed",
    [
        ([], True),
        ([["bbox", "AP", 38.3, 0.25], ["segm", "AP", 35, 0]], True),
        ([["bbox", "AP", 38.3, 0.25], ["segm", "AP", 35.2, 0.1]], False),
        ([["bbox", "AP", 38.8, 0.25], ["segm", "AP", 35, 0]], False),
        ([["bbox", "APs", 20, 100]], False),
    ],
)
def test_verify_results(expected, passed, caplog):
    caplog.set_level(logging.INFO)
    assert verify_results(expected, RESULTS) is passed
    assert len(caplog.records) == len(expected)
    assert passed == all(record.levelname == "INFO" for record in caplog.records)


@pytest.mark.parametrize("task, metric", [("keypoints", "AP"), ("bbox", "AP99")])
def test_unknown_expectations_are_an_error(task, metric):
    unknown = "keypoints" if task == "keypoints" else "AP99"
    with pytest.raises(ValueError, match=f"no '{unknown}'.*which have (bbox, segm|AP, APs)"):
        verify_results([[task, metric, 1, 1]], RESULTS)


def test_format_table():
    assert format_table(RESULTS | {"segm": {"AP": 35.0, "AP-a long name": 101 / 3}}) == (
        "|                |  bbox |  segm |\n"
        "| ---            |  ---: |  ---: |\n"
        "| AP             | 38.50 | 35.00 |\n"
        "| APs            |     - |     - |\n"
        "| AP-a long name |     - | 33.67 |"
    )
    assert format_table({}).startswith("|")


# ---- Detectron2's


@pytest.fixture
def random_case(tmp_path):
    """Make a dozen images with objects of all sizes, some of them crowds, and detections."""
    rng = np.random.default_rng(0)
    annotations, predictions = [], {}
    for image in range(1, 13):
        boxes, classes = [], []
        for _ in range(rng.integers(0, 12)):
            w, h = np.exp(rng.uniform(2, 5.3, 2)).astype(int).tolist()
            x, y = (int(rng.integers(0, 400 - side)) for side in (w, h))
            crowd, category = int(rng.random() < 0.1), int(rng.integers(2))
            more = {"iscrowd": crowd, "category_id": CATEGORY_IDS[category]}
            box = (x, y, w, h)
            if crowd:
                polygon = pycocotools.mask.frPyObjects(box_polygon(*box), 400, 400)[0]
                counts = polygon["counts"].decode()
                more["segmentation"] = {"size": polygon["size"], "counts": counts}
            annotations.append(annotation(len(annotations) + 1, box, image=image, **more))
            for _ in range(rng.integers(0, 6)):
                near = [max(0, int(v + rng.normal(0, 0.04) * (w + h))) for v in (x, y)]
                boxes.append([*near, w, h])
                classes.append(category if rng.random() < 0.9 else 1 - category)
        scores = rng.random(len(boxes)).astype(np.float32).tolist()
        predictions[image] = prediction(boxes, scores, classes)
    return write_json(tmp_path / "random.json", annotations, range(1, 13)), predictions


@pytest.mark.detectron2
@pytest.mark.parametrize("max_dets, image_ids", [(100, None), (12, None), (100, [2, 3, 5, 7])])
def test_detectron2s_evaluator_says_the_same(random_case, max_dets, image_ids):
    pytest.importorskip("detectron2")
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    json_file, predictions = random_case
    name, class_names = "test_coco_ap", ["a", "b"]
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        thing_classes=class_names,
        thing_dataset_id_to_contiguous_id={c: i for i, c in MAPPING.items()},
    )
    evaluator = COCOEvaluator(
        name,
        distributed=False,
        use_fast_impl=False,
        max_dets_per_image=None if max_dets == 100 else max_dets,
    )
    evaluator.reset()
    results = []
    for image, made in predictions.items():
        instances = Instances((400, 400), **(made | {"pred_boxes": Boxes(made["pred_boxes"])}))
        evaluator.process([{"image_id": image}], [{"instances": instances}])
        results += to_coco_results(image, made, MAPPING)
    try:
        theirs = evaluator.evaluate(img_ids=image_ids)
    finally:
        MetadataCatalog.remove(name)
    ours = evaluate(
        json_file, results, class_names=class_names, max_dets=max_dets, image_ids=image_ids
    )
    assert 5 < ours["bbox"]["AP"] < 95
    for task in ("bbox", "segm"):
        assert ours[task] == pytest.approx(dict(theirs[task]), rel=1e-12, nan_ok=True)
