"""Run the iterations of a training, and write its files into OUTPUT_DIR.

All randomness in an iteration is a function of (seed, rank, iteration). So a resumed run repeats an
uninterrupted one, without any random state in the checkpoint.
"""

import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refbn_d2.checkpoint.files import save_checkpoint
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.training.events import WINDOW, EventWriter, SilentWriter
from refbn_d2.training.interruption import stop_signal
from refbn_d2.training.output_dir import last_checkpoint_name
from refbn_d2.utils import distributed
from refbn_d2.utils.device import keep_freed_memory
from refbn_d2.utils.errors import DataError, DivergedError
from refbn_d2.utils.file_io import remove_unfinished, write_text
from refbn_d2.utils.torch_compat import GradScaler, get_total_norm
from refbn_d2.visualization.curves import plot_curves

logger = logging.getLogger(__name__)


class TrainingLoop(ABC):
    """Run steps, write checkpoints, evaluate, and stop at a signal.

    A subclass defines `step` and `evaluate`.

    Args:
        cfg: written to config.yaml.
        output_dir: OUTPUT_DIR, which exists.
        model: not wrapped by DistributedDataParallel, on the device that it is trained on.
        loader: endless batches, the first of them for `start_iteration`.
        optimizer: of `model`.
        scaler: of the loss; not enabled without float16.
        reference: the reference batch of a model with RefBN, else None.
        seed: of the run.
        start_iteration: 0, or the iteration after the checkpoint's.
        max_iter: iterations of the whole run.
        checkpoint_period: iterations.
        eval_period: iterations; 0 for an evaluation only at the end.
    """

    def __init__(
        self,
        *,
        cfg: Any,
        output_dir: Path,
        model: nn.Module,
        loader: Iterable,
        optimizer: torch.optim.Optimizer,
        scaler: GradScaler,
        reference: ReferenceBatch | None,
        seed: int,
        start_iteration: int,
        max_iter: int,
        checkpoint_period: int,
        eval_period: int,
    ) -> None:
        self.cfg, self.output_dir = cfg, output_dir
        self.model, self.loader, self.reference = model, loader, reference
        self.device = next(model.parameters()).device
        self.wrapped = distributed.data_parallel(model, self.device)  # what a step calls
        self.optimizer, self.scaler, self.seed = optimizer, scaler, seed
        self.start_iteration, self.max_iter = start_iteration, max_iter
        self.checkpoint_period, self.eval_period = checkpoint_period, eval_period

    @abstractmethod
    def step(self, iteration: int, batch: Any) -> tuple[float, dict[str, float]]:
        """Run one optimizer step; return the learning rate and what this worker measured.

        Calls `read_losses` between the gradients and the optimizer's step.
        """

    @abstractmethod
    def evaluate(self) -> dict:
        """Return the results on worker 0, {} on the others, and leave the model in eval mode."""

    def finish_statistics(self, iteration: int) -> None:  # noqa: B027  most trainings need none
        """Update running statistics before they are saved and evaluated, in training mode."""

    def scalars(self, results: dict) -> dict[str, float]:
        """Return the scalars of an evaluation's results, for metrics.json."""
        return results

    def train(self) -> dict:
        """Run from `start_iteration` to `max_iter`; return the last evaluation's results.

        Raises:
            DivergedError: a loss or a gradient is infinite or NaN, on any worker.
            SystemExit: stopped by SIGINT or SIGTERM (128 + signal), with a checkpoint written.
        """
        results: dict = {}
        with closing(self._start()) as writer:
            if self.start_iteration >= self.max_iter:  # only the last evaluation is left
                return self._evaluate(self.max_iter - 1, writer)
            batches = iter(self.loader)  # now, so that its processes inherit the signal handlers
            with stop_signal() as stop:
                for iteration in range(self.start_iteration, self.max_iter):
                    report = self._is_due(iteration, WINDOW)
                    evaluate = self._is_due(iteration, self.eval_period)

                    lr, measured = self._timed_step(iteration, batches)
                    measured, stopping = self._agree(measured, stop.number, report)
                    writer.step(measured)
                    if report:
                        writer.write(iteration, lr)
                    if evaluate:
                        self.finish_statistics(iteration)
                    # The checkpoint comes first: if the evaluation fails, nothing is lost.
                    if evaluate or stopping or self._is_due(iteration, self.checkpoint_period):
                        self.save(iteration)
                    if stopping and not self._is_last(iteration):
                        self._interrupt(iteration, stop.number)
                    if evaluate:
                        results = self._evaluate(iteration, writer)
        return results

    def _start(self) -> EventWriter | SilentWriter:
        self.model.train()
        if self.device.type == "cpu":
            keep_freed_memory()
        if distributed.rank() != 0:
            return SilentWriter()
        remove_unfinished(self.output_dir)
        write_text(self.output_dir / "config.yaml", self.cfg.dump())
        return EventWriter(self.output_dir, self.start_iteration, self.max_iter)

    def _is_last(self, iteration: int) -> bool:
        return iteration + 1 == self.max_iter

    def _is_due(self, iteration: int, period: int) -> bool:
        """Return whether `iteration` ends a period or the run; a period of 0 is the whole run."""
        return self._is_last(iteration) or (period > 0 and (iteration + 1) % period == 0)

    def _timed_step(self, iteration: int, batches: Iterator) -> tuple[float, dict[str, float]]:
        """Run `step` on the next batch, and add "time" and "data_time" (seconds) to its result."""
        start = time.perf_counter()
        batch = next(batches)
        data_time = time.perf_counter() - start
        lr, measured = self.step(iteration, batch)
        return lr, {**measured, "time": time.perf_counter() - start, "data_time": data_time}

    def _agree(
        self, measured: dict[str, float], stop: int, report: bool
    ) -> tuple[dict[str, float], bool]:
        """Return the workers' means of what they measured, and whether they stop here.

        A signal may reach the workers in different iterations, but all must stop after the same
        one. So several workers stop only when they report, because then they communicate.
        """
        if report:
            *means, stops = distributed.mean_over_workers([*measured.values(), stop], self.device)
            return dict(zip(measured, means, strict=True)), stops > 0
        return measured, stop > 0 and distributed.world_size() == 1

    def _interrupt(self, iteration: int, stop: int) -> None:
        logger.warning(
            "Interrupted after iteration %d; its checkpoint is written. Resume with --resume.",
            iteration,
        )
        distributed.barrier()  # no worker leaves before the checkpoint is written
        raise SystemExit(128 + (stop or signal.SIGTERM))

    def _evaluate(self, iteration: int, writer: EventWriter | SilentWriter) -> dict:
        results = self.evaluate()
        self.model.train()
        if isinstance(writer, EventWriter):  # on worker 0
            self.show(writer, iteration, results)
        return results

    def show(self, writer: EventWriter, iteration: int, results: dict) -> None:
        """Write an evaluation's results to disk; only worker 0 calls it."""
        if results:
            writer.write_results(iteration, self.scalars(results))
        try:
            plot_curves(self.output_dir / "metrics.json", self.output_dir / "curves.png")
        except DataError as error:  # nothing to draw yet
            logger.warning("No curves.png: %s", error)

    def read_losses(self, iteration: int, losses: dict[str, Tensor]) -> dict[str, float]:
        """Read `losses` from the device, in one transfer, and check that training has not diverged.

        At this point the workers have averaged their gradients. If one worker's loss is infinite or
        NaN, so are all gradients. So all workers stop here, before an optimizer step breaks the
        weights and worker 0 writes them to a checkpoint. A gradient scaler skips steps whose
        gradients are not finite, so with one the gradients are not checked.

        Args:
            losses: scalars, with "total_loss" among them.

        Raises:
            DivergedError: the total loss or a gradient is infinite or NaN.
        """
        norm = torch.zeros((), device=self.device)
        if not self.scaler.is_enabled():
            norm = _gradient_norm(self.model)
        *values, norm = torch.stack([*losses.values(), norm]).tolist()
        read = dict(zip(losses, values, strict=True))
        if not math.isfinite(read["total_loss"]):
            raise self.diverged(iteration, f"the loss is infinite or NaN ({read})")
        if not math.isfinite(norm):
            raise self.diverged(iteration, "a gradient is infinite or NaN")
        return read

    def diverged(self, iteration: int, why: object) -> DivergedError:
        """Return the error for a training that cannot continue."""
        return DivergedError(
            f"Training diverged at iteration {iteration}: {why}. Lower SOLVER.BASE_LR or lengthen "
            "the warmup. Last good checkpoint: "
            f"{last_checkpoint_name(self.output_dir) or 'none yet'}."
        )

    def save(self, iteration: int) -> None:
        """Write a checkpoint, from worker 0."""
        if distributed.rank() != 0:
            return
        name = "model_final.pth" if self._is_last(iteration) else f"model_{iteration:07d}.pth"
        save_checkpoint({**self.state_dict(), "iteration": iteration}, self.output_dir / name)
        write_text(self.output_dir / "last_checkpoint", name)

    def state_dict(self) -> dict:
        """Return a checkpoint's content without the iteration."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.scaler.state_dict(),
            "seed": self.seed,
        }
        return state | ({"refbn": self.reference.state_dict()} if self.reference else {})

    def load_state_dict(self, state: dict) -> None:
        """Resume optimizer and scaler; model and reference batch are already the checkpoint's."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["grad_scaler"]:  # empty if the run has been on the CPU
            self.scaler.load_state_dict(state["grad_scaler"])
        logger.info("Resumed at iteration %d.", self.start_iteration)


def _gradient_norm(model: nn.Module) -> Tensor:
    """Return the L2 norm of all gradients, a scalar; infinite or NaN if any gradient is.

    It is also infinite for gradients above 1e19, whose squares overflow. torch computes it by a
    fused kernel.
    """
    return get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
