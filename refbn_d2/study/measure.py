"""Run a study: train what is missing, evaluate it, and write its tables."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from refbn_d2.study.evaluation import evaluate_run
from refbn_d2.study.plan import Only, Plan, parse_only
from refbn_d2.study.results import Row, write_csv
from refbn_d2.study.runner import Record, Runner, locked
from refbn_d2.study.spec import Study, load_study
from refbn_d2.utils.errors import ConfigError

NAN = float("nan")


def measure(args: argparse.Namespace) -> None:
    """Do what `tools/measure_generalization.py` does; see its `--help` for `args`.

    Raises:
        RefBNError, OSError: a study, its data or what is in its folder cannot be used.
        ChildProcessError: runs failed; all others were done.
        SystemExit: stopped by SIGINT or SIGTERM.
    """
    if args.jobs < 0:
        raise ConfigError(f"--jobs {args.jobs}; allowed: 1 or more, or 0 for one a GPU")
    study = load_study(args.study)
    only = parse_only(args.only, study)
    folder = Path(args.output_dir or f"output/studies/{study.name}")
    plan = Plan(study, folder, engine_of(args.engine or study.engine))
    jobs = plan.jobs(only)
    if not jobs:
        raise ConfigError(f"--only {args.only!r}: the study has no such run")
    if args.dry_run:
        for job in jobs:
            for stage in job.stages:
                print(stage.shown())
        return
    with locked(folder):
        check_study(study, folder)
        runner = Runner(jobs, args.jobs)
        plan.make_data(jobs)
        runner.run()
        failed = [r for r in runner.records.values() if r.status == "failed"]
        write_results(plan, folder)
    if failed:
        raise ChildProcessError(
            f"{len(failed)} of {len(jobs)} jobs failed, and the others are done: "
            + "; ".join(f"{r.job.folder}: {r.content['error']}" for r in failed[:5])
        )


def engine_of(name: str) -> str:
    """The engine that "auto" stands for here."""
    if name != "auto":
        return name
    from refbn_d2.engines.select import select_engine

    return select_engine("auto").__name__.rpartition(".")[2]


def check_study(study: Study, folder: Path) -> None:
    """Return if the folder holds this study, or none yet.

    Raises:
        ConfigError: it holds another one.
    """
    path = folder / "study.json"
    before = json.loads(path.read_text())["study"] if path.exists() else study.name
    if before != study.name:
        raise ConfigError(
            f"{folder} holds the study {before!r}, not {study.name!r}; name another --output-dir"
        )
    path.write_text(json.dumps({"study": study.name}))


def command_of(study: Study, only: str) -> str:
    """What to type for one run alone."""
    return shlex.join(
        ["python", "tools/measure_generalization.py", "--study", str(study.file), "--only", only]
    )


def rows_of(plan: Plan) -> Iterable[Row]:
    """The rows of all runs of the study; of those that are not done, one without a value.

    Raises:
        ConfigError: a run in the folder is of another version of the study or of the code.
    """
    study = plan.study
    for job in plan.runs:
        record = Record(job)
        record.check()
        only = f"norm={job.norm},seed={job.seed},condition={job.condition}"
        common = (study.name, job.norm, job.seed, job.condition)
        command = command_of(study, only)
        if record.status != "done":
            for metric in study.evaluate.metrics:
                yield Row(*common, metric, NAN, 0, record.status, command)
            continue
        if "measured" not in record.content:
            measured = evaluate_run(study, plan.sets, job)
            record.write(measured={name: list(m) for name, m in measured.items()})
        for metric, (value, n, status) in record.content["measured"].items():
            yield Row(*common, metric, value, n, status, command)


def write_results(plan: Plan, folder: Path) -> None:
    rows = list(rows_of(plan))
    write_csv(rows, folder / "results.csv")
    print(f"{len(rows)} rows: {folder / 'results.csv'}", file=sys.stderr)


__all__ = ["Only", "measure"]
