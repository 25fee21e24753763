"""Runs that an earlier session's CSV holds are not repeated, and stay in the table."""

import math
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from refbn_d2.study.earlier import earlier_results
from refbn_d2.study.fingerprint import code_hash
from refbn_d2.study.measure import measure, rows_of
from refbn_d2.study.plan import Plan
from refbn_d2.study.results import Row, read_csv, write_csv
from refbn_d2.study.runner import Record, Runner
from refbn_d2.study.spec import load_study
from refbn_d2.utils.errors import ConfigError

DONE = Row("mine", "BN", 1, "two iid", "bbox/AP", 20.0, 8, "done", "x")
DIVERGED = Row("mine", "GN", 1, "two iid", "bbox/AP", math.nan, 0, "diverged", "x")
FAILED = Row("mine", "GN", 2, "two iid", "bbox/AP", math.nan, 0, "failed", "x")
FOG = {"names": ["fog"], "severities": [1]}
COST = Row("mine", "GN", None, "two iid", "seconds a step", 0.5, 3, "done", "x")


@pytest.fixture
def plan_of(coco, content, written, tmp_path):
    """Return a function that returns the plan of the study with changes."""

    def plan(**changes):
        changed = {"evaluate": {"metrics": ["bbox/AP"]}, **changes}
        return Plan(load_study(written(content | changed)), tmp_path / "out", "torchvision")

    return plan


@pytest.fixture
def plan(plan_of):
    return plan_of()


def results(tmp_path, rows, code, **more):
    write_csv(rows, tmp_path / "results.csv")
    norm = rows[0].norm
    about = {"study": "mine", "title": "Mine", "baseline": norm, "code": code, **more}
    (tmp_path / "results.yaml").write_text(yaml.safe_dump(about))
    return tmp_path / "results.csv"


def test_runs_that_ended_are_done_and_stay_in_the_table(plan, tmp_path):
    file = results(tmp_path, [DONE, DIVERGED, FAILED, COST], code_hash())
    earlier = earlier_results(file, plan)
    assert list(earlier) == [("BN", "two iid", 1), ("GN", "two iid", 1)]
    left = [("BN", "two iid", 2), ("GN", "two iid", 2)]
    assert [job.run for job in plan.jobs(done=earlier)] == left
    values = {(r.norm, r.seed): r.status for r in rows_of(plan, earlier) if r.metric == "bbox/AP"}
    assert values == {
        ("BN", 1): "done", ("GN", 1): "diverged", ("BN", 2): "not run", ("GN", 2): "not run",
    }  # fmt: skip


def test_results_of_other_code_need_its_name(plan, tmp_path):
    file = results(tmp_path, [DONE], "0123456789abcdef")
    with pytest.raises(ConfigError, match=f"code 0123456789abcdef, and this is {code_hash()}.*add"):
        earlier_results(file, plan)
    with pytest.raises(ConfigError, match="--same-code 0123456789abcdef"):
        earlier_results(file, plan, "1" * 16)
    assert list(earlier_results(file, plan, "0123456789abcdef")) == [("BN", "two iid", 1)]


def test_a_norm_that_was_not_run_may_have_left_the_study(plan, tmp_path):
    gone = Row(**vars(DONE) | {"norm": "CBN", "value": math.nan, "status": "not run"})
    file = results(tmp_path, [DONE, gone], code_hash())
    assert list(earlier_results(file, plan)) == [("BN", "two iid", 1)]


@pytest.mark.parametrize("change", [{"norm": "CBN"}, {"seed": 3}, {"condition": "one"}])
def test_a_run_that_the_study_does_not_have(plan, tmp_path, change):
    row = Row(**vars(DONE) | change)
    file = results(tmp_path, [row], code_hash())
    with pytest.raises(ConfigError, match="has the run .*which .*mine.yaml does not have"):
        earlier_results(file, plan)


def test_another_study(plan, tmp_path):
    file = results(tmp_path, [Row(**vars(DONE) | {"study": "theirs"})], code_hash())
    about = {"study": "theirs", "title": "", "baseline": "BN", "code": code_hash()}
    (tmp_path / "results.yaml").write_text(yaml.safe_dump(about))
    with pytest.raises(ConfigError, match="has the study 'theirs', not 'mine'"):
        earlier_results(file, plan)


def test_results_of_unknown_code(plan, tmp_path):
    file = results(tmp_path, [DONE], "")
    with pytest.raises(ConfigError, match="results.yaml has no `code`.*run without --have"):
        earlier_results(file, plan)
    (tmp_path / "results.yaml").unlink()
    with pytest.raises(ConfigError, match="needs the file .*results.yaml"):
        earlier_results(file, plan)


