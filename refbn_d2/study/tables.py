"""Turn result rows into tables: means over seeds, and differences from the baseline by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from refbn_d2.metrics.statistics import (
    Difference,
    Estimate,
    holm,
    mean_interval,
    paired_difference,
)
from refbn_d2.study.results import Row

FEW = 3  # with fewer seeds a table shows directions, not results
_WORSE_WHEN_HIGHER = ("error", "loss", "steps", "seconds", "memory", "time")


@dataclass(frozen=True)
class Cell:
    """The values of one metric for one norm under one condition."""

    norm: str
    condition: str
    values: dict[int, float]  # seed -> value, for runs that have one
    others: dict[str, int]  # status -> number of runs without a value
    estimate: Estimate | None  # None without any value
    difference: Difference | None  # from the baseline; None for it, and without a common seed
    p_holm: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of one metric, with a row per norm and a column per condition.

    The p-values are corrected for the number of comparisons in this table (Holm).
    """

    metric: str
    baseline: str
    norms: list[str]
    conditions: list[str]
    cells: dict[tuple[str, str], Cell]  # (norm, condition)
    comparisons: int  # number of differences with a p-value

    @property
    def lower_is_better(self) -> bool:
        return self.metric.startswith(_WORSE_WHEN_HIGHER)

    @property
    def most_seeds(self) -> int:
        return max((len(cell.values) for cell in self.cells.values()), default=0)

    def best(self, condition: str) -> str | None:
        """Return the norm with the best mean under a condition."""
        means = {
            norm: cell.estimate.mean
            for (norm, where), cell in self.cells.items()
            if where == condition and cell.estimate
        }
        choose = min if self.lower_is_better else max
        return choose(means, key=means.__getitem__) if means else None


def table_of(rows: Sequence[Row], metric: str, baseline: str) -> Table:
    """Return the table of one metric; all `rows` belong to one study."""
    of_runs = [row for row in rows if row.seed is not None]
    rows = _with_lost(of_runs, metric)
    norms = list(dict.fromkeys(row.norm for row in of_runs))
    conditions = list(dict.fromkeys(row.condition for row in rows))
    values: dict[tuple[str, str], dict[int, float]] = {}
    others: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        key = (row.norm, row.condition)
        assert row.seed is not None  # by `of_runs`
        if row.status == "done":
            values.setdefault(key, {})[row.seed] = row.value
        else:
            counts = others.setdefault(key, {})
            counts[row.status] = counts.get(row.status, 0) + 1
    cells = {}
    for key in dict.fromkeys((row.norm, row.condition) for row in rows):
        own, base = values.get(key, {}), values.get((baseline, key[1]), {})
        paired = key[0] != baseline and own.keys() & base.keys()
        cells[key] = Cell(
            *key, own, others.get(key, {}),
            mean_interval([own[seed] for seed in sorted(own)]) if own else None,
            paired_difference(own, base) if paired else None,
        )  # fmt: skip
    compared = {key: cell.difference for key, cell in cells.items() if cell.difference}
    corrected = holm([difference.p_value for difference in compared.values()])
    for key, p in zip(compared, corrected, strict=True):
        cells[key] = Cell(**vars(cells[key]) | {"p_holm": p})
    return Table(
        metric, baseline, [n for n in norms if any(k[0] == n for k in cells)], conditions, cells,
        sum(p is not None for p in corrected),
    )  # fmt: skip


def _with_lost(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return a metric's rows, and one row for each run that has no value of any metric."""
    own = [row for row in rows if row.metric == metric]
    runs = {(row.norm, row.condition, row.seed) for row in own}
    lost = {
        (row.norm, row.condition, row.seed): row
        for row in rows
        if row.status not in ("done", "not reached")
    }
    return own + [row for run, row in lost.items() if run not in runs]


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Return the metrics: on all pictures first, then on single domains, then on corruptions."""
    metrics = dict.fromkeys(row.metric for row in rows if row.seed is not None)
    return sorted(metrics, key=lambda name: ("~" in name, "@" in name))


def number(value: float, metric: str = "", places: int = 2) -> str:
    """Format a value for a table, with `places` decimals below 10."""
    if metric.startswith("steps"):
        return f"{value:.0f}"
    return f"{value:.{places}f}" if abs(value) < 10 else f"{value:.1f}"


def decimals(size: float) -> int:
    """Return 2, or as many decimals as show two digits of a smaller `size`; below 1e-6 it is 0."""
    return max(2, 1 - math.floor(math.log10(abs(size)))) if abs(size) >= 1e-6 else 2


def shown(cell: Cell | None, metric: str = "") -> str:
    """Return "29.9 ± 0.4 (n 3)", with the number of runs without a value by status."""
    if cell is None:
        return ""
    parts = []
    if cell.estimate:
        mean, interval, n = cell.estimate
        text = number(mean, metric)
        if interval:
            half = interval[1] - mean
            places = decimals(half) if abs(mean) < 10 else 2
            text = f"{number(mean, metric, places)} ± {number(half, metric, places)}"
        parts.append(f"{text} (n {n})")
    parts += [f"{count} {status}" for status, count in cell.others.items()]
    return ", ".join(parts)


def shown_difference(cell: Cell | None, metric: str = "") -> str:
    """Return "+1.20 [0.31, 2.09], p 0.02, Holm 0.04 (n 3)"; a small one has more decimals."""
    if cell is None or cell.difference is None:
        return ""
    mean, interval, p, _, n = cell.difference
    places = decimals((interval[1] - interval[0]) / 2 if interval else mean)
    text = f"{mean:+.{places}f}"
    if interval:
        text += f" [{interval[0]:.{places}f}, {interval[1]:.{places}f}]"
    if p is not None and cell.p_holm is not None:
        text += f", p {p_value(p)}, Holm {p_value(cell.p_holm)}"
    return f"{text} (n {n})"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def warning(table: Table) -> str:
    """Return a warning if a table has few seeds; "" if it has enough."""
    seeds = table.most_seeds
    if seeds == 0:
        return "No run has a value yet."
    if seeds == 1:
        return "One seed: there is no interval, and no test is possible."
    if seeds < FEW:
        return f"{seeds} seeds: the intervals are wide. These are directions, not results."
    return ""
