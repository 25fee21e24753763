"""Train a LazyConfig, as Detectron2's `tools/lazyconfig_train_net.py` does, with additions.

That script, unmodified, trains RefBN with the defaults (`refbn_d2.env`). Here a config may also
hold the options of MODEL.REFBN, with the lower-case names of `RefBNOptions`:

    refbn = dict(refresh="slice", num_images=64)

The run also draws `curves.png` and `samples.png`, stops if weights do not fit, and uses the CPU if
there is no GPU.
"""

import argparse
import functools
import logging
from dataclasses import fields
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_setup,
    default_writers,
    defaults,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from refbn_d2.config import ConfigError, RefBNOptions
from refbn_d2.config.refbn import LAYER_OPTIONS
from refbn_d2.engines.detectron2.datasets import check_datasets, repaired_datasets
from refbn_d2.engines.detectron2.processes import errors_explained, join_workers, setup_log
from refbn_d2.engines.detectron2.trainer import Checkpointer, Curves, draw_predictions
from refbn_d2.layers import has_refbn
from refbn_d2.plugin.hook import ReferenceBatchHook, unwrapped
from refbn_d2.training.main import run_lock
from refbn_d2.training.output_dir import check_not_overwritten
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.distributed import launch, planned_world_size

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """Do what `tools/lazyconfig_train_net.py` does; see its `--help` for `args`.

    Raises:
        ConfigError: `refbn` has an unknown option, or a value that is not allowed.
        FileExistsError: train.output_dir holds a run, and --resume is not given.
    """
    cfg = _config(args.config_file, tuple(args.opts))
    _options(cfg)
    for key in ("train.max_iter", "train.checkpointer.period"):
        value = OmegaConf.select(cfg, key)
        if value is not None and value <= 0 and not args.eval_only:
            raise ConfigError(f"{key} = {value}; allowed: a number above 0.")
    workers = planned_world_size(args.num_gpus, args.num_machines)
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if batch and batch % workers and not args.eval_only:
        raise ConfigError(
            f"dataloader.train.total_batch_size = {batch} cannot be split evenly over {workers} "
            f"workers; allowed: {workers}, {2 * workers}, {3 * workers}, ..."
        )
    if workers > 1:  # a single worker reads the data itself, before it builds anything
        train, test = _datasets(cfg)
        check_datasets(() if args.eval_only else train, test)
    with run_lock(cfg.train.output_dir, args):
        launch(
            _main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url,
            torch.device(cfg.train.device).type, (args,),
        )  # fmt: skip


@functools.cache  # spawned workers read the config again: it is a program, and may register data
def _config(file: str, overrides: tuple[str, ...]) -> DictConfig:
    cfg = LazyConfig.apply_overrides(LazyConfig.load(file), list(overrides))
    cfg.train.device = resolve_device(cfg.train.device)
    if cfg.train.amp.enabled and cfg.train.device == "cpu":
        logger.warning("train.amp needs CUDA in Detectron2: training in float32 on the CPU.")
        cfg.train.amp.enabled = False
    return cfg


def _datasets(cfg: DictConfig) -> list[tuple[str, ...]]:
    """The names that Detectron2's get_detection_dataset_dicts gets in training and in test."""
    parts = ("dataloader.train.dataset.names", "dataloader.test.dataset.names")
    found = (OmegaConf.select(cfg, part) or () for part in parts)
    return [(names,) if isinstance(names, str) else tuple(names) for names in found]


def _options(cfg: DictConfig) -> RefBNOptions | None:
    """Return the options in `refbn`, or None; layers keep their values of options not in it."""
    if "refbn" not in cfg:
        return None
    try:
        layers_own = dict.fromkeys(LAYER_OPTIONS)
        return RefBNOptions(**layers_own | OmegaConf.to_container(cfg.refbn))
    except TypeError as error:
        known = ", ".join(field.name for field in fields(RefBNOptions))
        raise ConfigError(f"refbn = {cfg.refbn}: {error}. Known options: {known}.") from error


def _main(args: argparse.Namespace) -> None:
    """Run in every worker."""
    cfg = _config(args.config_file, tuple(args.opts))
    join_workers(cfg.train.device, args)
    if not (args.resume or args.eval_only):
        check_not_overwritten(Path(cfg.train.output_dir))
    comm.synchronize()
    out = cfg.train.output_dir
    with errors_explained(out):
        default_setup(cfg, args)
        setup_log(out)
        train, test = _datasets(cfg)
        used = () if args.eval_only else train
        with repaired_datasets(used, test, out, train):
            _run(cfg, args)


def _run(cfg: DictConfig, args: argparse.Namespace) -> None:
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        model = defaults.create_ddp_model(model)
        checkpointer = Checkpointer(model, "", args.allow_partial_weights)
        checkpointer.load(cfg.train.init_checkpoint)
        _evaluate(cfg, model)
    else:
        _train(cfg, args, model)


def _train(cfg: DictConfig, args: argparse.Namespace, model: nn.Module) -> None:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = defaults.create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = Checkpointer(
        model, cfg.train.output_dir, args.allow_partial_weights, trainer=trainer
    )
    used = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.EvalHook(cfg.train.eval_period, lambda: _evaluate(cfg, model)),
    ]
    if has_refbn(model):
        used.append(ReferenceBatchHook(_options(cfg)))
    if comm.is_main_process():
        # The checkpoint comes before the evaluation, which may fail. The writers come after it.
        used.insert(2, hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        used.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
        used.append(Curves(cfg.train.output_dir, cfg.train.eval_period))
    trainer.register_hooks(used)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumed = args.resume and checkpointer.has_checkpoint()
    start_iter = trainer.iter + 1 if resumed else 0
    checkpointer.save_missing_final(start_iter, cfg.train.max_iter)
    trainer.train(start_iter, cfg.train.max_iter)


def _evaluate(cfg: DictConfig, model: nn.Module) -> dict | None:
    if "evaluator" not in cfg.dataloader:
        return None
    test = cfg.dataloader.test
    results = inference_on_dataset(model, instantiate(test), instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    names = test.dataset.get("names")  # an argument of get_detection_dataset_dicts
    if names and comm.is_main_process():
        name = names if isinstance(names, str) else names[0]
        draw_predictions(unwrapped(model), name, instantiate(test.mapper), cfg.train.output_dir)
    return results
