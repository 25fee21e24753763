"""Prepare a worker process of Detectron2's: its groups, its log, and the errors that end it."""

import argparse
import atexit
import functools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from detectron2.engine import defaults
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from refbn_d2.training.events import fail_quietly
from refbn_d2.training.loading_errors import loading_explained, lost_loader
from refbn_d2.training.output_dir import last_checkpoint_name
from refbn_d2.utils.errors import DivergedError, RefBNError
from refbn_d2.utils.file_io import naming


def join_workers(device: str, args: argparse.Namespace) -> None:
    """Do what Detectron2's `launch` does in a worker and `utils.distributed.launch` does not."""
    if comm.get_world_size() == 1:
        return
    comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", args.num_gpus)))
    if device == "cpu":  # DistributedDataParallel refuses the device_ids that Detectron2 passes
        defaults.create_ddp_model = functools.partial(defaults.create_ddp_model, device_ids=None)


def setup_log(output_dir: str) -> None:
    """Log this package like Detectron2; tracebacks of user errors go only to log.txt."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_a_bug)
    for handler in setup_logger(output_dir, comm.get_rank(), name="refbn_d2").handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setLevel(logging.INFO)
    atexit.register(_close_logs)  # before Detectron2 does, which prints a traceback for a full disk


def _is_a_bug(record: logging.LogRecord) -> bool:
    """Return whether Detectron2 may log the traceback of what ended the training.

    `run_or_exit` prints the errors that a user can fix in one line.
    """
    error = record.exc_info[1] if record.exc_info else None
    expected = isinstance(error, RefBNError | OSError | FloatingPointError)
    return not (expected or lost_loader(error))


def _close_logs() -> None:
    for name in ("detectron2", "fvcore", "refbn_d2"):
        for handler in logging.getLogger(name).handlers:
            stream = getattr(handler, "stream", None)
            if stream not in (None, sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.close()


@contextmanager
def errors_explained(output_dir: str) -> Iterator[None]:
    """Turn the errors that a user can fix and Detectron2 raises into ours, and fail quietly.

    Raises:
        DivergedError: instead of FloatingPointError, if training diverges; also says what to do.
        WorkerKilledError: a signal ended a process that loads data.
        OSError: with OUTPUT_DIR in place of no file.
    """
    fail_quietly()
    try:
        with naming(output_dir), loading_explained():
            yield
    except FloatingPointError as error:
        last = last_checkpoint_name(Path(output_dir)) or "none yet"
        raise DivergedError(
            f"Training diverged: {error} Lower the learning rate or lengthen the warmup. Last "
            f"checkpoint: {last}."
        ) from error
