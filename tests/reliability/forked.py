"""Start Python programs as forks of this process, which has imported what they need.

A start costs milliseconds instead of the seconds in which torch is imported. Otherwise a fork is a
process as any other: it has its own number, output, signals and exit code.
"""

import atexit
import importlib
import importlib.util
import inspect
import multiprocessing.process
import os
import runpy
import signal
import subprocess
import sys
import traceback

PRELOADED = (
    *("torch", "torchvision", "cv2", "timm", "matplotlib.pyplot", "torch.utils.tensorboard"),
    *("refbn_d2.engines.torchvision.main", "refbn_d2.pretrain.main", "refbn_d2.study.measure"),
    *("refbn_d2.export.convert_file", "refbn_d2.data.shapes.dataset", "torch._dynamo"),
)
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)


def preload() -> str:
    """Import what the programs need, with one thread; return why Detectron2 is missing, or ""."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    try:
        importlib.import_module("refbn_d2.engines.detectron2.trainer")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Forked(subprocess.Popen):
    """A Popen of [sys.executable, script or "-m", ...] that forks instead of executing Python."""

    def _execute_child(self, *args) -> None:
        given = _SIGNATURE.bind(self, *args).arguments
        command = list(given["args"])
        if command[0] != sys.executable or command[1] == "-c":
            super()._execute_child(*args)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(command[1:], given)
        self._child_created = True
        self._close_pipe_fds(
            *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite")),
            *(given[name] for name in ("errread", "errwrite")),
        )


def _become(command: list[str], given: dict) -> None:
    """Be a new program in this fork; never return."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if given["start_new_session"]:
            os.setsid()
        for name, fd in (("p2cread", 0), ("c2pwrite", 1), ("errwrite", 2)):
            if given[name] != -1:
                os.dup2(given[name], fd)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  pytest has replaced them
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        if given["cwd"]:
            os.chdir(given["cwd"])
        if given["env"] is not None:
            os.environ.clear()
            os.environ.update(given["env"])
        if given["preexec_fn"]:
            given["preexec_fn"]()
        multiprocessing.process._children.clear()  # those of pytest, which the exit would end
        subprocess.Popen = Forked  # what this program starts is forked too
        code = _run(command)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
        finally:
            os._exit(code)


def _run(command: list[str]) -> int:
    """Run a script or module as `python` does, and return its exit code."""
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, os.path.dirname(command[0]))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 0
