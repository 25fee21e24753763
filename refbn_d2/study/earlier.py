"""Results of an earlier session, from its CSV: their runs need not be repeated."""

from collections.abc import Mapping
from pathlib import Path

from refbn_d2.study.fingerprint import code_hash
from refbn_d2.study.report import about_of
from refbn_d2.study.results import Row, read_csv
from refbn_d2.study.spec import Study
from refbn_d2.utils.errors import ConfigError

Run = tuple[str, str, int]  # norm, condition, seed


def earlier_results(file: Path, study: Study, same_code: str = "") -> Mapping[Run, list[Row]]:
    """Return the rows of every run that `file` has to the end: done or diverged.

    Args:
        file: a results.csv, with its results.yaml beside it.
        same_code: the hash of another version of the code, of which the user says that it computes
            the same numbers.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no table of results.
        ConfigError: it is of another study or of another version of the code, or has a norm,
            condition or seed that the study does not have.
    """
    rows = read_csv(file)
    about = about_of(file, rows)
    if about.study != study.name:
        raise ConfigError(f"{file} has the study {about.study!r}, not {study.name!r}")
    if about.code not in (code_hash(), same_code):
        raise ConfigError(
            f"{file} was made by the code {about.code or 'of an unknown version'}, and this is "
            f"{code_hash()}. If both compute the same numbers, add --same-code {about.code}"
        )
    runs: dict[Run, list[Row]] = {}
    for row in rows:
        if row.seed is not None:
            runs.setdefault((row.norm, row.condition, row.seed), []).append(row)
    for norm, condition, seed in runs:
        known = condition in study.conditions and norm in study.conditions[condition].norms
        if not known or seed not in study.seeds:
            raise ConfigError(
                f"{file} has the run norm={norm},seed={seed},condition={condition}, which "
                f"{study.file} does not have"
            )
    lost = ("failed", "not run")
    return {run: rows for run, rows in runs.items() if not any(r.status in lost for r in rows)}
