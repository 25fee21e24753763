"""Each tool ends with one line for an error that a user can fix."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from refbn_d2.data.shapes.dataset import make_classification

ROOT = Path(__file__).parents[2]


@pytest.fixture
def failing(monkeypatch):
    """Return a function that runs a tool as `__main__` and returns its exit message."""

    def run(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        with pytest.raises(SystemExit) as error:
            runpy.run_path(str(ROOT / tool), run_name="__main__")
        assert isinstance(error.value.code, str) and "\n" not in error.value.code
        return error.value.code

    return run


def test_convert_checkpoint(failing, tmp_path):
    nowhere = tmp_path / "nowhere.pth"
    for arguments in (
        ("--inspect", nowhere),
        (nowhere, tmp_path / "new.pth", "--to", "detectron2"),
    ):
        line = failing("tools/convert_checkpoint.py", *arguments)
        assert line.startswith("FileNotFoundError: ") and str(nowhere) in line
    nowhere.write_bytes(b"no checkpoint")
    line = failing("tools/convert_checkpoint.py", "--inspect", nowhere)
    assert line.startswith("CheckpointError: ") and str(nowhere) in line


def test_adapt_reference(failing, tmp_path):
    arguments = ["--config-file", "x.yaml", "--weights", "x.pth", "--output", tmp_path / "new.pth"]
    line = failing("tools/adapt_reference.py", *arguments, "--images", tmp_path / "nowhere")
    assert line.startswith("FileNotFoundError: ") and str(tmp_path / "nowhere") in line


def test_quickstart(failing, tmp_path):
    step = {"command": ["-m", "other"], "seconds": 1.0, "done": True, "output": ""}
    (tmp_path / "steps.json").write_text(json.dumps({"detection": step}))
    line = failing("tools/quickstart", "--output-dir", tmp_path)
    assert line.startswith("ConfigError: ") and "quickstart with other commands" in line


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is not None, reason="it is installed")
@pytest.mark.parametrize("tool", ["lazyconfig_train_net.py", "train_net.py"])
def test_without_detectron2(failing, tmp_path, tool):
    engine = ["--engine", "detectron2"] if tool == "train_net.py" else []
    line = failing(f"tools/{tool}", "--config-file", tmp_path / "any.py", *engine)
    assert line.startswith("MissingDependencyError: Detectron2 cannot be imported")


def test_two_workers_say_it_once(tmp_path):
    """The parent process prints the error; the workers' tracebacks are in log.txt."""
    pytest.importorskip("timm")
    data = make_classification(tmp_path / "data", size=32, num_train=24, num_val=12)
    command = [
        sys.executable, "-W", "ignore", "tools/pretrain_imagenet.py", "--config-file",
        "configs/pretrain/shapes_resnet18_bn.yaml", "--num-gpus", "2", "MODEL.DEVICE", "cpu",
        "MODEL.WEIGHTS", str(tmp_path / "nowhere.pth"), "OUTPUT_DIR", str(tmp_path),
        "DATASETS.ROOT", str(data),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    said = [line for line in lines if "nowhere.pth" in line]
    assert len(said) == 1 and said[0] == lines[-1]
    assert said[0].startswith("FileNotFoundError: ")
    assert "Traceback" not in "\n".join(lines)
    assert "Traceback" in (tmp_path / "log.txt").read_text()
