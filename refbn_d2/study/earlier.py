"""Results of an earlier session, from its CSV: their runs need not be repeated."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from refbn_d2.study.evaluation import steps_names
from refbn_d2.study.fingerprint import code_hash
from refbn_d2.study.plan import Plan, cell_name
from refbn_d2.study.report import about_of
from refbn_d2.study.results import Row, read_csv
from refbn_d2.study.runner import say
from refbn_d2.utils.errors import ConfigError

Run = tuple[str, str, int]  # norm, condition, seed
LOST = ("failed", "not run")  # the status of rows without a result


def earlier_results(file: Path, plan: Plan, same_code: str = "") -> Mapping[Run, list[Row]]:
    """Return the rows of every run that `file` has to the end: diverged, or with every metric.

    Args:
        file: a results.csv, with its results.yaml beside it.
        same_code: the hash of another version of the code, of which the user says that it computes
            the same numbers.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no table of results.
        ConfigError: it has no results.yaml; it is of another study, or of another or an unknown
            version of the code; it has a norm, condition or seed that the study does not have, or a
            run with other settings.
    """
    study, yaml = plan.study, file.with_suffix(".yaml")
    rows = read_csv(file)
    if not yaml.exists():
        raise ConfigError(f"--have {file} needs the file {yaml} of the same session; copy it there")
    about = about_of(file, rows)
    if about.study != study.name:
        raise ConfigError(f"{file} has the study {about.study!r}, not {study.name!r}")
    if not about.code:
        raise ConfigError(
            f"{yaml} has no `code`, so what made the results is unknown; run without --have"
        )
    if about.code not in (code_hash(), same_code):
        raise ConfigError(
            f"{file} was made by the code {about.code}, and this is {code_hash()}. If both compute "
            f"the same numbers, add --same-code {about.code}"
        )
    runs: dict[Run, list[Row]] = {}
    for row in rows:
        if row.seed is not None:
            runs.setdefault((row.norm, row.condition, row.seed), []).append(row)
    runs = {run: own for run, own in runs.items() if not any(r.status in LOST for r in own)}
    for norm, condition, seed in runs:
        known = condition in study.conditions and norm in study.conditions[condition].norms
        if not known or seed not in study.seeds:
            raise ConfigError(
                f"{file} has the run norm={norm},seed={seed},condition={condition}, which "
                f"{study.file} does not have"
            )
    if about.settings:
        _check_settings(yaml, about.settings, runs, plan)
    else:
        say(f"Warning: {yaml} has no `settings`, so those of its runs cannot be compared.")
    lacking = {run: _lacking(own, plan) for run, own in runs.items()}
    if repeated := [run for run in runs if lacking[run]]:
        names = list(dict.fromkeys(metric for run in repeated for metric in lacking[run]))
        more = f" and {len(names) - 3} more metrics" if len(names) > 3 else ""
        lacks = ", ".join(names[:3]) + more
        say(f"{len(repeated)} runs of {file} are repeated: they have no {lacks}.")
    return {run: own for run, own in runs.items() if not lacking[run]}


def _check_settings(
    yaml: Path, settings: Mapping[str, str], runs: Mapping[Run, Sequence[Row]], plan: Plan
) -> None:
    now = plan.settings()
    for norm, condition, seed in runs:
        cell = cell_name(norm, condition)
        if settings.get(cell) != now[cell]:
            raise ConfigError(
                f"{yaml}: the run norm={norm},seed={seed},condition={condition} was made with "
                f"other settings: {settings.get(cell)} there, {now[cell]} by {plan.study.file}. "
                "Restore them, or remove its rows from the CSV; if only a default key is new, "
                "remove `settings` from the YAML file"
            )


def _lacking(rows: Sequence[Row], plan: Plan) -> list[str]:
    """Return the metrics that a run lacks; a run that diverged needs none."""
    evaluate = plan.study.evaluate
    if all(row.status == "diverged" for row in rows):
        return []
    found = {row.metric for row in rows}
    wanted = [*evaluate.metrics, *steps_names(evaluate)]
    tasks = dict.fromkeys(metric.partition("/")[0] for metric in evaluate.metrics)
    aps = [f"{task}/AP" for task in tasks] if plan.study.task == "detection" else ["error"]
    wanted += [f"{metric}~{label}" for metric in aps for label in plan.sets.corrupted_labels()]
    if evaluate.domains and not any("@" in metric for metric in found):
        wanted.append(f"{evaluate.metrics[0]}@<domain>")
    return [metric for metric in wanted if metric not in found]
