"""Runs of the torchvision engine, in this process and as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.config.resume import FREE_IN_DETECTION
from refbn_d2.engines.torchvision.trainer import evaluate, train
from refbn_d2.training.main import run_training

ROOT = Path(__file__).parents[3]


def run(cfg, *overrides, resume=False, eval_only=False):
    cfg = cfg.clone()
    cfg.merge_from_list(list(overrides))
    return run_training(cfg, train, evaluate, FREE_IN_DETECTION, resume, eval_only)


def weights(output_dir, name="model_final"):
    return load_checkpoint(Path(output_dir) / f"{name}.pth")["model"]


def start(cfg, tmp_path, *arguments, launcher=(), **options):
    config_file = tmp_path / "config.yaml"
    config_file.write_text(cfg.dump())
    command = [*(launcher or [sys.executable]), str(ROOT / "tools/train_net.py")]
    command += ["--config-file", str(config_file), "--engine", "torchvision", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, **options)
