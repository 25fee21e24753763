"""A study's results: one row a run and metric, as CSV."""

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
    """One value. It is nan unless the status is "done"."""

    study: str
    norm: str
    seed: int | None  # None: not of one seed (time and memory)
    condition: str
    metric: str
    value: float
    n: int  # what the value is a mean over: pictures, steps or rounds
    status: str
    command: str


COLUMNS = [f.name for f in fields(Row)]


def write_csv(rows: Iterable[Row], path: str | Path) -> None:
    """Write the rows; values with 6 significant digits, so that files compare well."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells = asdict(row)
        cells["value"] = "" if math.isnan(row.value) else f"{row.value:.6g}"
        cells["seed"] = "" if row.seed is None else row.seed
        writer.writerow([cells[column] for column in COLUMNS])
    write_text(path, text.getvalue())


def read_csv(path: str | Path) -> list[Row]:
    """Read what `write_csv` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no such table; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results {path} do not exist; check the path")
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise DataError(f"{path} has the columns {reader.fieldnames}; results have {COLUMNS}")
        return [_row(path, reader.line_num, cells) for cells in reader]


def _row(path: Path, line: int, cells: dict) -> Row:
    try:
        value = float(cells["value"]) if cells["value"] else math.nan
        seed = int(cells["seed"]) if cells["seed"] else None
        row = Row(**cells | {"value": value, "seed": seed, "n": int(cells["n"])})
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}, line {line}: {error}") from error
    if row.status not in STATUSES:
        raise DataError(f"{path}, line {line}: status {row.status!r}; known: {STATUSES}")
    if row.status == "done" and not math.isfinite(row.value):
        raise DataError(f"{path}, line {line}: a run that is done has the value {row.value}")
    return row
