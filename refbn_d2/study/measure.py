"""Run a study: train what is missing, evaluate it, and write its tables."""

import argparse
import json
import math
import platform
import shlex
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from refbn_d2.study.bootstrap import bootstrap
from refbn_d2.study.data import DetectionSets
from refbn_d2.study.earlier import LOST, Run, earlier_results
from refbn_d2.study.evaluation import evaluate_run
from refbn_d2.study.fingerprint import code_hash
from refbn_d2.study.plan import Plan, parse_only, plain
from refbn_d2.study.report import About, drawn, html, markdown
from refbn_d2.study.results import Row, read_csv, write_csv
from refbn_d2.study.runner import ENDED, Record, Runner, say
from refbn_d2.study.spec import Study, load_study
from refbn_d2.study.tables import table_of
from refbn_d2.study.timing import Costs, known_costs, measure_timing
from refbn_d2.utils.errors import ConfigError
from refbn_d2.utils.file_io import read_record, write_text
from refbn_d2.utils.lock import locked
from refbn_d2.visualization.curves import compare_curves
from refbn_d2.visualization.intervals import plot_intervals

NAN = float("nan")


def measure(args: argparse.Namespace) -> None:
    """Do what `tools/measure_generalization.py` does; see its `--help` for `args`.

    Raises:
        RefBNError, OSError: the study, its data or its folder cannot be used.
        ChildProcessError: some runs failed; all others are done.
        SystemExit: stopped by SIGINT or SIGTERM.
    """
    if args.jobs < 0:
        raise ConfigError(f"--jobs {args.jobs}; allowed: 1 or more, or 0 for one per GPU")
    study = load_study(args.study)
    only = parse_only(args.only, study)
    folder = Path(args.output_dir or f"output/studies/{study.name}")
    plan = Plan(study, folder, engine_of(args.engine or study.engine))
    earlier = earlier_results(args.have, plan, args.same_code) if args.have else {}
    jobs = plan.jobs(only, earlier)
    if not jobs and not earlier:
        raise ConfigError(f"--only {args.only!r}: the study has no such run; --dry-run lists all")
    if args.dry_run:
        for job in jobs:
            for stage in job.stages:
                print(stage.shown())
        return
    with locked(folder, "--output-dir"):
        check_study(study, folder)
        check_records(plan, earlier)
        check_results(plan, folder / "results.csv", {*earlier, *(job.run for job in jobs)})
        runner = Runner(jobs, args.jobs)
        timed = [] if args.only else plan.timed()
        plan.make_data([*jobs, *timed])
        runner.run()
        failed = [r for r in runner.records.values() if r.status == "failed"]
        # Of a part of the study, what takes minutes is left out.
        detection = isinstance(plan.sets, DetectionSets)
        resampled = bootstrap(plan) if detection and not args.only else []
        write_results(plan, folder, known_costs(plan), resampled, earlier)
        problems = []
        if failed:
            many = f"{len(failed)} of {len(jobs)} jobs failed"
            problems.append(f"{many}; start the study again to retry them")
            problems += [f"{r.job.folder}: {r.content['error']}" for r in failed[:5]]
        if timed:
            costs, errors = measure_timing(plan, runner.gpus)
            write_results(plan, folder, costs, resampled, earlier)
            problems += errors
    if problems:
        raise ChildProcessError("; ".join(problems))


def engine_of(name: str) -> str:
    """Return the engine `name`; for "auto", the one that is installed."""
    if name != "auto":
        return name
    from refbn_d2.engines.select import select_engine

    return select_engine("auto").__name__.rpartition(".")[2]


def check_study(study: Study, folder: Path) -> None:
    """Return if the folder holds this study, or no study.

    Raises:
        ConfigError: it holds another study.
    """
    path = folder / "study.json"
    before = read_record(path, dict, "delete it").get("study") if path.exists() else None
    if before not in (None, study.name):
        raise ConfigError(
            f"{folder} holds the study {before!r}, not {study.name!r}; give another --output-dir"
        )
    write_text(path, json.dumps({"study": study.name}))


def check_records(plan: Plan, earlier: Mapping[Run, list[Row]]) -> None:
    """Return if the results can be written once all runs are done.

    Raises:
        ConfigError: a run in the folder was made by another version of the study or of the code.
    """
    for job in plan.runs:
        record = Record(job)
        if not _is_earlier(record, earlier):
            record.check()


def check_results(plan: Plan, file: Path, runs: Container[Run]) -> None:
    """Return if `file`, which will be replaced, has no result that would be lost.

    Args:
        runs: those that are started now, or that --have has.

    Raises:
        ConfigError: it has the result of another run, whose folder is gone.
    """
    if not file.exists():
        return
    ended = {(r.norm, r.condition, r.seed) for r in read_csv(file) if r.status not in LOST}
    for job in plan.runs:
        if job.run in ended and job.run not in runs and Record(job).status not in ENDED:
            raise ConfigError(
                f"{file} has the results of {job.id}, but {job.folder} has not, and they would be "
                "lost: move results.csv and results.yaml elsewhere, and name the CSV in --have"
            )


