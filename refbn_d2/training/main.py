"""Prepare and run a training in a worker process, for both trainers."""

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from refbn_d2.training.events import setup_logging
from refbn_d2.training.loading_errors import loading_explained
from refbn_d2.training.output_dir import check_output_dir
from refbn_d2.utils import distributed
from refbn_d2.utils.lock import locked

Job = Callable[[Any, Path, bool], dict]  # (cfg, output_dir, resume) -> results


def run_lock(
    output_dir: str | os.PathLike, args: argparse.Namespace
) -> AbstractContextManager[None]:
    """Return a context in which no other process trains in `output_dir`.

    The process that starts worker 0 holds the lock, for all workers. An evaluation needs none: it
    may run beside a training.

    Args:
        args: of `default_argument_parser`.
    """
    holds = distributed.starts_worker_0(args.machine_rank) and not args.eval_only
    return locked(output_dir) if holds else nullcontext()


def run_training(
    cfg, train: Job, evaluate: Job, free_on_resume: tuple[str, ...], resume: bool, eval_only: bool
) -> dict:
    """Prepare OUTPUT_DIR and the log in this worker process, and call `train` or `evaluate`.

    Args:
        free_on_resume: keys, or beginnings of keys, that a resumed run may change.
        eval_only: call `evaluate`.

    Returns:
        The results of the last evaluation on worker 0, {} on the others.

    Raises:
        FileExistsError: OUTPUT_DIR holds a run, and `resume` is False.
        ConfigError: `resume` is True, and the run in OUTPUT_DIR has another config.
        WorkerKilledError: a signal ended a process that loads data.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not eval_only:
        check_output_dir(cfg, resume, free_on_resume)
    setup_logging(output_dir, distributed.rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    job = evaluate if eval_only else train
    with loading_explained():
        return job(cfg, output_dir, resume)
