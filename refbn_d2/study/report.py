"""Write the report of a study, and docs/results.md from committed results.

    python -m refbn_d2.study.report docs/results/*.csv --answers docs/results/answers.md \
        --output docs/results.md

A YAML file with the same name as a CSV gives its title, text, baseline and commands. A study writes
it as `results.yaml`, next to `results.csv`.
"""

import argparse
import base64
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

from refbn_d2.study.results import Row, read_csv
from refbn_d2.study.tables import (
    Table,
    metrics_of,
    number,
    shown,
    shown_difference,
    table_of,
    warning,
)
from refbn_d2.utils.arguments import run_or_exit
from refbn_d2.utils.errors import DataError
from refbn_d2.utils.file_io import write_text

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MEANING = {
    "bbox/AP": "average precision of boxes (%)",
    "segm/AP": "average precision of masks (%)",
    "bbox/AP gain": "average precision of boxes, after the adaptation minus before (%)",
    "segm/AP gain": "average precision of masks, after the adaptation minus before (%)",
    "bbox/mPC": "box AP, mean over the corruptions and severities (%)",
    "segm/mPC": "mask AP, mean over the corruptions and severities (%)",
    "bbox/rPC": "box AP under corruption, relative to the clean AP (%)",
    "segm/rPC": "mask AP under corruption, relative to the clean AP (%)",
    "error": "top-1 error (%)",
    "loss": "cross entropy on the test set",
    "accuracy/mPC": "top-1 accuracy, mean over the corruptions and severities (%)",
    "accuracy/rPC": "top-1 accuracy under corruption, relative to the clean accuracy (%)",
}


@dataclass(frozen=True)
class About:
    """The texts of a study's report."""

    study: str
    title: str
    baseline: str
    text: str = ""
    command: str = ""
    norms: Mapping[str, str] = field(default_factory=dict)  # name -> description
    conditions: Mapping[str, str] = field(default_factory=dict)
    code: str = ""  # `code_hash` of the code that made the results
    settings: Mapping[str, str] = field(default_factory=dict)  # `Plan.settings` of the results


def meaning(metric: str) -> str:
    """Return a description of a metric."""
    if metric in MEANING:
        return MEANING[metric]
    for mark, words in (("@", "on the domain"), ("~", "under the corruption/severity")):
        base, found, rest = metric.partition(mark)
        if found:
            return f"{MEANING.get(base, base)}, {words} {rest}"
    if metric.startswith("steps to "):
        *curve, target = metric.removeprefix("steps to ").split()
        return f"steps until {' '.join(curve)} first is at {target}"
    return metric


def all_tables(rows: Sequence[Row], baseline: str) -> list[Table]:
    return [table_of(rows, metric, baseline) for metric in metrics_of(rows)]


# ---- Markdown


def markdown(rows: Sequence[Row], about: About, level: int = 2) -> str:
    """Return a study's section of docs/results.md."""
    sharp = "#" * level
    name = "" if about.title == about.study else f", `{about.study}`"
    parts = [f"{sharp} {about.title}{name}", about.text.strip()]
    if about.command:
        parts.append(f"Made by `{about.command}`. Each row of the CSV has its own command.")
    rows, waiting = _begun(rows)
    texts = {**about.norms, **about.conditions}
    begun = {name for row in rows for name in (row.norm, row.condition)}
    parts.append("\n".join(f"- {name}: {text}" for name, text in texts.items() if name in begun))
    for condition, norms in waiting.items():
        parts.append(f"Not run yet under {condition!r}: {', '.join(norms)}.")
    for table in all_tables(rows, about.baseline):
        if not {"~", "@"} & set(table.metric):  # single corruptions and domains are in the CSV
            parts += [f"{sharp}# {table.metric}: {meaning(table.metric)}", *_tables(table)]
    parts += _costs(rows, sharp)
    return "\n\n".join(filter(None, parts)) + "\n"


def _begun(rows: Sequence[Row]) -> tuple[list[Row], dict[str, list[str]]]:
    """Return the rows of the cells that have runs, and {condition: norms} of the others."""
    begun = {(row.norm, row.condition) for row in rows if row.status != "not run"}
    waiting: dict[str, list[str]] = {}
    for norm, condition in dict.fromkeys((row.norm, row.condition) for row in rows):
        if (norm, condition) not in begun:
            waiting.setdefault(condition, []).append(norm)
    return [row for row in rows if (row.norm, row.condition) in begun], waiting


def _tables(table: Table) -> list[str]:
    head = ["norm", *table.conditions]
    means = [
        [norm, *(shown(table.cells.get((norm, c)), table.metric) for c in table.conditions)]
        for norm in table.norms
    ]
    parts = [warning(table), grid(head, means)]
    differences = [
        [norm, *(shown_difference(table.cells.get((norm, c))) for c in table.conditions)]
        for norm in table.norms
        if norm != table.baseline
    ]
    if any(cell for row in differences for cell in row[1:]):
        parts += [
            f"Difference from {table.baseline}, paired by seed ({table.comparisons} comparisons "
            "with a test):",
            grid(head, differences),
        ]
    return parts