def _is_earlier(record: Record, earlier: Mapping[Run, list[Row]]) -> bool:
    """Return whether a run's rows are those in `earlier`: the folder does not have better ones."""
    return record.job.run in earlier and not record.done


def _command(plan: Plan, *more: str) -> list[str]:
    study, engine = plan.study, []
    if study.task == "detection" and plan.engine != study.engine:
        engine = ["--engine", plan.engine]
    return ["refbn-measure", "--study", str(study.file), *engine, *more]


def rows_of(plan: Plan, earlier: Mapping[Run, list[Row]]) -> Iterable[Row]:
    """Yield the rows of all runs of the study; a run that is not done has one row without a value.

    Args:
        earlier: rows of runs; those that the folder has too come from there.

    Raises:
        ConfigError: a run in the folder was made by another version of the study or of the code.
    """
    study = plan.study
    for job in tqdm(plan.runs, "measuring", unit="run", disable=None, leave=False):
        record = Record(job)
        if _is_earlier(record, earlier):
            yield from earlier[job.run]
            continue
        record.check()
        only = f"norm={job.norm},seed={job.seed},condition={job.condition}"
        common = (study.name, job.norm, job.seed, job.condition)
        command = shlex.join(_command(plan, "--only", only))
        if record.status != "done":
            for metric in study.evaluate.metrics:
                yield Row(*common, metric, NAN, 0, record.status, command)
            continue
        evaluate = plain(vars(study.evaluate))
        if record.content.get("evaluate") != evaluate:  # not measured, or by another study file
            measured = evaluate_run(study, plan.sets, job)
            record.write(evaluate=evaluate, measured={k: list(m) for k, m in measured.items()})
        for metric, (value, n, status) in record.content["measured"].items():
            yield Row(*common, metric, value, n, status, command)


def write_results(
    plan: Plan,
    folder: Path,
    costs: Costs,
    resampled: Sequence[Mapping],
    earlier: Mapping[Run, list[Row]],
) -> None:
    """Write results.csv, results.json, results.md and report.html."""
    study = plan.study
    rows = [*rows_of(plan, earlier), *_cost_rows(plan, costs)]
    about = About(
        study.name, study.title, study.baseline, study.text, shlex.join(_command(plan)),
        {n.name: n.text for n in study.norms.values() if n.text},
        {c.name: c.text for c in study.conditions.values() if c.text}, code_hash(),
        plan.settings(),
    )  # fmt: skip
    write_csv(rows, folder / "results.csv")
    write_text(folder / "results.yaml", yaml.safe_dump(vars(about), sort_keys=False, width=100))
    content = {
        "study": study.name, "code": code_hash(), "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "rows": [asdict(row) for row in rows], "bootstrap": resampled,
    }  # fmt: skip
    write_text(folder / "results.json", json.dumps(_without_nan(content), indent=1))
    write_text(folder / "results.md", markdown(rows, about, level=1))
    write_text(folder / "report.html", html(rows, about, _pictures(plan, rows), resampled))
    say(f"Wrote {folder / 'results.csv'} ({len(rows)} rows) and {folder / 'report.html'}.")


def _cost_rows(plan: Plan, costs: Costs) -> Iterable[Row]:
    study, command = plan.study, shlex.join(_command(plan))
    for condition, norms in costs.items():
        for norm, values in norms.items():
            for metric, value in values.items():
                yield Row(
                    study.name, norm, None, condition, metric, value, study.timing.rounds, "done",
                    command,
                )  # fmt: skip


def _pictures(plan: Plan, rows: Sequence[Row]) -> dict[str, str]:
    """Return {title: data URL}: each metric's means, and one seed's losses for each condition."""
    pictures = {}
    for metric in plan.study.evaluate.metrics:
        table = table_of(rows, metric, plan.study.baseline)
        groups: dict[str, dict] = {}
        for (norm, condition), cell in table.cells.items():
            if cell.estimate:
                groups.setdefault(condition, {})[norm] = cell.estimate[:2]
        if groups:
            title = f"{metric}: means over the seeds, and their 95 % intervals"
            pictures[title] = drawn(partial(plot_intervals, groups, metric))
    for condition in plan.study.conditions:
        for seed in plan.study.seeds:
            files = {
                job.norm: job.folder / "metrics.json"
                for job in plan.runs
                if (job.condition, job.seed) == (condition, seed) and Record(job).done
            }
            if files:
                title = f"Training loss, {condition}, seed {seed}"
                metrics = {"total_loss": "Training loss"}
                pictures[title] = drawn(partial(compare_curves, files, metrics))
                break
    return pictures


def _without_nan(value):
    """Return `value` with None for nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
