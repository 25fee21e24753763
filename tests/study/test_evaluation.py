"""The metrics of a run's files, against coco_ap and by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from refbn_d2.metrics import coco_ap
from refbn_d2.study.bootstrap import bootstrap
from refbn_d2.study.evaluation import evaluate_run, read_curves
from refbn_d2.study.plan import Plan
from refbn_d2.study.results import Row, read_csv, write_csv
from refbn_d2.study.runner import Record
from refbn_d2.study.spec import Evaluate, load_study
from refbn_d2.study.tables import shown, table_of
from refbn_d2.utils.errors import DataError


def detections(json_file, jitter, seed=0):
    """Return noisy copies of the objects, with some missing."""
    rng = np.random.default_rng(seed)
    found = []
    for annotation in json.loads(json_file.read_text())["annotations"]:
        x, y, w, h = annotation["bbox"]
        box = [x + jitter * rng.normal(), y + jitter * rng.normal(), w, h]
        if rng.random() > 0.1:
            found.append({"image_id": annotation["image_id"], "category_id": 1,
                          "bbox": box, "score": float(rng.random())})  # fmt: skip
    return found


def leave(job, sets, jitter, seed=0):
    """Write the files of a run into its folder."""
    lines = [{"iteration": 19 + 20 * i, "total_loss": 3 - i, "time": 0.5} for i in range(3)]
    folder = job.folder
    (folder / "inference").mkdir(parents=True)
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    results = detections(sets.test.json_file, jitter, seed)
    (folder / "inference/coco_instances_results.json").write_text(json.dumps(results))
    for number, dataset in enumerate(sets.corrupted.values()):
        where = folder / "corrupted" / "inference" / dataset.name
        where.mkdir(parents=True)
        found = detections(dataset.json_file, jitter + number, seed)
        (where / "coco_instances_results.json").write_text(json.dumps(found))
    Record(job).write(status="done")


@pytest.fixture
def plan(coco, content, written, tmp_path):
    content["evaluate"] = {
        "metrics": ["bbox/AP", "bbox/AP50"],
        "domains": True,
        "corruptions": {"names": ["fog", "contrast"], "severities": [1, 3], "images": 4},
        "steps_to": {"total_loss": [2.0, 0.5]},
    }
    plan = Plan(load_study(written(content)), tmp_path / "out", "torchvision")
    plan.make_data(plan.runs)
    return plan


def test_detection(plan, coco):
    job, sets = plan.runs[0], plan.sets
    leave(job, sets, 1.5)
    measured = evaluate_run(plan.study, sets, job)

    def ap(json_file, results, metric="AP", image_ids=None):
        found = json.loads(results.read_text())
        return coco_ap.evaluate(json_file, found, ("bbox",), None, 100, image_ids)["bbox"][metric]

    own = job.folder / "inference/coco_instances_results.json"
    day = [i for i in range(10, 18) if i % 4 in (2, 3)]  # 10, 11, 14, 15
    assert measured["bbox/AP"] == (pytest.approx(ap(coco / "val.json", own)), 8, "done")
    assert measured["bbox/AP50"].value == pytest.approx(ap(coco / "val.json", own, "AP50"))
    assert 20 < measured["bbox/AP"].value < measured["bbox/AP50"].value
    expected = ap(coco / "val.json", own, image_ids=day)
    assert measured["bbox/AP@day"] == (pytest.approx(expected), 4, "done")
    assert measured["bbox/AP@night"].value != pytest.approx(expected)
    corrupted = {
        label: ap(d.json_file, job.folder / "corrupted/inference" / d.name / own.name)
        for label, d in sets.corrupted.items()
    }
    for label, value in corrupted.items():
        assert measured[f"bbox/AP~{label}"] == (pytest.approx(value), 4, "done")
    mpc = np.mean(list(corrupted.values()))
    assert measured["bbox/mPC"].value == pytest.approx(mpc)
    some = json.loads(sets.corrupted["fog/1"].json_file.read_text())["images"]
    clean = ap(coco / "val.json", own, image_ids=[image["id"] for image in some])
    assert measured["bbox/rPC"].value == pytest.approx(100 * mpc / clean)
    assert measured["steps to total_loss 2"] == (40, 60, "done")
    reached = measured["steps to total_loss 0.5"]
    assert math.isnan(reached.value) and reached.status == "not reached"


def test_bootstrap(plan):
    for job in plan.runs:
        leave(job, plan.sets, 4.0 if job.norm == "BN" else 0.5, job.seed)
    (found,) = bootstrap(plan, 50)
    assert (found["norm"], found["condition"], found["metric"]) == ("GN", "two iid", "bbox/AP")
    assert found["seeds"] == 2 and found["n_images"] == 8
    means = {
        norm: np.mean(
            [evaluate_run(plan.study, plan.sets, j)["bbox/AP"].value
             for j in plan.runs if j.norm == norm]
        )
        for norm in ("BN", "GN")
    }  # fmt: skip
    assert found["difference"] == pytest.approx(means["GN"] - means["BN"])
    low, high = found["interval"]
    assert 0 < low < found["difference"] < high and found["p_value"] == found["p_holm"] < 0.1


def test_bootstrap_corrects_for_the_norms_of_a_condition(coco, content, written, tmp_path):
    content |= {"conditions": {"a": {}, "b": {}, "c": {}}, "evaluate": {"metrics": ["bbox/AP"]}}
    plan = Plan(load_study(written(content)), tmp_path / "out", "torchvision")
    for job in plan.runs:
        leave(job, plan.sets, 4.0 if job.norm == "BN" else 0.5, job.seed)
    Record(plan.runs[-1]).write(recipe={"code": "of before"})  # its results are not used
    found = bootstrap(plan, 50)
    assert [(one["condition"], one["seeds"]) for one in found] == [("a", 2), ("b", 2), ("c", 1)]
    assert found[0]["p_holm"] == found[0]["p_value"] == pytest.approx(2 / 51)  # the smallest


@pytest.mark.parametrize("loss", ["NaN", "Infinity"])
def test_a_classifier_with_a_loss_that_is_not_finite(tmp_path, loss):
    line = f'{{"iteration": 9, "val/top1": 40.0, "val/loss": {loss}, "total_loss": 1.0}}'
    (tmp_path / "metrics.json").write_text(line)
    study = SimpleNamespace(evaluate=Evaluate(("error", "loss"), False, (), (), 0, {}))
    sets = SimpleNamespace(test_images=lambda: [None] * 8)
    measured = evaluate_run(study, sets, SimpleNamespace(folder=tmp_path))
    assert measured["error"] == (60.0, 8, "done")
    assert math.isnan(measured["loss"].value) and measured["loss"][1:] == (8, "diverged")
    rows = [
        Row("s", "BN", 1, "c", name, m.value, m.n, m.status, "") for name, m in measured.items()
    ]
    assert shown(table_of(rows, "loss", "BN").cells["BN", "c"]) == "1 diverged"
    assert shown(table_of(rows, "error", "BN").cells["BN", "c"]) == "60.0 (n 1)"
    write_csv(rows, tmp_path / "r.csv")
    assert [row.status for row in read_csv(tmp_path / "r.csv")] == ["done", "diverged"]


def test_what_is_missing_is_named(plan):
    job = plan.runs[0]
    leave(job, plan.sets, 1.0)
    (job.folder / "inference/coco_instances_results.json").unlink()
    with pytest.raises(DataError, match="coco_instances_results.json is missing"):
        evaluate_run(plan.study, plan.sets, job)


def test_curves_of_a_resumed_run(tmp_path):
    lines = ['{"iteration": 9, "a": 1.0}', '{"iteration": 19, "a": 5.0}',
             '{"iteration": 19, "a": 2.0}', '{"iteration": 19, "bbox/AP": 30}']  # fmt: skip
    (tmp_path / "m.json").write_text("\n".join(lines))
    steps, values = read_curves(tmp_path / "m.json")["a"]
    assert steps.tolist() == [10, 20] and values.tolist() == [1.0, 2.0]
