"""Write and read a study's results: a CSV with one row per run and metric."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from refbn_d2.utils.errors import DataError
from refbn_d2.utils.file_io import write_text

STATUSES = ("done", "diverged", "failed", "not reached", "not run")


@dataclass(frozen=True)
class Row:
    """One value; nan unless the status is "done"."""

    study: str
    norm: str
    seed: int | None  # None for time and memory, which do not belong to a seed
    condition: str
    metric: str
    value: float
    n: int  # number of pictures, steps or rounds that the value is a mean over
    status: str
    command: str


COLUMNS = [f.name for f in fields(Row)]


def write_csv(rows: Iterable[Row], path: str | Path) -> None:
    """Write the rows, with values of 6 significant digits, so that files can be compared.

    A row that is "done" without a finite value is written as "diverged", as `read_csv` needs it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells = asdict(row)
        finite = math.isfinite(row.value)
        cells["value"] = f"{row.value:.6g}" if finite else ""
        if row.status == "done" and not finite:
            cells["status"] = "diverged"
        cells["seed"] = "" if row.seed is None else row.seed
        writer.writerow([cells[column] for column in COLUMNS])
    write_text(path, text.getvalue())


def read_csv(path: str | Path) -> list[Row]:
    """Read a file of `write_csv`.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is not such a table, or has two rows of one value; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results {path} do not exist; check the path")
    rows: dict[tuple, Row] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                raise DataError(f"{path} has the columns {reader.fieldnames}; allowed: {COLUMNS}")
            for cells in reader:
                row = _row(path, reader.line_num, cells)
                key = (row.study, row.norm, row.seed, row.condition, row.metric)
                if key in rows:
                    raise DataError(
                        f"{path}, line {reader.line_num}: a second row of {row.metric} for norm "
                        f"{row.norm!r}, seed {row.seed}, condition {row.condition!r}; remove one"
                    )
                rows[key] = row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}; write it again") from error
    return list(rows.values())


def _row(path: Path, line: int, cells: dict) -> Row:
    try:
        value = float(cells["value"]) if cells["value"] else math.nan
        seed = int(cells["seed"]) if cells["seed"] else None
        row = Row(**cells | {"value": value, "seed": seed, "n": int(cells["n"])})
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}, line {line}: {error}") from error
    if row.status not in STATUSES:
        raise DataError(f"{path}, line {line}: status {row.status!r}; allowed: {STATUSES}")
    if row.status == "done" and not math.isfinite(row.value):
        raise DataError(
            f"{path}, line {line}: status 'done' with the value {row.value}; allowed: a number"
        )
    return row
