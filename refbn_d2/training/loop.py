"""A training run: its loop over the iterations, and what is left of it in OUTPUT_DIR.

Whatever is random in an iteration is a function of (seed, rank, iteration): a resumed run repeats
the straight one without any random state in the checkpoint.
"""

import logging
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refbn_d2.checkpoint.files import save_checkpoint
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.training.events import WINDOW, EventWriter
from refbn_d2.training.interruption import stop_signal
from refbn_d2.training.output_dir import last_checkpoint_name
from refbn_d2.utils import distributed
from refbn_d2.utils.device import keep_freed_memory
from refbn_d2.utils.file_io import remove_unfinished, write_text
from refbn_d2.visualization.curves import plot_curves

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
            keep_freed_memory()
        batches = iter(self.loader)
        self.model.train()
        with stop_signal() as stop:
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
