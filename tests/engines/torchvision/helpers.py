"""Runs of the torchvision engine, in this process and as a user starts them."""

from pathlib import Path

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.config.resume import FREE_IN_DETECTION
from refbn_d2.engines.torchvision.trainer import evaluate, train
from refbn_d2.training.main import run_training
from tests.trainers import start_tool


def run(cfg, *overrides, resume=False, eval_only=False):
    cfg = cfg.clone()
    cfg.merge_from_list(list(overrides))
    return run_training(cfg, train, evaluate, FREE_IN_DETECTION, resume, eval_only)


def weights(output_dir, name="model_final"):
    return load_checkpoint(Path(output_dir) / f"{name}.pth")["model"]


def start(cfg, tmp_path, *arguments, **options):
    engine = ("--engine", "torchvision")
    return start_tool("train_net.py", cfg, tmp_path, *engine, *arguments, **options)
