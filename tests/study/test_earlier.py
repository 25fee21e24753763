"""Runs that an earlier session's CSV holds are not repeated, and stay in the table."""

import math
from pathlib import Path

import pytest
import yaml

from refbn_d2.study.earlier import earlier_results
from refbn_d2.study.fingerprint import code_hash
from refbn_d2.study.measure import rows_of
from refbn_d2.study.plan import Plan
from refbn_d2.study.results import Row, write_csv
from refbn_d2.study.spec import load_study
from refbn_d2.utils.errors import ConfigError

DONE = Row("mine", "BN", 1, "two iid", "bbox/AP", 20.0, 8, "done", "x")
DIVERGED = Row("mine", "GN", 1, "two iid", "bbox/AP", math.nan, 0, "diverged", "x")
FAILED = Row("mine", "GN", 2, "two iid", "bbox/AP", math.nan, 0, "failed", "x")
COST = Row("mine", "GN", None, "two iid", "seconds a step", 0.5, 3, "done", "x")


@pytest.fixture
def study(coco, content, written):
    return load_study(written(content))


def results(tmp_path, rows, code):
    write_csv(rows, tmp_path / "results.csv")
    about = {"study": "mine", "title": "Mine", "baseline": "BN", "code": code}
    (tmp_path / "results.yaml").write_text(yaml.safe_dump(about))
    return tmp_path / "results.csv"


def test_runs_that_ended_are_done_and_stay_in_the_table(study, tmp_path):
    file = results(tmp_path, [DONE, DIVERGED, FAILED, COST], code_hash())
    earlier = earlier_results(file, study)
    assert list(earlier) == [("BN", "two iid", 1), ("GN", "two iid", 1)]
    plan = Plan(study, Path("out"), "torchvision")
    left = [("BN", "two iid", 2), ("GN", "two iid", 2)]
    assert [job.run for job in plan.jobs(done=earlier)] == left
    values = {(r.norm, r.seed): r.status for r in rows_of(plan, earlier) if r.metric == "bbox/AP"}
    assert values == {
        ("BN", 1): "done", ("GN", 1): "diverged", ("BN", 2): "not run", ("GN", 2): "not run",
    }  # fmt: skip


def test_results_of_other_code_need_its_name(study, tmp_path):
    file = results(tmp_path, [DONE], "0123456789abcdef")
    with pytest.raises(ConfigError, match=f"code 0123456789abcdef, and this is {code_hash()}.*add"):
        earlier_results(file, study)
    with pytest.raises(ConfigError, match="--same-code 0123456789abcdef"):
        earlier_results(file, study, "1" * 16)
    assert list(earlier_results(file, study, "0123456789abcdef")) == [("BN", "two iid", 1)]


@pytest.mark.parametrize("change", [{"norm": "CBN"}, {"seed": 3}, {"condition": "one"}])
def test_a_run_that_the_study_does_not_have(study, tmp_path, change):
    row = Row(**vars(DONE) | change)
    file = results(tmp_path, [row], code_hash())
    with pytest.raises(ConfigError, match="has the run .*which .*mine.yaml does not have"):
        earlier_results(file, study)


def test_another_study(study, tmp_path):
    file = results(tmp_path, [Row(**vars(DONE) | {"study": "theirs"})], code_hash())
    about = {"study": "theirs", "title": "", "baseline": "BN", "code": code_hash()}
    (tmp_path / "results.yaml").write_text(yaml.safe_dump(about))
    with pytest.raises(ConfigError, match="has the study 'theirs', not 'mine'"):
        earlier_results(file, study)
