"""The tool, from the study file to the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from refbn_d2.study.measure import check_study
from refbn_d2.study.results import read_csv
from refbn_d2.study.spec import load_study
from refbn_d2.utils.errors import RefBNError
from refbn_d2.utils.lock import locked

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/measure_generalization.py"


def measure(*arguments, **environment):
    """Run the tool; return its exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_dry_run_lists_the_commands(coco, content, written, tmp_path):
    content["evaluate"] = {"corruptions": {"names": ["fog"], "severities": [1]}}
    out = tmp_path / "out"
    code, commands, err = measure(
        "--study", written(content), "--output-dir", out, "--dry-run", "--only", "norm=GN,seed=2"
    )
    assert code == 0, err
    train, evaluate = commands.splitlines()
    assert train.startswith("python -m refbn_d2.engines --engine torchvision --config-file ")
    assert "MODEL.RESNETS.NORM GN" in train and "SEED 2" in train and "--eval-only" in evaluate
    assert not out.exists()


def test_an_error_is_one_line(coco, content, written):
    content["norms"]["GN"] = {"overrides": {"MODEL.RESNETS.NORM": "GM"}}
    code, _, err = measure("--study", written(content), "--dry-run")
    assert code == 1 and err.strip().count("\n") == 0
    assert "norm 'GN'" in err and "did you mean 'GN'?" in err


def test_a_second_program_in_the_folder_is_refused_by_one_line(coco, content, written, tmp_path):
    out = tmp_path / "out"
    with locked(out):
        code, _, err = measure("--study", written(content), "--output-dir", out)
    assert code == 1 and err.strip().count("\n") == 0
    assert f"{out} is in use by process {os.getpid()}" in err and "another --output-dir" in err


@pytest.mark.parametrize(
    "record, message",
    [("{", r"study\.json is broken .*; delete it"), ('{"study": "s"}', "holds the study 's', not")],
)
def test_the_record_of_the_folder(record, message, coco, content, written, tmp_path):
    (tmp_path / "study.json").write_text(record)
    with pytest.raises(RefBNError, match=message):
        check_study(load_study(written(content)), tmp_path)
    assert (tmp_path / "study.json").read_text() == record


@pytest.mark.detectron2
def test_a_study_on_detectron2(coco, content, written, tmp_path):
    """Both trainings and their evaluations run in Detectron2, and all metrics are there."""
    pytest.importorskip("detectron2.engine", reason="Detectron2 is not installed")
    content["overrides"] |= {"SOLVER.MAX_ITER": 2, "SOLVER.IMS_PER_BATCH": 2,
                             "SOLVER.AMP.ENABLED": False}  # fmt: skip
    content["seeds"] = [1]
    content["norms"] = {"BN": {}, "BRN": {"overrides": {"MODEL.RESNETS.NORM": "BRN"}}}
    content["conditions"] = {"2 domain": {"overrides": {"DATALOADER.BATCH_COMPOSITION": "domain"}}}
    content["evaluate"] = {"domains": True, "steps_to": {"total_loss": 100},
                           "corruptions": {"names": ["fog"], "severities": [1]}}  # fmt: skip
    study, out = written(content), tmp_path / "out"
    code, _, err = measure("--study", study, "--output-dir", out, "--engine", "detectron2")
    assert code == 0, err
    rows = read_csv(out / "results.csv")
    for norm in ("BN", "BRN"):
        own = {r.metric: r for r in rows if r.norm == norm}
        assert {"bbox/AP", "segm/AP@day", "bbox/AP@night", "bbox/AP~fog/1", "segm/mPC"} <= set(own)
        assert own["bbox/AP"].n == 8 and own["steps to total_loss 100"].value == 2
        assert "--engine detectron2 --only" in own["bbox/AP"].command
        log = out / "runs/2-domain" / norm / "seed1/log.txt"
        assert "detectron2 INFO: Rank of current process" in log.read_text()


@pytest.mark.slow
def test_the_smoke_study(tmp_path):
    """The study runs; a second call has nothing to do; another study is refused."""
    smoke = ROOT / "configs/studies/smoke.yaml"
    out = tmp_path / "out"
    code, _, err = measure("--study", smoke, "--output-dir", out, "--jobs", 2)
    assert code == 0, err
    rows = read_csv(out / "results.csv")
    runs = {(r.norm, r.seed) for r in rows}
    assert runs == {(n, s) for n in ("BN", "RefBN") for s in (1, 2, None)}
    metrics = {r.metric for r in rows if (r.norm, r.seed) == ("RefBN", 2)}
    assert {"bbox/AP", "segm/AP", "bbox/AP@noise", "bbox/AP~fog/3", "bbox/mPC"} <= metrics
    costs = {r.metric: r.value for r in rows if (r.norm, r.seed) == ("BN", None)}
    assert costs["time ratio"] == 1 and 0 < costs["seconds a step"] < 60
    assert 100 < costs["peak memory (MB)"] < 20_000
    assert json.loads((out / "results.json").read_text())["study"] == "smoke"
    assert "data:image/png;base64," in (out / "report.html").read_text()
    code, _, err = measure("--study", smoke, "--output-dir", out)
    assert code == 0 and "4 already done, 0 to run" in err
    assert read_csv(out / "results.csv") == rows
    changed = out.parent / "smoke.yaml"
    text = smoke.read_text().replace("BASE_LR: 0.01", "BASE_LR: 0.02")
    changed.write_text(text.replace("../quickstart", str(ROOT / "configs/quickstart")))
    code, _, err = measure("--study", changed, "--output-dir", out)
    assert code == 1 and "SOLVER.BASE_LR: 0.01 there, 0.02 now" in err


@pytest.mark.slow
def test_a_classification_study(written, tmp_path):
    content = {
        "task": "classification",
        "config": str(ROOT / "configs/pretrain/shapes_resnet18_bn.yaml"),
        "overrides": {"SOLVER.EPOCHS": 1, "SOLVER.IMS_PER_BATCH": 32, "INPUT.SIZE": 32,
                      "INPUT.SIZE_TEST": 32},
        "data": {"train_images": 640, "test_images": 84},
        "seeds": [1],
        "norms": {"BN": {"overrides": {"MODEL.NORM": "BN"}}},
        "evaluate": {"domains": True, "steps_to": {"total_loss": 9},
                     "corruptions": {"names": ["contrast"], "severities": [1, 5], "images": 36}},
        "timing": {"rounds": 1, "steps": 20},
    }  # fmt: skip
    out = tmp_path / "out"
    code, _, err = measure("--study", written(content, "tiny"), "--output-dir", out)
    assert code == 0, err
    values = {r.metric: r for r in read_csv(out / "results.csv")}
    assert 0 < values["error"].value <= 100 and values["error"].n == 84
    domains = [r for name, r in values.items() if name.startswith("error@")]
    assert len(domains) == 7 and sum(r.n for r in domains) == 84
    mean = sum(r.value * r.n for r in domains) / 84
    assert mean == pytest.approx(values["error"].value, abs=0.01)
    two = [values[f"error~contrast/{s}"].value for s in (1, 5)]
    assert values["accuracy/mPC"].value == pytest.approx(100 - sum(two) / 2, abs=0.01)
    assert values["steps to total_loss 9"].value == 20
