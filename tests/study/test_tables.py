"""Means, intervals and differences against numpy and scipy; lost runs are counted."""

import math

import numpy as np
import pytest
import scipy.stats

from refbn_d2.study.results import Row, read_csv, write_csv
from refbn_d2.study.tables import metrics_of, shown, shown_difference, table_of, warning
from refbn_d2.utils.errors import DataError

VALUES = {"BN": [28.0, 29.5, 27.1, 30.2], "GN": [31.0, 31.5, 30.9, 33.0], "A": [28.4, 29, 27, 31]}


def row(norm, seed, value, metric="bbox/AP", status="done", condition="c"):
    return Row("s", norm, seed, condition, metric, value, 166, status, f"run {norm} {seed}")


@pytest.fixture
def rows():
    return [row(n, s, v) for n, values in VALUES.items() for s, v in enumerate(values)]


def test_means_and_differences(rows):
    table = table_of(rows, "bbox/AP", "BN")
    for norm, values in VALUES.items():
        cell = table.cells[norm, "c"]
        low, high = scipy.stats.t.interval(
            0.95, 3, np.mean(values), np.std(values, ddof=1) / math.sqrt(4)
        )
        assert cell.estimate.mean == pytest.approx(np.mean(values))
        assert cell.estimate.interval == pytest.approx((low, high)) and cell.estimate.n == 4
    p = {n: scipy.stats.ttest_rel(VALUES[n], VALUES["BN"]).pvalue for n in ("GN", "A")}
    for norm in p:
        assert table.cells[norm, "c"].difference.p_value == pytest.approx(p[norm])
    small, large = sorted(p.values())
    holm = {small: min(1, 2 * small), large: max(2 * small, large)}
    for norm in p:
        assert table.cells[norm, "c"].p_holm == pytest.approx(holm[p[norm]])
    assert table.comparisons == 2 and table.cells["BN", "c"].difference is None
    assert table.best("c") == "GN" and not table.lower_is_better
    assert (
        table_of([row("B", 1, 2.0, "error"), row("A", 1, 1.0, "error")], "error", "B").best("c")
        == "A"
    )


def test_pairs_are_of_the_same_seed(rows):
    table = table_of([r for r in rows if (r.norm, r.seed) != ("GN", 0)], "bbox/AP", "BN")
    difference = table.cells["GN", "c"].difference
    assert difference.n == 3
    assert difference.mean == pytest.approx(np.mean(np.subtract(VALUES["GN"], VALUES["BN"])[1:]))


def test_runs_without_a_value_stay(rows):
    lost = [row("BN", 9, math.nan, status="diverged"), row("B", 1, math.nan, status="failed")]
    table = table_of(rows + lost, "bbox/AP", "BN")
    assert shown(table.cells["BN", "c"]).endswith("(n 4), 1 diverged")
    assert shown(table.cells["B", "c"]) == "1 failed"
    other = table_of(rows + lost + [row("BN", 0, 3, "bbox/mPC")], "bbox/mPC", "BN")
    assert shown(other.cells["B", "c"]) == "1 failed"  # a failed run counts for every metric
    steps = [row("BN", 1, math.nan, "steps to loss 1", "not reached")]
    cell = table_of(rows + steps, "steps to loss 1", "BN").cells["BN", "c"]
    assert shown(cell) == "1 not reached"


def test_too_few_seeds_are_said(rows):
    one = table_of([r for r in rows if r.seed == 1], "bbox/AP", "BN")
    assert "no interval" in warning(one)
    assert shown(one.cells["GN", "c"]) == "31.5 (n 1)"
    assert shown_difference(one.cells["GN", "c"]) == "+2.00 (n 1)"
    assert "2 seeds" in warning(table_of([r for r in rows if r.seed < 2], "bbox/AP", "BN"))
    assert warning(table_of(rows, "bbox/AP", "BN")) == ""


def test_small_differences_have_enough_decimals():
    def cell(scale):
        first = {"BN": (0.8, 0.82, 0.81), "GN": (0.803, 0.8227, 0.8133)}
        rows = [row(n, s, scale * v, "loss") for n, own in first.items() for s, v in enumerate(own)]
        return table_of(rows, "loss", "BN").cells["GN", "c"]

    assert shown_difference(cell(1)).startswith("+0.00300 [0.00225, 0.00375], p 0.00")
    assert shown(cell(1), "loss") == "0.813 ± 0.024 (n 3)"
    assert shown_difference(cell(100)).startswith("+0.300 [0.225, 0.375]")
    assert shown_difference(cell(1000)).startswith("+3.00 [2.25, 3.75]")
    assert shown(cell(100)) == "81.3 ± 2.45 (n 3)"
    one = table_of([row("BN", 1, 0.8, "loss"), row("GN", 1, 0.8031, "loss")], "loss", "BN")
    assert shown_difference(one.cells["GN", "c"]) == "+0.0031 (n 1)"


def test_csv_comes_back(rows, tmp_path):
    more = [row("BN", 9, math.nan, status="diverged"), row('x, "y"', None, 1 / 3, "seconds")]
    write_csv(rows + more, tmp_path / "r.csv")
    back = read_csv(tmp_path / "r.csv")
    assert back[:-2] == rows and math.isnan(back[-2].value)
    assert back[-1].value == pytest.approx(1 / 3, rel=1e-5) and back[-1].norm == 'x, "y"'
    assert metrics_of(back) == ["bbox/AP"]


def test_what_is_not_finite_is_written_as_diverged(tmp_path):
    write_csv([row("BN", s, v) for s, v in ((1, math.inf), (2, math.nan))], tmp_path / "r.csv")
    back = read_csv(tmp_path / "r.csv")
    assert [r.status for r in back] == ["diverged"] * 2 and all(math.isnan(r.value) for r in back)


def test_csv_with_a_row_twice_or_in_another_encoding(rows, tmp_path):
    write_csv([*rows, row("GN", 1, 5.0)], tmp_path / "r.csv")
    with pytest.raises(DataError, match="line 14: a second row of bbox/AP for norm 'GN', seed 1"):
        read_csv(tmp_path / "r.csv")
    for broken in (b"\xff", b'"' + 200_000 * b"x"):
        write_csv(rows, tmp_path / "r.csv")
        with open(tmp_path / "r.csv", "ab") as file:
            file.write(broken)
        with pytest.raises(DataError, match="r.csv is not a CSV file in UTF-8: "):
            read_csv(tmp_path / "r.csv")


@pytest.mark.parametrize(
    "change, message",
    [(("done", "great"), "line 2: status 'great'"), (("28", "x"), "line 2: could not convert"),
     (("metric", "mtric"), "has the columns"), (("28", ""), "line 2: status 'done' with")],
)  # fmt: skip
def test_broken_csv(rows, tmp_path, change, message):
    write_csv(rows, tmp_path / "r.csv")
    text = (tmp_path / "r.csv").read_text().replace(*change, 1)
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "r.csv")