def _costs(rows: Sequence[Row], sharp: str) -> list[str]:
    costs = [row for row in rows if row.seed is None]
    parts = []
    for condition in dict.fromkeys(row.condition for row in costs):
        own = [row for row in costs if row.condition == condition]
        metrics = list(dict.fromkeys(row.metric for row in own))
        values = {(row.norm, row.metric): row for row in own}
        lines = [
            [norm, *(number(values[norm, m].value) if (norm, m) in values else "" for m in metrics)]
            for norm in dict.fromkeys(row.norm for row in own)
        ]
        parts += [
            f"{sharp}# Cost under {condition} (median of {own[0].n} rounds, norms in turns)",
            grid(["norm", *metrics], lines),
        ]
    return parts


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    escaped = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


HEADER = """# Results

<!-- Made by `python -m refbn_d2.study.report docs/results/*.csv --answers docs/results/answers.md
--output docs/results.md`. -->

Each row of `docs/results/*.csv` has the command that makes its number. [Measuring](measuring.md)
explains the metrics; those of single domains and corruptions are in the CSV only. "± x" is half of
the 95 % t interval of the mean over n seeds. A difference is the mean over pairs of runs with the
same seed, with its 95 % interval. p is the p-value of the paired t test, and "Holm" is p corrected
for all comparisons in its table.
"""


def results_page(files: Sequence[Path], answers: str = "") -> str:
    """Return the text of docs/results.md; `answers`, in Markdown, stand before the tables.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a CSV or its YAML file cannot be used, or two are of one study.
    """
    parts = [HEADER, answers] if answers else [HEADER]
    of: dict[str, Path] = {}
    for file in files:
        rows = read_csv(file)
        about = about_of(file, rows)
        if about.study in of:
            raise DataError(
                f"{of[about.study]} and {file} are both of the study {about.study!r}; give only one"
            )
        of[about.study] = file
        parts.append(markdown(rows, about))
    if not files:
        parts.append("There are no results yet.\n")
    return "\n".join(parts)


def about_of(csv: Path, rows: Sequence[Row]) -> About:
    """Return the texts in a CSV's YAML file; if there is none, texts inferred from the rows.

    Raises:
        DataError: the CSV has no rows or rows of several studies; the YAML is not valid, has
            unknown keys or values of a wrong type, is of another study, or its baseline has no row.
    """
    studies = sorted({row.study for row in rows})
    if len(studies) != 1:
        raise DataError(f"{csv} has rows of {len(studies)} studies {studies}; it needs exactly one")
    file = csv.with_suffix(".yaml")
    content: dict[str, Any] = {"study": studies[0], "title": studies[0], "baseline": rows[0].norm}
    if file.exists():
        content |= _read_yaml(file)
    try:
        about = About(**content)
    except TypeError as error:
        raise DataError(f"{file}: {error}") from error
    for key, value in vars(about).items():
        mapping = key in ("norms", "conditions", "settings")
        if not isinstance(value, Mapping if mapping else str):
            allowed = "lines of `name: text`" if mapping else 'a text, or "" for none'
            raise DataError(f"{file}, {key}: is {value!r}; write {allowed}")
    if about.study != studies[0]:
        raise DataError(f"{file} is of the study {about.study!r}, and {csv} of {studies[0]!r}")
    norms = dict.fromkeys(row.norm for row in rows)
    if about.baseline not in norms:
        raise DataError(
            f"{file}, baseline: {csv} has no row of {about.baseline!r}; its norms: "
            + ", ".join(norms)
        )
    return about


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_read(file))
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise DataError(f"{file} is not valid YAML: {why}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds {content!r}; write `key: value` lines")
    return {str(key): value for key, value in content.items()}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not in UTF-8: {error}; save it as UTF-8") from error


# ---- HTML


def html(
    rows: Sequence[Row], about: About, pictures: Mapping[str, str], bootstrap: Sequence[Mapping]
) -> str:
    """Return report.html: one file with its pictures in it.

    Args:
        pictures: title -> data URL.
        bootstrap: the result of `study.bootstrap`.
    """
    tables = all_tables(rows, about.baseline)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        about=about, rows=rows, pictures=pictures, bootstrap=bootstrap,
        main=[t for t in tables if "~" not in t.metric and "@" not in t.metric],
        domains=[t for t in tables if "@" in t.metric],
        corruptions=[t for t in tables if "~" in t.metric],
        costs=[row for row in rows if row.seed is None],
        runs=len({(r.norm, r.condition, r.seed) for r in rows if r.seed is not None}),
        lost=_lost(rows), meaning=meaning, shown=shown, shown_difference=shown_difference,
        number=number, warning=warning,
    )  # fmt: skip


def _lost(rows: Sequence[Row]) -> list[Row]:
    """Return one row of each run without a value."""
    lost = [r for r in rows if r.status in ("diverged", "failed", "not run")]
    return list({(r.norm, r.condition, r.seed): r for r in lost}.values())


def data_url(png: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def drawn(draw: Any, *arguments) -> str:
    """Return the data URL of the picture that `draw(*arguments, path)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        draw(*arguments, path)
        return data_url(path)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("csv", nargs="*", type=Path, help="results of studies")
    p.add_argument("--answers", type=Path, help="Markdown that stands before the tables")
    p.add_argument("--output", type=Path, required=True, help="for example docs/results.md")

    def run(args: argparse.Namespace) -> None:
        if args.output.resolve() in [file.resolve() for file in (*args.csv, args.answers) if file]:
            raise DataError(f"--output {args.output} is also an input; name another file")
        answers = _read(args.answers) if args.answers else ""
        write_text(args.output, results_page(sorted(args.csv), answers))

    run_or_exit(run, p.parse_args())


if __name__ == "__main__":
    main()
