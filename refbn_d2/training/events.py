"""Report a run's progress: log.txt, metrics.json, TensorBoard, and a progress bar or lines."""

import json
import logging
import sys
import threading
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import torch
from fvcore.common.history_buffer import HistoryBuffer
from tqdm import tqdm

from refbn_d2.utils.extras import needs
from refbn_d2.utils.file_io import naming, write_text

logger = logging.getLogger(__name__)

WINDOW = 20  # iterations between two lines, and in the medians of a line, as in Detectron2


def fail_quietly() -> None:
    """Print no traceback for a log that cannot be written, as on a full disk.

    A thread of TensorBoard's prints one too, although its writer raises the error again.
    """
    logging.raiseExceptions = False
    threading.excepthook = _print_bugs


def _print_bugs(args: threading.ExceptHookArgs) -> None:
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def setup_logging(output_dir: Path, rank: int) -> None:
    """Send the package's log to stderr on worker 0, and to log.txt (log.txt.rank1, ...)."""
    fail_quietly()
    root = logging.getLogger("refbn_d2")
    root.setLevel(logging.DEBUG)
    root.propagate = False
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
    handlers: list[logging.Handler] = [logging.FileHandler(output_dir / name)]
    if rank == 0:
        handlers.append(_BesideTheBar())
    for handler in handlers:
        handler.setFormatter(
            logging.Formatter("[%(asctime)s %(name)s] %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
        )
        root.addHandler(handler)


class _BesideTheBar(logging.Handler):
    """Write to stderr, above a progress bar if there is one; the bar replaces lines of DEBUG."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class EventWriter:
    """Collect the scalars of every iteration, and write them every `WINDOW` iterations.

    Each line of metrics.json is a JSON object with Detectron2's names: "iteration", losses and
    times as medians of the window, "lr", and evaluation results such as "bbox/AP". On a terminal, a
    progress bar shows the same. Otherwise each becomes a line of the log.
    """

    def __init__(self, output_dir: Path, start_iteration: int, max_iter: int) -> None:
        with needs("train"):  # not at the top: it takes seconds
            from torch.utils.tensorboard import SummaryWriter

        path = output_dir / "metrics.json"
        if start_iteration and path.exists():  # drop a line that was cut off
            lines = path.read_text().splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if line.endswith("\n")))
        self._path = path
        self._metrics = open(path, "a" if start_iteration else "w")  # noqa: SIM115
        with naming(path):
            self._tensorboard = SummaryWriter(str(output_dir), purge_step=start_iteration)
        self._history: dict[str, HistoryBuffer] = defaultdict(lambda: HistoryBuffer(WINDOW))
        self._max_iter = max_iter
        self._bar = tqdm(
            initial=start_iteration, total=max_iter, unit="it", file=sys.stderr,
            disable=not sys.stderr.isatty(), dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip

    def step(self, scalars: dict[str, float]) -> None:
        """Record one iteration: its losses, "time" and "data_time" (seconds)."""
        for name, value in scalars.items():
            self._history[name].update(value)
        self._bar.update()

    def write(self, iteration: int, lr: float) -> None:
        """Write the medians of the last window, which ends at `iteration`."""
        scalars = {name: h.median(WINDOW) for name, h in self._history.items()}
        left = (self._max_iter - iteration - 1) * self._history["time"].global_avg()
        scalars = {"eta_seconds": left, "lr": lr, **scalars}
        self.write_results(iteration, scalars)
        shown = [name for name in self._history if name not in ("time", "data_time")]
        measured = "  ".join(f"{name}: {scalars[name]:.4g}" for name in shown)
        self._bar.set_postfix_str(measured, refresh=False)
        memory = ""
        if torch.cuda.is_available():
            memory = f"  max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M"
        line = (
            f"eta: {timedelta(seconds=int(left))}  iter: {iteration}  {measured}  "
            f"time: {scalars['time']:.4f}  data_time: {scalars['data_time']:.4f}  "
            f"lr: {lr:.5g}{memory}"
        )
        logger.log(logging.INFO if self._bar.disable else logging.DEBUG, line)

    def write_results(self, iteration: int, scalars: dict[str, float]) -> None:
        """Write scalars without a median, such as evaluation results."""
        line = json.dumps({"iteration": iteration, **scalars}, sort_keys=True)
        with naming(self._path):
            self._metrics.write(line + "\n")
            self._metrics.flush()
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._bar.close()
        with naming(self._path):
            try:
                self._metrics.close()
            finally:
                self._tensorboard.close()


class SilentWriter:
    """An EventWriter that writes nothing, for all workers but 0."""

    def step(self, scalars: dict[str, float]) -> None:
        """Do nothing."""

    def write(self, iteration: int, lr: float) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
