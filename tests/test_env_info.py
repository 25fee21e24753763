"""python -m refbn_d2.env_info prints what a bug report needs, whatever is broken."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def report(tmp_path, *path, **environment):
    """Return {name: value} of a report, with the folders of `path` before all others."""
    path = os.pathsep.join([*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "refbn_d2.env_info"], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.partition("\n\n")[0].splitlines()
    return {line[:22].strip(): line[22:] for line in lines}


def test_versions_and_places(tmp_path):
    found = report(tmp_path, DETECTRON2_DATASETS="here")
    assert found["torch"].startswith(f"{torch.__version__} ({Path(torch.__file__).parent}")
    assert found["Python"].endswith(f"({sys.executable})")
    assert found["refbn_d2"].endswith(f"{ROOT / 'refbn_d2'})")
    pillow = f"{importlib.metadata.version('pillow')} (pillow, "
    assert found["PIL"].lower().startswith(pillow)  # Pillow, before 10
    assert "(opencv" in found["cv2"] and found["DETECTRON2_DATASETS"] == "here"
    assert found["--engine auto"].startswith("Engine: ")


def test_broken_packages_and_two_of_opencv(tmp_path):
    for name, code in {
        "timm": "raise SystemExit('no timm\\nhere')", "scipy": "1 / 0", "jinja2": "import nothing_",
        "detectron2": "raise OSError('libcudart.so')",
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    for name in ("opencv_python", "opencv_contrib_python"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "top_level.txt").write_text("cv2\n")
    found = report(tmp_path, tmp_path)
    assert "opencv_contrib_python and opencv_python, which overwrite each other" in found["cv2"]
    assert found["timm"] == "SystemExit: no timm here"
    assert found["scipy"] == "ZeroDivisionError: division by zero"
    assert found["jinja2"] == "ModuleNotFoundError: No module named 'nothing_'"
    assert found["detectron2"] == found["plugin"] == "OSError: libcudart.so"
    assert found["--engine auto"] == "Engine: torchvision's operators (libcudart.so)."


@pytest.mark.detectron2
def test_with_detectron2(tmp_path):
    detectron2 = pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    found = report(tmp_path)
    assert found["Detectron2"].startswith(f"{detectron2.__version__} (")
    assert found["RefBN in Detectron2"] == "registered"
    assert found["--engine auto"] == "Engine: Detectron2."
