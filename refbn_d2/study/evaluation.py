"""Compute the metrics of a run from the files in its folder.

Metrics:

    metric                  detection           classification
    in-domain               bbox/AP             error
    one domain              bbox/AP@domain      error@domain
    corrupted pictures      bbox/AP~fog/3       error~fog/3
    over all corruptions    bbox/mPC, bbox/rPC  accuracy/mPC, accuracy/rPC
    steps to a loss         steps to total_loss 1

All values but steps and losses are in percent.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refbn_d2.data.coco import truth_file
from refbn_d2.metrics.bootstrap import Matches, match_images
from refbn_d2.metrics.statistics import mean_performance_under_corruption, steps_to
from refbn_d2.study.data import ClassificationSets, DetectionSets
from refbn_d2.study.plan import Job
from refbn_d2.study.spec import Evaluate, Study
from refbn_d2.utils.errors import DataError
from refbn_d2.utils.file_io import read_metrics, read_record

_IOU = {"AP": None, "AP50": 0.5, "AP75": 0.75}


class Measured(NamedTuple):
    value: float
    n: int  # number of pictures, or of steps of the run
    status: str = "done"


def evaluate_run(
    study: Study, sets: DetectionSets | ClassificationSets, job: Job
) -> dict[str, Measured]:
    """Return {metric: value} of a run that is done; a value that is not finite is "diverged".

    Raises:
        DataError, FileNotFoundError: the run's files are missing or broken.
    """
    curves = read_curves(job.folder / "metrics.json")
    if isinstance(sets, DetectionSets):
        measured = _detection(study.evaluate, sets, job)
    else:
        measured = _classification(study.evaluate, sets, job, curves)
    measured |= _steps(study.evaluate, curves)
    for name, (value, n, status) in measured.items():
        if status == "done" and not math.isfinite(value):
            measured[name] = Measured(math.nan, n, "diverged")
    return measured


def steps_names(evaluate: Evaluate) -> list[str]:
    """Return the names of the metrics of `evaluate.steps_to`."""
    return [
        _steps_name(c, target) for c, targets in evaluate.steps_to.items() for target in targets
    ]


def _steps_name(curve: str, target: float) -> str:
    return f"steps to {curve} {target:g}"


def _steps(evaluate: Evaluate, curves: dict) -> dict[str, Measured]:
    measured = {}
    for curve, targets in evaluate.steps_to.items():
        if curve not in curves:
            raise DataError(
                f"evaluate.steps_to: runs do not log {curve!r}; known: {', '.join(sorted(curves))}"
            )
        steps, values = curves[curve]
        below = "loss" in curve  # otherwise it is an AP or an accuracy
        for target in targets:
            reached = steps_to(steps, values, target, below=below)
            status = "not reached" if reached is None else "done"
            value = math.nan if reached is None else reached
            measured[_steps_name(curve, target)] = Measured(value, int(steps[-1]), status)
    return measured


def read_curves(metrics_json: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {name: (steps done, values)} of a metrics.json; the last line of a step counts."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for record in read_metrics(metrics_json):
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float) and "iteration" in record:
                points[name][record["iteration"] + 1] = value
    return {
        name: (np.array(sorted(p)), np.array([p[step] for step in sorted(p)], float))
        for name, p in points.items()
    }


# ---- detection


def _detection(evaluate: Evaluate, sets: DetectionSets, job: Job) -> dict[str, Measured]:
    domains = sets.domains()
    measured: dict[str, Measured] = {}
    for task, metrics in _by_task(evaluate).items():
        clean = clean_matches(sets, job, task)
        ids = clean.image_ids
        for metric in metrics:
            measured[f"{task}/{metric}"] = _ap(clean, ids, metric)
            for domain in sorted(set(domains.values()), key=str) if evaluate.domains else ():
                own = [i for i in ids if domains[i] == domain]
                measured[f"{task}/{metric}@{domain}"] = _ap(clean, own, metric)
        if sets.corrupted:
            measured |= _corrupted(sets, job, task, clean)
    return {name: m for name, m in measured.items() if math.isfinite(m.value)}


def _by_task(evaluate: Evaluate) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in evaluate.metrics:
        task, _, metric = name.partition("/")
        found.setdefault(task, []).append(metric)
    return found


def clean_matches(sets: DetectionSets, job: Job, task: str) -> Matches:
    """Return the matches of a run's detections on the whole test set."""
    results = _read(job.folder / "inference" / "coco_instances_results.json", list)
    truth = truth_file(job.folder, sets.test.name, sets.test.json_file)
    return match_images(truth, results, task, job.tags["max_dets"])


def _ap(matches: Matches, image_ids: list[int], metric: str) -> Measured:
    counts = np.isin(matches.image_ids, image_ids)
    return Measured(matches.ap(counts, _IOU[metric]), len(image_ids))


def _corrupted(sets: DetectionSets, job: Job, task: str, clean: Matches) -> dict[str, Measured]:
    """Return AP on each corrupted set, mPC, and rPC relative to the same pictures uncorrupted."""
    by_name: dict[str, dict[int, float]] = defaultdict(dict)
    measured, ids = {}, []
    for label, dataset in sets.corrupted.items():
        folder = job.folder / "corrupted" / "inference"
        folder = folder / dataset.name if len(sets.corrupted) > 1 else folder
        results = _read(folder / "coco_instances_results.json", list)
        truth = truth_file(job.folder / "corrupted", dataset.name, dataset.json_file)
        matches = match_images(truth, results, task, job.tags["max_dets"])
        name, severity = label.split("/")
        ids = matches.image_ids
        by_name[name][int(severity)] = matches.ap()
        measured[f"{task}/AP~{label}"] = Measured(by_name[name][int(severity)], len(ids))
    total = mean_performance_under_corruption(_ap(clean, ids, "AP").value, by_name)
    measured[f"{task}/mPC"] = Measured(total.mpc, len(ids))
    if total.rpc is not None:
        measured[f"{task}/rPC"] = Measured(total.rpc, len(ids))
    return measured


# ---- classification


def _classification(
    evaluate: Evaluate, sets: ClassificationSets, job: Job, curves: dict
) -> dict[str, Measured]:
    images = len(sets.test_images())
    values = {"error": 100 - curves["val/top1"][1][-1], "loss": curves["val/loss"][1][-1]}
    measured = {name: Measured(float(values[name]), images) for name in evaluate.metrics}
    if not (evaluate.domains or evaluate.corruptions):
        return measured
    others = _read(job.folder / "others" / "results.json", dict)
    by_name: dict[str, dict[int, float]] = defaultdict(dict)
    for label, found in others.items():
        n = found["images"]
        if label.startswith("@"):
            measured[f"error{label}"] = Measured(100 - found["top1"], n)
        elif label != "clean":
            name, severity = label.split("/")
            by_name[name][int(severity)] = found["top1"]
            measured[f"error~{label}"] = Measured(100 - found["top1"], n)
    if by_name:
        clean = others["clean"]
        total = mean_performance_under_corruption(clean["top1"], by_name)
        measured["accuracy/mPC"] = Measured(total.mpc, clean["images"])
        if total.rpc is not None:
            measured["accuracy/rPC"] = Measured(total.rpc, clean["images"])
    return measured


def _read(path: Path, kind: type) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is missing, although its run is done; delete the run's folder")
    return read_record(path, kind, "delete the run's folder")
