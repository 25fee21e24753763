"""Run scripts as a user runs them. Importing this module skips a test without Detectron2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refbn_d2.checkpoint.files import load_checkpoint

detectron2 = pytest.importorskip("detectron2", reason="Detectron2 is not installed")

ROOT = Path(__file__).parents[1]
THEIRS = Path(detectron2.__file__).parent.parent / "tools"


def call(script, tmp_path, *arguments, **environment):
    """Run a script as a process; its output, both streams."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def weights(path):
    return load_checkpoint(path)["model"]


needs_tools = pytest.mark.skipif(
    not (THEIRS / "train_net.py").is_file(), reason="Detectron2 is installed without its tools/"
)
