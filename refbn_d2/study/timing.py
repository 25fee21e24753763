"""Measure seconds a step and peak memory of each norm, in processes of their own.

In each round all norms take turns, so that a change of the machine's speed affects all of them. A
ratio is the median over the rounds of the ratio to the baseline in the same round. "seconds a step"
is the median over the rounds of a process's median over its last steps. Peak memory is the
process's largest resident set on the CPU, and torch's largest allocation on a GPU.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

from refbn_d2.study.data import DetectionSets
from refbn_d2.study.evaluation import read_curves
from refbn_d2.study.plan import Job, Plan, Stage, digest, words
from refbn_d2.study.runner import say
from refbn_d2.utils.file_io import write_text

SECONDS, RATIO, MEMORY = "seconds a step", "time ratio", "peak memory (MB)"
_MAX_MEM = re.compile(r"max_mem: (\d+)M")


def measure_timing(plan: Plan, gpus: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return {condition: {norm: {metric: value}}}; earlier measurements are read from their files.

    Raises:
        ChildProcessError: a process failed; names the file with its output.
    """
    timing, found = plan.study.timing, {}
    for condition in timing.conditions if timing.rounds else ():
        jobs = {job.norm: job for job in plan.timed() if job.condition == condition}
        path = plan.folder / "timing" / f"{digest({'c': condition})}.json"
        recipe: dict[str, str | int] = {norm: digest(job.recipe) for norm, job in jobs.items()}
        recipe |= {"rounds": timing.rounds, "steps": timing.steps}
        before = json.loads(path.read_text()) if path.exists() else {}
        if before.get("recipe") != recipe:
            say(f"Timing {len(jobs)} norms under {condition!r}.")
            before = {"recipe": recipe, "values": _measure(plan, jobs, gpus)}
            write_text(path, json.dumps(before, indent=1))
        found[condition] = before["values"]
    return found


def _measure(plan: Plan, jobs: dict[str, Job], gpus: list[str]) -> dict[str, dict[str, float]]:
    seconds, memory = defaultdict(list), defaultdict(list)
    for _ in range(plan.study.timing.rounds):
        for norm, job in jobs.items():
            time, peak = _one(plan, job, gpus)
            seconds[norm].append(time)
            memory[norm].append(peak)
    base = seconds.get(plan.study.timing.baseline)
    values = {}
    for norm in jobs:
        values[norm] = {
            SECONDS: statistics.median(seconds[norm]), MEMORY: statistics.median(memory[norm])
        }  # fmt: skip
        if base:
            ratios = [own / other for own, other in zip(seconds[norm], base, strict=True)]
            values[norm][RATIO] = statistics.median(ratios)
    return values


def _one(plan: Plan, job: Job, gpus: list[str]) -> tuple[float, float]:
    """Run one short training; return its seconds a step and its memory in MB."""
    folder = plan.folder / "timing" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stage = _short(plan, job, folder)
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)} | os.environ
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[0]
    output = folder / "output.txt"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            stage.command(), stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # the study is being stopped
            process.terminate()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ChildProcessError(
            f"timing {job.norm} ended with exit code {process.returncode}: {output} says why. "
            f"The command: {stage.shown()}"
        )
    times = read_curves(folder / "metrics.json")["time"][1]
    allocated = _MAX_MEM.findall(output.read_text(errors="replace"))
    peak = float(allocated[-1]) if gpus and allocated else usage.ru_maxrss / 1024
    return float(times[-1]), peak


def _short(plan: Plan, job: Job, folder: Path) -> Stage:
    """Return the run's training, with few steps and no evaluation."""
    steps, stage = plan.study.timing.steps, job.stages[0]
    if isinstance(plan.sets, DetectionSets):
        more = ["SOLVER.MAX_ITER", steps, "DATASETS.TEST", (), "TEST.EVAL_PERIOD", 0]
    else:
        more = plan.sets.short(steps, job.recipe["SOLVER.IMS_PER_BATCH"])
    arguments = (*stage.arguments, *words([*more, "OUTPUT_DIR", str(folder)]))
    return Stage("timing", stage.module, arguments)
