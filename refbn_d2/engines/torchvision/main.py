"""Run a detector's config by torchvision's operators."""

import argparse
from functools import partial

from refbn_d2.config import get_cfg, refbn_options
from refbn_d2.config.checks import check_batch
from refbn_d2.config.resume import FREE_IN_DETECTION
from refbn_d2.engines.torchvision.data import check_datasets
from refbn_d2.engines.torchvision.supported import check_supported
from refbn_d2.engines.torchvision.trainer import evaluate, train
from refbn_d2.training.main import run_lock, run_training
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.distributed import launch, planned_world_size


def run(args: argparse.Namespace):
    """Do what `tools/train_net.py` does on this engine; see its `--help` for `args`.

    Raises:
        RefBNError, OSError: something that the user can fix.
        SystemExit: interrupted (128 + signal), or TEST.EXPECTED_RESULTS not reached (1).
    """
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    check_supported(cfg)
    refbn_options(cfg)
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    workers = planned_world_size(args.num_gpus, args.num_machines)
    if not args.eval_only:
        check_batch(cfg, workers)
    if workers > 1:  # a single worker reads the data itself, before it builds anything
        check_datasets(cfg, args.eval_only)
    jobs = [partial(job, allow_partial_weights=args.allow_partial_weights)
            for job in (train, evaluate)]  # fmt: skip
    with run_lock(cfg.OUTPUT_DIR, args):
        return launch(
            run_training, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url,
            cfg.MODEL.DEVICE, (cfg, *jobs, FREE_IN_DETECTION, args.resume, args.eval_only),
        )  # fmt: skip