def test_runs_with_other_settings(plan_of, content, tmp_path, capsys):
    file = results(tmp_path, [DONE, FAILED], code_hash(), settings=plan_of().settings())
    assert len(earlier_results(file, plan_of(seeds=[1, 2, 3]))) == 1
    assert capsys.readouterr().err == ""
    norms = content["norms"] | {"GN": {"overrides": {"MODEL.RESNETS.NORM": "RefBN"}}}
    assert len(earlier_results(file, plan_of(norms=norms))) == 1  # GN has no finished run
    changed = plan_of(overrides=content["overrides"] | {"SOLVER.BASE_LR": 0.3})
    with pytest.raises(ConfigError, match="norm=BN,seed=1,condition=two iid was made with other"):
        earlier_results(file, changed)
    file = results(tmp_path, [DONE], code_hash())  # by a version that wrote no settings
    assert len(earlier_results(file, changed)) == 1
    assert capsys.readouterr().err.count("Warning: ") == 1


SHAPES = str(Path(__file__).parents[2] / "configs/pretrain/shapes_resnet18_bn.yaml")
PRETRAINED = {  # changes of the study
    "pretrain": {"config": SHAPES},
    "norms": {
        "BN": {},
        "GN": {"pretrain": {"MODEL.NORM": "GN"}, "overrides": {"MODEL.RESNETS.NORM": "GN"}},
    },
}


def test_settings_do_not_depend_on_the_code(plan_of, monkeypatch):
    before = plan_of(**PRETRAINED).settings()
    assert list(before) == ["norm=BN,condition=two iid", "norm=GN,condition=two iid"]
    assert len(set(before.values())) == 2
    monkeypatch.setattr("refbn_d2.study.plan.code_hash", lambda: "other")
    assert plan_of(**PRETRAINED).settings() == before
    epochs = PRETRAINED | {"pretrain": {"config": SHAPES, "overrides": {"SOLVER.EPOCHS": 7}}}
    assert not set(plan_of(**epochs).settings().values()) & set(before.values())


def test_runs_that_lack_a_metric_are_repeated(plan_of, tmp_path, capsys):
    file = results(tmp_path, [DONE, DIVERGED], code_hash())
    for evaluate, lacking in (
        ({"metrics": ["bbox/AP", "segm/AP"]}, "segm/AP"),
        ({"metrics": ["bbox/AP"], "steps_to": {"total_loss": 1.5}}, "steps to total_loss 1.5"),
        ({"metrics": ["bbox/AP"], "domains": True}, "bbox/AP@<domain>"),
        ({"metrics": ["bbox/AP"], "corruptions": FOG}, "bbox/AP~fog/1"),
    ):
        earlier = earlier_results(file, plan_of(evaluate=evaluate))
        assert list(earlier) == [("GN", "two iid", 1)]  # it diverged
        assert f"1 runs of {file} are repeated: they have no {lacking}." in capsys.readouterr().err


def test_a_record_in_the_folder_does_not_hide_a_run(plan, tmp_path):
    file = results(tmp_path, [DONE], code_hash())
    earlier = earlier_results(file, plan)
    record = Record(plan.runs[0])
    measured = {"bbox/AP": [30.0, 8, "done"]}
    evaluate = vars(plan.study.evaluate)
    for content, value in (
        ({"status": "failed"}, 20.0),
        ({"status": "done", "recipe": {"code": "of before"}}, 20.0),
        ({"status": "done", "evaluate": evaluate, "measured": measured}, 30.0),
    ):
        record.write(**content)
        first = next(iter(rows_of(plan, earlier)))
        assert (first.norm, first.seed, first.value) == ("BN", 1, value)


@pytest.fixture
def call(plan_of, tmp_path, monkeypatch):
    """Return a function that runs the study, without its jobs."""
    monkeypatch.setattr(Runner, "run", lambda self: None)

    def call(have="", only="", **changes):
        study = plan_of(**changes).study.file
        measure(Namespace(study=study, output_dir=tmp_path / "out", jobs=1, only=only, engine="",
                          have=have, same_code="", dry_run=False))  # fmt: skip

    return call


def test_a_record_of_other_code_stops_the_study_before_its_runs(plan, call, monkeypatch):
    def run(self):
        raise AssertionError("started")

    monkeypatch.setattr(Runner, "run", run)
    Record(plan.runs[2]).write(status="done", recipe={"code": "of before"})
    with pytest.raises(ConfigError, match="seed2 holds run/BN/two iid/2 of another version"):
        call(only="seed=1")


def test_results_are_written_whatever_the_timing_does(call, plan_of, tmp_path, monkeypatch):
    changes = PRETRAINED | {
        "timing": {"rounds": 1, "conditions": ["day"]},
        "conditions": {"two iid": {}, "day": {"hold_out": "night", "norms": ["BN"]}},
        "seeds": [1],
    }
    rows = [Row(**vars(row) | {"condition": c, "value": 20.0, "status": "done"})
            for c, row in (("two iid", DONE), ("two iid", DIVERGED), ("day", DONE))]  # fmt: skip
    file = results(tmp_path, rows, code_hash())
    plan = plan_of(**changes)
    assert [job.kind for job in plan.jobs(done=earlier_results(file, plan))] == ["pretrain"]

    def fail(plan, gpus):
        assert plan.sets.train_set("night").json_file.exists()
        return {}, ["timing BN ended"]

    monkeypatch.setattr("refbn_d2.study.measure.measure_timing", fail)
    with pytest.raises(ChildProcessError, match="timing BN ended"):
        call(have=file, **changes)
    written = read_csv(tmp_path / "out/results.csv")
    assert len(written) == 3 and {row.value for row in written} == {20.0}
    about = yaml.safe_load((tmp_path / "out/results.yaml").read_text())
    assert about["settings"] == plan.settings()
    costs = {"day": {"BN": {"seconds a step": 0.5}}}
    monkeypatch.setattr("refbn_d2.study.measure.measure_timing", lambda plan, gpus: (costs, []))
    call(have=file, **changes)
    assert [row.value for row in read_csv(tmp_path / "out/results.csv")] == [20.0, 20.0, 20.0, 0.5]


