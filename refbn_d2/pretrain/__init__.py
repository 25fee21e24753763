"""Pretraining of image classifiers whose ResNets become Detectron2's backbones, on timm."""

import argparse

from refbn_d2.config import refbn_options
from refbn_d2.config.pretrain import check_pretrain_config, get_pretrain_cfg
from refbn_d2.pretrain.trainer import main
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.distributed import launch


def run(args: argparse.Namespace) -> dict[str, float]:
    """What `tools/pretrain_imagenet.py` does; see its `--help` for `args`."""
    cfg = get_pretrain_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    check_pretrain_config(cfg)
    refbn_options(cfg)
    cfg.freeze()
    return launch(
        main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, cfg.MODEL.DEVICE,
        (cfg, args.resume, args.eval_only),
    )  # fmt: skip
