"""The engine for machines without Detectron2: its numerics and names on torchvision's operators."""

import argparse

from refbn_d2.config import get_cfg, refbn_options
from refbn_d2.engines.torchvision.supported import check_supported
from refbn_d2.engines.torchvision.trainer import main
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.distributed import launch


def run(args: argparse.Namespace):
    """What `tools/train_net.py` does on this engine; see its `--help` for `args`."""
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    check_supported(cfg)
    refbn_options(cfg)
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    return launch(
        main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, cfg.MODEL.DEVICE,
        (cfg, args.resume, args.eval_only, args.allow_partial_weights),
    )  # fmt: skip
