"""Run the pretraining, in this process and as a user starts it."""

import json
from pathlib import Path

from refbn_d2.checkpoint import load_checkpoint
from refbn_d2.config.resume import FREE_IN_PRETRAINING
from refbn_d2.pretrain.trainer import Trainer, evaluate, train
from refbn_d2.training.main import run_training
from tests.trainers import start_tool

ALL_AT_ONCE = [
    "MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.8, "MODEL.DROP_PATH_RATE", 0.2,
    "INPUT.MIXUP_ALPHA", 0.4, "INPUT.CUTMIX_ALPHA", 1.0, "INPUT.RANDOM_ERASING", 0.5,
    "INPUT.AUTO_AUGMENT", "rand-m7-mstd0.5-inc1", "SOLVER.GRAD_ACCUM_STEPS", 2,
    "SOLVER.LABEL_SMOOTHING", 0.1, "SOLVER.AMP.ENABLED", True,
]  # fmt: skip


def run(cfg, *overrides, resume=False, eval_only=False):
    cfg = cfg.clone()
    cfg.merge_from_list(list(overrides))
    return run_training(cfg, train, evaluate, FREE_IN_PRETRAINING, resume, eval_only)


def trainer(cfg, *overrides):
    cfg.merge_from_list([*overrides])
    out = Path(cfg.OUTPUT_DIR)
    out.mkdir(exist_ok=True)
    return Trainer(cfg, out)


def final(output_dir, key="model"):
    return load_checkpoint(Path(output_dir) / "model_final.pth")[key]


def metrics(cfg):
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def start(cfg, tmp_path, *arguments, **options):
    return start_tool("pretrain_imagenet.py", cfg, tmp_path, *arguments, **options)
