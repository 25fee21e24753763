"""What adaptation changes in the detectors of a study."""

import subprocess
import sys

import pytest

from refbn_d2.study.adaptation import Adaptation, _earlier_rows, main
from refbn_d2.study.plan import Plan
from refbn_d2.study.results import Row, read_csv, write_csv
from refbn_d2.study.spec import load_study
from refbn_d2.utils.errors import ConfigError


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        capture_output=True, text=True,
    )  # fmt: skip


def test_a_study_without_finished_runs(coco, content, written, tmp_path):
    study = written(content)
    done = run("refbn_d2.study.adaptation", "--study", study, "--output-dir", tmp_path / "out")
    assert done.returncode == 1 and "no run that is done: run the study first" in done.stderr


@pytest.mark.parametrize("flag", ["--images=0", "--images=-1", "--prior-images=-1"])
def test_numbers_that_make_no_sense(flag, coco, content, written, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["adaptation", "--study", str(written(content)), flag])
    with pytest.raises(SystemExit, match="{} is {}; allowed: ".format(*flag.split("="))):
        main()


def test_a_study_without_ap(coco, content, written, monkeypatch):
    study = written(content | {"evaluate": {"metrics": ["bbox/AP50"]}})
    monkeypatch.setattr(sys, "argv", ["adaptation", "--study", str(study)])
    with pytest.raises(SystemExit, match=r"mine.yaml: adaptation needs bbox/AP or segm/AP in eval"):
        main()


def test_results_of_other_options_are_left_alone(tmp_path):
    (tmp_path / "results.yaml").write_text("images: 4")
    write_csv(
        [Row("mine", "BN", 1, "all", "bbox/AP", 20.0, 8, "done", "x")], tmp_path / "results.csv"
    )
    assert len(_earlier_rows(tmp_path, "images: 4")) == 1
    with pytest.raises(
        ConfigError, match="results.csv has the results of other options.*move both"
    ):
        _earlier_rows(tmp_path, "images: 7")


@pytest.mark.slow
def test_domains_and_corruptions(coco, content, written, tmp_path):
    content["overrides"] |= {
        "MODEL.FPN.NORM": "", "MODEL.ROI_MASK_HEAD.NORM": "", "SOLVER.MAX_ITER": 2,
        "SOLVER.IMS_PER_BATCH": 2, "INPUT.MIN_SIZE_TRAIN": [64], "INPUT.MIN_SIZE_TEST": 64,
    }  # fmt: skip
    content |= {
        "seeds": [1],
        "conditions": {"all": {}, "by day": {"hold_out": "night"}},
        "evaluate": {"metrics": ["bbox/AP"], "domains": True,
                     "corruptions": {"names": ["fog"], "severities": [1], "images": 4}},
    }  # fmt: skip
    out, study = tmp_path / "out", written(content)
    done = run("refbn_d2.study", "--study", study, "--output-dir", out, "--jobs", 2)
    assert done.returncode == 0, done.stderr
    adapt = "refbn_d2.study.adaptation", "--study", study, "--output-dir", out
    done = run(*adapt, "--images", 7)
    assert done.returncode == 1 and "night has 6 training pictures" in done.stderr
    for _ in range(2):  # the second time from the files of the first
        done = run(*adapt, "--images", 4)
        assert done.returncode == 0, done.stderr
        rows = read_csv(out / "adaptation/results.csv")
    done = run(*adapt, "--images", 4, "--only", "norm=GN,condition=by day")
    assert done.returncode == 0, done.stderr
    assert read_csv(out / "adaptation/results.csv") == rows  # and not those of GN alone
    assert all("--images 4 --only" in row.command for row in rows)
    targets = {r.condition: r.n for r in rows}
    assert targets == {"all: fog/1": 4, "all: same camera": 8, "by day: night": 4}
    assert {r.norm for r in rows} == {"BN", "BN, N = 16", "BN, N = 0", "GN"}
    value = {(r.norm, r.condition, r.metric): r.value for r in rows}
    measured = {(r.norm, r.condition, r.metric): r.value for r in read_csv(out / "results.csv")}
    for (norm, condition, metric), ap in value.items():
        if metric.endswith("gain"):
            before = value[norm.partition(",")[0], condition, "bbox/AP"]
            assert ap == pytest.approx(value[norm, condition, "bbox/AP"] - before, abs=1e-4)
    assert value["BN", "by day: night", "bbox/AP"] == measured["BN", "by day", "bbox/AP@night"]
    assert value["GN", "all: fog/1", "bbox/AP"] == measured["GN", "all", "bbox/AP~fog/1"]
    content["evaluate"]["domains"] = False
    written(content)
    done = run(*adapt, "--images", 4)
    assert done.returncode == 1 and "by day/1 has no bbox/AP@night: the adapt" in done.stderr
    plan = Plan(load_study(study), out, "torchvision")
    (job,) = [job for job in plan.runs if (job.norm, job.condition) == ("BN", "by day")]
    pictures = Adaptation(plan, plan.sets, job, 4, [0])._training_pictures()
    assert [file.name for file in pictures] == [
        "2.png",
        "3.png",
        "6.png",
        "7.png",
        "10.png",
        "11.png",
    ]