def test_one_run_again_leaves_what_was_timed(call, content, tmp_path, monkeypatch):
    file, timing = results(tmp_path, [DONE], code_hash()), {"timing": {"rounds": 1}}
    monkeypatch.setattr("refbn_d2.study.timing._one", lambda plan, job, gpus: (0.5, 0.0))
    call(have=file, **timing)
    costs = [r for r in read_csv(tmp_path / "out/results.csv") if r.seed is None]
    assert [(r.metric, r.value) for r in costs] == [("seconds a step", 0.5), ("time ratio", 1)] * 2
    call(have=file, only="norm=BN,seed=1", **timing)
    assert [r for r in read_csv(tmp_path / "out/results.csv") if r.seed is None] == costs
    overrides = content["overrides"] | {"SOLVER.BASE_LR": 0.3}
    call(have=file, only="norm=BN,seed=1", overrides=overrides, **timing)
    assert not [r for r in read_csv(tmp_path / "out/results.csv") if r.seed is None]


def test_results_whose_runs_are_gone_are_not_replaced(call, tmp_path):
    (tmp_path / "out").mkdir()
    file = results(tmp_path / "out", [DIVERGED, DONE], code_hash())
    before = file.read_text()
    with pytest.raises(
        ConfigError, match="results.csv has the results of run/BN/two iid/1, but .*lost"
    ):
        call(only="norm=GN,seed=1")
    with pytest.raises(ConfigError, match="results of run/GN/two iid/1"):
        call(only="norm=BN,seed=1")
    assert file.read_text() == before


def test_a_norm_that_fails_leaves_the_costs_of_the_others(call, tmp_path, monkeypatch):
    file, timing = results(tmp_path, [DONE], code_hash()), {"timing": {"rounds": 2}}
    started = []

    def one(plan, job, gpus):
        started.append(job.norm)
        if job.norm == "GN" and len(started) > 2:
            raise ChildProcessError("timing GN ended with exit code 1")
        return 0.5, 0.0

    monkeypatch.setattr("refbn_d2.study.timing._one", one)
    for _ in range(2):  # the second time from the file that the message names
        with pytest.raises(ChildProcessError, match="^timing GN .*time it again, delete .*json.$"):
            call(have=file, **timing)
        assert started == ["BN", "GN"] * 2
        costs = [r for r in read_csv(tmp_path / "out/results.csv") if r.seed is None]
        measured = [("BN", "seconds a step"), ("BN", "time ratio")]
        assert [(r.norm, r.metric) for r in costs] == measured


def test_without_its_baseline_the_costs_have_no_ratio(call, tmp_path, monkeypatch):
    def one(plan, job, gpus):
        if job.norm == "BN":
            raise ChildProcessError("timing BN ended with exit code 1")
        return 0.5, 0.0

    monkeypatch.setattr("refbn_d2.study.timing._one", one)
    file = results(tmp_path, [DONE], code_hash())
    with pytest.raises(ChildProcessError, match="timing BN"):
        call(have=file, timing={"rounds": 2})
    costs = [r for r in read_csv(tmp_path / "out/results.csv") if r.seed is None]
    assert [(r.norm, r.metric) for r in costs] == [("GN", "seconds a step")]


def test_failures_of_runs_and_of_the_timing_are_both_told(call, plan_of, tmp_path, monkeypatch):
    def fail(self):
        record = self.records[self.jobs[0].id]
        record.write(status="failed", error="out of memory")

    def fail_too(plan, gpus):
        return {}, ["timing BN ended with exit code 1"]

    monkeypatch.setattr(Runner, "run", fail)
    monkeypatch.setattr("refbn_d2.study.measure.measure_timing", fail_too)
    monkeypatch.setattr("refbn_d2.study.measure.bootstrap", lambda plan: [])
    with pytest.raises(ChildProcessError, match="1 of 4 jobs failed.*out of memory.*timing BN"):
        measure(Namespace(study=plan_of(timing={"rounds": 1}).study.file, jobs=1, only="",
                          output_dir=tmp_path / "out", engine="", have="", same_code="",
                          dry_run=False))  # fmt: skip


def test_a_command_names_the_engine_that_was_asked_for(plan_of):
    plan = plan_of(timing={"rounds": 1})
    assert "--engine" not in next(iter(rows_of(plan, {}))).command
    plan.engine = "detectron2"
    words = shlex.split(next(iter(rows_of(plan, {}))).command)
    assert words[3:5] == ["--engine", "detectron2"] and words[5] == "--only"
