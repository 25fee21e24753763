"""A training run: its loop over the iterations, and what is left of it in OUTPUT_DIR.

Whatever is random in an iteration is a function of (seed, rank, iteration): a resumed run repeats
the straight one without any random state in the checkpoint.
"""

import logging
import os
import random
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from refbn_d2.utils import distributed
from refbn_d2.checkpoint.files import (
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    write_text,
)
from refbn_d2.config.cfg_node import leaves
from refbn_d2.training.events import WINDOW, EventWriter
from refbn_d2.visualization.samples import plot_curves
from refbn_d2.reference.batch import ReferenceBatch

logger = logging.getLogger(__name__)


class TrainingLoop(ABC):
    """Steps, checkpoints, evaluations and an end by signal; a subclass says what each is.

    A subclass sets all attributes below, and defines `step` and `evaluate`.
    """

    cfg: Any  # written to config.yaml
    output_dir: Path
    device: torch.device
    seed: int  # of the run
    model: nn.Module  # not wrapped by DistributedDataParallel
    loader: Iterable  # endless, from `start_iteration` on
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    reference: ReferenceBatch | None
    start_iteration: int
    max_iter: int
    checkpoint_period: int  # iterations
    eval_period: int  # iterations; 0: at the end alone

    @abstractmethod
    def step(self, iteration: int, batch: Any) -> tuple[float, dict[str, float]]:
        """One optimizer step; the learning rate, and what this worker measured (losses)."""

    @abstractmethod
    def evaluate(self) -> dict:
        """Results on worker 0, {} on the others; leaves the model in eval mode."""

    def scalars(self, results: dict) -> dict[str, float]:
        """What of an evaluation's results goes into metrics.json."""
        return results

    def state_dict(self) -> dict:
        """What a checkpoint holds, but for the iteration."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.scaler.state_dict(),
            "seed": self.seed,
        }
        return state | ({"refbn": self.reference.state_dict()} if self.reference else {})

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint; model and reference batch are made from theirs before."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["grad_scaler"]:  # empty where the run was on the CPU so far
            self.scaler.load_state_dict(state["grad_scaler"])
        logger.info("Resumed at iteration %d.", self.start_iteration)

    def train(self) -> dict:
        """From `start_iteration` to `max_iter`; returns the last evaluation.

        Raises:
            SystemExit: stopped by SIGINT or SIGTERM (128 + signal), with a checkpoint written.
        """
        results: dict = {}
        main_process = distributed.rank() == 0
        if main_process:
            remove_unfinished(self.output_dir)
            write_text(self.output_dir / "config.yaml", self.cfg.dump())
            writer = EventWriter(self.output_dir, self.start_iteration, self.max_iter)
        if self.device.type == "cpu":
            distributed.keep_freed_memory()
        batches = iter(self.loader)
        self.model.train()
        with _stop_signal() as stop:
            for iteration in range(self.start_iteration, self.max_iter):
                start = time.perf_counter()
                batch = next(batches)
                data_time = time.perf_counter() - start
                lr, measured = self.step(iteration, batch)
                last = iteration + 1 == self.max_iter
                report = last or (iteration + 1) % WINDOW == 0
                if report:  # with the workers' means; they agree whether to stop
                    *values, stopping = distributed.mean_over_workers(
                        [*measured.values(), stop.number], self.device
                    )
                    measured = dict(zip(measured, values, strict=True))
                elif distributed.world_size() == 1:
                    stopping = stop.number
                else:
                    stopping = 0
                if main_process:
                    times = {"time": time.perf_counter() - start, "data_time": data_time}
                    writer.step({**measured, **times})
                    if report:
                        writer.write(iteration, lr)
                if last or stopping or (iteration + 1) % self.checkpoint_period == 0:
                    self.save(iteration, "model_final" if last else f"model_{iteration:07d}")
                if stopping and not last:
                    logger.warning(
                        "Interrupted after iteration %d; its checkpoint is written. Go on with "
                        "--resume.",
                        iteration,
                    )
                    if main_process:
                        writer.close()
                    distributed.barrier()  # none is gone before the checkpoint is there
                    raise SystemExit(128 + (stop.number or signal.SIGTERM))
                if last or (self.eval_period and (iteration + 1) % self.eval_period == 0):
                    results = self.evaluate()
                    self.model.train()
                    if main_process:
                        self.show(writer, iteration, results)
        if self.start_iteration >= self.max_iter:  # all but the last evaluation was done
            results = self.evaluate()
            if main_process:
                self.show(writer, self.max_iter - 1, results)
        if main_process:
            writer.close()
        return results

    def show(self, writer: EventWriter, iteration: int, results: dict) -> None:
        """What is left of an evaluation on disk; called on worker 0."""
        if results:
            writer.write_results(iteration, self.scalars(results))
        try:
            plot_curves(self.output_dir / "metrics.json", self.output_dir / "curves.png")
        except ValueError as error:  # nothing to draw yet
            logger.warning("No curves.png: %s", error)

    def save(self, iteration: int, name: str) -> None:
        """Write a checkpoint, from worker 0."""
        if distributed.rank() != 0:
            return
        state = {**self.state_dict(), "iteration": iteration}
        save_checkpoint(state, self.output_dir / f"{name}.pth")
        write_text(self.output_dir / "last_checkpoint", f"{name}.pth")

    def diverged(self, iteration: int, what: object) -> FloatingPointError:
        """The error of a loss that is infinite or NaN; `what` says which."""
        return FloatingPointError(
            f"The loss became infinite or NaN at iteration {iteration}: {what}. Lower "
            "SOLVER.BASE_LR or lengthen the warmup. Last good checkpoint: "
            f"{last_checkpoint_name(self.output_dir) or 'none yet'}."
        )


# ---- OUTPUT_DIR


def check_output_dir(cfg, resume: bool, free_on_resume: tuple[str, ...]) -> None:
    """A run is neither overwritten by another nor resumed as another. Makes the folder.

    Args:
        free_on_resume: keys, or beginnings of keys, that a resumed run may change.

    Raises:
        FileExistsError: OUTPUT_DIR holds a run, and it is not to be resumed.
        ValueError: it is, with another config; names the keys that differ.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not resume:
        check_not_overwritten(output_dir)
    if last_checkpoint_name(output_dir) is None:
        return
    before = dict(leaves(yaml.safe_load((output_dir / "config.yaml").read_text())))
    now = dict(leaves(yaml.safe_load(cfg.dump())))
    changed = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free_on_resume)
    ]
    if changed:
        raise ValueError(
            f"--resume: {output_dir} holds a run of another config. "
            + "; ".join(changed)
            + ". Use its config, or another OUTPUT_DIR."
        )


