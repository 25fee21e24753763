"""Run a pretraining from command-line arguments."""

import argparse

from refbn_d2.config import refbn_options
from refbn_d2.config.pretrain import check_pretrain_config, get_pretrain_cfg
from refbn_d2.config.resume import FREE_IN_PRETRAINING
from refbn_d2.pretrain.trainer import evaluate, train
from refbn_d2.training.main import run_lock, run_training
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.distributed import launch


def run(args: argparse.Namespace) -> dict[str, float]:
    """Do what `tools/pretrain_imagenet.py` does; see its `--help` for `args`.

    Raises:
        RefBNError, OSError: something that the user can fix.
        SystemExit: interrupted (128 + signal).
    """
    cfg = get_pretrain_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    check_pretrain_config(cfg)
    refbn_options(cfg)
    cfg.freeze()
    with run_lock(cfg.OUTPUT_DIR, args):
        return launch(
            run_training, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url,
            cfg.MODEL.DEVICE,
            (cfg, train, evaluate, FREE_IN_PRETRAINING, args.resume, args.eval_only),
        )  # fmt: skip
