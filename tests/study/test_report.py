"""The pages made from results."""

import html as html_module
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from refbn_d2.study.report import About, html, main, markdown, meaning, results_page
from refbn_d2.study.results import Row, write_csv
from refbn_d2.utils.errors import DataError

ROOT = Path(__file__).parents[2]
ABOUT = About("s", "A <study>", "BN", "Of a test.", "python tools/x.py", {"GN": "groups"})


@pytest.fixture
def rows():
    made = []
    for norm, first in (("BN", 20.0), ("GN", 22.0)):
        for seed in (1, 2, 3):
            command = f"python tools/x.py --only norm={norm},seed={seed}"
            for metric in ("bbox/AP", "bbox/AP@night", "bbox/AP~fog/3", "bbox/mPC"):
                value = first + 0.1 * seed * seed * (norm == "BN")
                made.append(Row("s", norm, seed, "c", metric, value, 9, "done", command))
        made.append(Row("s", norm, None, "c", "seconds a step", 0.5, 3, "done", "x"))
    made.append(Row("s", "CBN", 1, "c", "bbox/AP", math.nan, 0, "diverged", "y"))
    return made


def test_markdown(rows):
    page = markdown(rows, ABOUT)
    assert page.startswith("## A <study>, `s`\n\nOf a test.")
    assert "| GN | 22.0 ± 0.00 (n 3) |" in page and "| CBN | 1 diverged |" in page
    assert "| GN | +1.53 [" in page and "Holm" in page and "AP~fog" not in page
    assert "| BN | 0.50 |" in page and "night" not in page
    assert "- GN: groups" in page


def test_markdown_leaves_out_what_was_not_begun(rows):
    for condition in ("c", "d"):
        rows.append(Row("s", "BRN", 1, condition, "bbox/AP", math.nan, 0, "not run", "z"))
    rows.append(Row("s", "BN", 4, "c", "bbox/AP", math.nan, 0, "not run", "z"))
    page = markdown(rows, ABOUT)
    assert "Not run yet under 'c': BRN." in page and "Not run yet under 'd': BRN." in page
    assert "| BRN" not in page and "| norm | c |\n" in page and "(n 3), 1 not run |" in page


def test_html_is_one_file_with_everything(rows):
    compared = {"norm": "GN", "condition": "c", "metric": "bbox/AP", "difference": 1.5}
    numbers = {"interval": (0.5, 2.5), "p_value": 0.01, "p_holm": 0.02, "n_images": 9, "seeds": 3}
    bootstrap = [compared | numbers]
    page = html(rows, ABOUT, {"Loss": "data:image/png;base64,AAAA"}, bootstrap)
    assert "<h1>A &lt;study&gt;</h1>" in page
    assert "http" not in page.replace("http-equiv", "") and "data:image/png;base64,AAAA" in page
    text = html_module.unescape(page)
    for part in ("1 diverged", "22.0 ± 0.00 (n 3)", "[0.50, 2.50]", "fog/3", "seconds a step",
                 "--only norm=GN,seed=3", "(baseline)", "on the domain night"):  # fmt: skip
        assert part in text, part


def test_the_page_of_committed_results_is_up_to_date():
    """docs/results.md is what the command in it writes."""
    folder = ROOT / "docs/results"
    page = results_page(sorted(folder.glob("*.csv")), (folder / "answers.md").read_text())
    assert (ROOT / "docs/results.md").read_text() == page


def test_the_command(rows, tmp_path):
    write_csv(rows, tmp_path / "s.csv")
    about = vars(ABOUT) | {"title": "Title beside the rows"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(about))
    command = [sys.executable, "-m", "refbn_d2.study.report", str(tmp_path / "s.csv"), "--output",
               str(tmp_path / "page.md")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert "## Title beside the rows, `s`\n" in page and "| GN | 22.0 ± 0.00 (n 3) |" in page


def test_an_output_that_is_an_input(rows, tmp_path, monkeypatch):
    file = str(tmp_path / "s.csv")
    write_csv(rows, file)
    before = Path(file).read_bytes()
    monkeypatch.setattr(sys, "argv", ["report", file, "--output", file])
    with pytest.raises(SystemExit, match=r"s\.csv is also an input"):
        main()
    assert Path(file).read_bytes() == before


def test_files_that_cannot_be(rows, tmp_path):
    write_csv([*rows, Row("t", "BN", 1, "c", "m", 1.0, 1, "done", "")], tmp_path / "s.csv")
    with pytest.raises(DataError, match=r"2 studies \['s', 't'\]"):
        results_page([tmp_path / "s.csv"])
    write_csv(rows, tmp_path / "s.csv")
    (tmp_path / "s.yaml").write_text("titel: x")
    with pytest.raises(DataError, match="s.yaml: .*titel"):
        results_page([tmp_path / "s.csv"])


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "s.yaml holds None; write"),
        (b"- a", r"s.yaml holds \['a'\]; write"),
        (b"text: [", "s.yaml is not valid YAML"),
        (b"text: \xff", "s.yaml is not in UTF-8"),
        (b"text:", "s.yaml, text: is None; write a text"),
        (b"norms: [GN]", r"s.yaml, norms: is \['GN'\]; write lines"),
        (b"study: t", "s.yaml is of the study 't', and .*s.csv of 's'"),
        (b"baseline: bn", "s.yaml, baseline: .*s.csv has no row of 'bn'; its norms: BN, GN, CBN"),
    ],
)
def test_a_yaml_file_that_cannot_be(rows, tmp_path, text, message):
    write_csv(rows, tmp_path / "s.csv")
    (tmp_path / "s.yaml").write_bytes(text)
    with pytest.raises(DataError, match=message) as raised:
        results_page([tmp_path / "s.csv"])
    assert "\n" not in str(raised.value)


def test_a_study_twice(rows, tmp_path):
    files = [tmp_path / "s.csv", tmp_path / "t.csv"]
    for file in files:
        write_csv(rows, file)
    with pytest.raises(DataError, match="s.csv and .*t.csv are both of the study 's'"):
        results_page(files)


def test_a_bar_in_a_name_does_not_end_a_cell(rows):
    rows.append(Row("s", "a|b", 1, "c", "bbox/AP", 9.0, 9, "done", ""))
    assert "| a\\|b | 9.00 (n 1) |" in markdown(rows, ABOUT)


def test_every_metric_has_a_meaning():
    assert meaning("segm/AP@night") == "average precision of masks (%), on the domain night"
    assert "fog/3" in meaning("error~fog/3") and "top-1 error" in meaning("error~fog/3")
    assert meaning("steps to total_loss 1.5") == "steps until total_loss first is at 1.5"