def check_not_overwritten(output_dir: Path) -> None:
    """Returns if there is no run in `output_dir`.

    Raises:
        FileExistsError: there is.
    """
    if last_checkpoint_name(output_dir) is not None:
        raise FileExistsError(
            f"OUTPUT_DIR {output_dir} holds a run already. Go on with it by --resume, or name "
            "another OUTPUT_DIR."
        )


def last_checkpoint(output_dir: Path) -> dict | None:
    """The checkpoint that `TrainingLoop` wrote last; None, with a warning, where there is none.

    Raises:
        ValueError: it cannot be read, or another program wrote it.
    """
    name = last_checkpoint_name(output_dir)
    if name is None:
        logger.warning("--resume: %s holds no checkpoint yet; starting anew.", output_dir)
        return None
    path = output_dir / name
    checkpoint = load_checkpoint(path)
    check_resumable(path, checkpoint, ("optimizer", "grad_scaler", "iteration", "seed"))
    return checkpoint


def check_resumable(path: str | os.PathLike, checkpoint: dict, needed: Iterable[str]) -> None:
    """Returns if a run can go on with `checkpoint`, which then has all `needed` keys.

    Raises:
        ValueError: it has not; names what it lacks.
    """
    missing = sorted(set(needed) - checkpoint.keys())
    if missing:
        raise ValueError(
            f"{path} was not written by a training run of this engine (it lacks "
            f"{', '.join(missing)}), so --resume cannot go on with it. Start from it in another "
            f"OUTPUT_DIR with MODEL.WEIGHTS {path}"
        )


def last_checkpoint_name(output_dir: Path) -> str | None:
    """Name of the checkpoint that was written last, or None."""
    try:
        return (output_dir / "last_checkpoint").read_text().strip()
    except FileNotFoundError:
        return None


def seed_everything(*entropy: int) -> None:
    """Python's, NumPy's and torch's generators, as a function of `entropy`."""
    (seed,) = np.random.SeedSequence(entropy).generate_state(1).tolist()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes as long as a small image
    if torch.cuda.is_initialized():  # not in data loading workers
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)


def seed_of_run(cfg) -> int:
    """SEED, or a random one where it is negative; the same on all workers."""
    return distributed.broadcast(
        cfg.SEED if cfg.SEED >= 0 else random.SystemRandom().randrange(2**31)
    )


# ---- the end by a signal


class _Stop:
    """The signal that asked to stop; 0 while none did."""

    number = 0

    def __call__(self, number: int, frame) -> None:
        self.number = number
        print("Stopping: a checkpoint will be written. Again: at once.", file=sys.stderr)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    stop = _Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
