"""Compute the paired bootstrap over the test pictures of a detection study."""

import hashlib
from collections.abc import Callable

import numpy as np

from refbn_d2.metrics.bootstrap import Matches, paired_bootstrap
from refbn_d2.metrics.statistics import holm
from refbn_d2.study.data import DetectionSets
from refbn_d2.study.evaluation import clean_matches
from refbn_d2.study.plan import Job, Plan
from refbn_d2.study.runner import Record
from refbn_d2.utils.errors import DataError

RESAMPLES = 500


def bootstrap(plan: Plan, n_resamples: int = RESAMPLES) -> list[dict]:
    """Compare each norm with the baseline by AP of all objects, mean over the seeds of both.

    No p-value is below 2 / (n_resamples + 1): 0.004 with 500. So p_holm is at least that times the
    number of norms that are compared under a condition.

    Returns:
        A dict per comparison: norm, condition, metric, difference, interval, p_value, p_holm
        (corrected for all norms with the same metric and condition), n_images, seeds.
    """
    study, sets = plan.study, plan.sets
    assert isinstance(sets, DetectionSets)
    done = {(job.norm, job.condition, job.seed): job for job in plan.runs if Record(job).done}
    tasks = list(dict.fromkeys(metric.partition("/")[0] for metric in study.evaluate.metrics))
    found: list[dict] = []
    for task in tasks:
        ap = {key: _resampled(sets, job, task) for key, job in done.items()}
        for condition in study.conditions.values():
            compared: list[dict] = []
            for norm in condition.norms:
                seeds = [
                    seed
                    for seed in study.seeds
                    if {(norm, condition.name, seed), (study.baseline, condition.name, seed)}
                    <= done.keys()
                ]
                if norm == study.baseline or not seeds:
                    continue
                own, base = (
                    _mean([ap[name, condition.name, seed] for seed in seeds])
                    for name in (norm, study.baseline)
                )
                try:
                    result = paired_bootstrap(own, base, len(sets.domains()), n_resamples)
                except DataError:  # the test set has no objects
                    continue
                compared.append(
                    {"norm": norm, "condition": condition.name, "metric": f"{task}/AP",
                     "seeds": len(seeds), **result._asdict()}
                )  # fmt: skip
            corrected = holm([one["p_value"] for one in compared])
            found += [one | {"p_holm": p} for one, p in zip(compared, corrected, strict=True)]
    return found


def _resampled(sets: DetectionSets, job: Job, task: str) -> Callable[[np.ndarray], float]:
    """Return a function counts -> AP that keeps its results: comparisons share their resamples."""
    known: dict[bytes, float] = {}
    matches: list[Matches] = []  # read on first use

    def ap(counts: np.ndarray) -> float:
        key = hashlib.sha256(np.asarray(counts, float).tobytes()).digest()
        if key not in known:
            matches[:] = matches or [clean_matches(sets, job, task)]
            known[key] = matches[0].ap(counts)
        return known[key]

    return ap


def _mean(functions: list[Callable[[np.ndarray], float]]) -> Callable[[np.ndarray], float]:
    return lambda counts: float(np.mean([ap(counts) for ap in functions]))
