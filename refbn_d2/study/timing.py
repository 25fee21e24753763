"""Measure seconds a step and peak memory of each norm, in processes of their own.

In each round all norms take turns, so that a change of the machine's speed affects all of them. A
ratio is the median over the rounds of the ratio to the baseline in the same round. "seconds a step"
is the median over the rounds of a process's median over its last steps. Peak memory is torch's
largest allocation on a GPU, and the process's largest resident set on the CPU (only on Linux).
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from pathlib import Path

from refbn_d2.study.data import DetectionSets
from refbn_d2.study.evaluation import read_curves
from refbn_d2.study.plan import Job, Plan, Stage, digest, words
from refbn_d2.study.runner import say
from refbn_d2.utils.file_io import read_record, write_text

SECONDS, RATIO, MEMORY = "seconds a step", "time ratio", "peak memory (MB)"
_MAX_MEM = re.compile(r"max_mem: (\d+)M")
_LARGEST_RESIDENT = re.compile(r"VmHWM:\s+(\d+) kB")  # in /proc/<pid>/status


Costs = dict[str, dict[str, dict[str, float]]]  # condition -> norm -> metric -> value


def measure_timing(plan: Plan, gpus: list[str]) -> tuple[Costs, list[str]]:
    """Return the costs of the study's norms, and the errors of norms whose process failed.

    Costs that were measured earlier are read. A norm that failed has none.
    """
    timing = plan.study.timing
    found, failed = {}, []
    for condition in timing.conditions if timing.rounds else ():
        jobs, path, recipe = _cost_record(plan, condition)
        content = _known(path, recipe)
        if not content:
            say(f"Timing {len(jobs)} norms under {condition!r}.")
            values, errors = _measure(plan, jobs, gpus)
            content = {"recipe": recipe, "values": values, "failed": errors}
            write_text(path, json.dumps(content, indent=1))
        found[condition] = content["values"]
        failed += [f"{e} (to time it again, delete {path})" for e in content.get("failed", ())]
    return found, failed


def known_costs(plan: Plan) -> Costs:
    """Return the costs that the study's folder has, for its present settings and code."""
    timing, found = plan.study.timing, {}
    for condition in timing.conditions if timing.rounds else ():
        _, path, recipe = _cost_record(plan, condition)
        if content := _known(path, recipe):
            found[condition] = content["values"]
    return found


def _known(path: Path, recipe: dict[str, str | int]) -> dict:
    """Return the record of costs at `path`; {} if there is none of this recipe."""
    content = read_record(path, dict, "delete it") if path.exists() else {}
    return content if content.get("recipe") == recipe else {}


def _cost_record(plan: Plan, condition: str) -> tuple[dict[str, Job], Path, dict[str, str | int]]:
    """Return the jobs by norm, the file of their costs, and what those depend on."""
    jobs = {job.norm: job for job in plan.timed() if job.condition == condition}
    path = plan.folder / "timing" / f"{digest({'c': condition})}.json"
    recipe: dict[str, str | int] = {norm: digest(job.recipe) for norm, job in jobs.items()}
    recipe |= {"rounds": plan.study.timing.rounds, "steps": plan.study.timing.steps}
    return jobs, path, recipe


def _measure(
    plan: Plan, jobs: dict[str, Job], gpus: list[str]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return {norm: its costs}, and the errors of the norms that failed."""
    seconds, memory, failed = defaultdict(list), defaultdict(list), {}
    for _ in range(plan.study.timing.rounds):
        for norm, job in jobs.items():
            if norm in failed:
                continue
            try:
                time, peak = _one(plan, job, gpus)
            except ChildProcessError as error:
                failed[norm] = str(error)
                continue
            seconds[norm].append(time)
            memory[norm].append(peak)
    done = {norm: times for norm, times in seconds.items() if norm not in failed}
    base = done.get(plan.study.timing.baseline)
    values = {}
    for norm in done:
        values[norm] = {SECONDS: statistics.median(seconds[norm])}
        if all(memory[norm]):
            values[norm][MEMORY] = statistics.median(memory[norm])
        if base:
            ratios = [own / other for own, other in zip(seconds[norm], base, strict=True)]
            values[norm][RATIO] = statistics.median(ratios)
    return values, list(failed.values())


def _one(plan: Plan, job: Job, gpus: list[str]) -> tuple[float, float]:
    """Run one short training; return its seconds a step and its memory in MB, 0 if unknown."""
    folder = plan.folder / "timing" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stage = _short(plan, job, folder)
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)} | os.environ
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[0]
    output = folder / "output.txt"
    peak = 0.0
    with open(output, "wb") as file:
        process = subprocess.Popen(
            stage.command(), stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                peak = max(peak, _largest_resident(process.pid))
                time.sleep(0.1)
        except BaseException:  # the study is being stopped
            process.terminate()
            raise
    if process.returncode:
        raise ChildProcessError(
            f"timing {job.norm} ended with exit code {process.returncode}: {output} says why. "
            f"The command: {stage.shown()}"
        )
    times = read_curves(folder / "metrics.json")["time"][1]
    allocated = _MAX_MEM.findall(output.read_text(errors="replace"))
    return float(times[-1]), float(allocated[-1]) if gpus and allocated else peak


def _largest_resident(pid: int) -> float:
    """Return a running process's largest resident set so far, in MB; 0 if it is not known.

    The `ru_maxrss` of a child is at least that of its parent, since it forked from it.
    """
    try:
        found = _LARGEST_RESIDENT.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def _short(plan: Plan, job: Job, folder: Path) -> Stage:
    """Return the run's training, with few steps and no evaluation."""
    steps, stage = plan.study.timing.steps, job.stages[0]
    if isinstance(plan.sets, DetectionSets):
        more = ["SOLVER.MAX_ITER", steps, "DATASETS.TEST", (), "TEST.EVAL_PERIOD", 0]
    else:
        more = plan.sets.short(steps, job.recipe["SOLVER.IMS_PER_BATCH"])
    arguments = (*stage.arguments, *words([*more, "OUTPUT_DIR", str(folder)]))
    return Stage("timing", stage.module, arguments)
