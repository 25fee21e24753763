"""What the tests of the shapes share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import refbn_d2

SIZE = (128, 128)
SMALL = {"seed": 3, "num_train": 28, "num_val": 14}


def load(folder, name="val"):
    return json.loads((folder / "annotations" / f"instances_{name}.json").read_text())


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(root, *more):
    env = {**os.environ, "PYTHONPATH": str(Path(refbn_d2.__file__).parents[1])}
    argv = [sys.executable, "-m", "refbn_d2.data.shapes", "--root", str(root), "--seed", "3"]
    argv += ["--train", "28", "--val", "14", *more]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
