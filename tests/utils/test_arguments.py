"""Errors on the command line: one line for what a user can fix, a traceback for a bug."""

import argparse
import pickle
import signal
import subprocess
import sys

import pytest

from refbn_d2.utils.arguments import run_or_exit
from refbn_d2.utils.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    MissingDependencyError,
)

USERS = [ConfigError, DataError, CheckpointError, DivergedError, MissingDependencyError, OSError]


def run(error):
    def fail(args):
        raise error

    run_or_exit(fail, argparse.Namespace())


@pytest.mark.parametrize("kind", [*USERS, FileNotFoundError, ChildProcessError])
def test_what_a_user_can_fix_is_one_line(kind):
    with pytest.raises(SystemExit) as error:
        run(kind("a.yaml: SEED = x"))
    assert error.value.code == f"{kind.__name__}: a.yaml: SEED = x"


@pytest.mark.parametrize(
    "kind",
    [ValueError, TypeError, KeyError, FloatingPointError, ZeroDivisionError, NotImplementedError,
     ImportError, RuntimeError, AssertionError],
)  # fmt: skip
def test_a_bug_keeps_its_traceback(kind):
    with pytest.raises(kind) as error:
        run(kind("a bug"))
    assert error.traceback[-1].name == "fail"


@pytest.mark.parametrize("when", ["running", "ending"])
def test_ctrl_c_ends_it_by_the_signal_without_a_traceback(when):
    """A shell script that called it ends too, because the signal has ended it."""
    code = """
import argparse, atexit, sys, time
from refbn_d2.utils.arguments import run_or_exit
def wait(*_):
    print("up", flush=True)
    for _ in range(300):  # one long sleep misses a signal that comes just before it
        time.sleep(0.1)
if sys.argv[1] == "ending":
    atexit.register(wait)
run_or_exit(wait if sys.argv[1] == "running" else print, argparse.Namespace())
"""
    command = [sys.executable, "-c", code, when]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # nohup and background jobs start pytest with SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.stdout.readline() != "up\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err and ("Interrupted.\n" in err) == (when == "running")


def test_an_exit_code_passes():
    with pytest.raises(SystemExit) as error:
        run(SystemExit(143))
    assert error.value.code == 143


@pytest.mark.parametrize(
    "kind, also", [(DivergedError, FloatingPointError), (MissingDependencyError, ImportError)]
)
def test_what_callers_caught_before_is_still_caught(kind, also):
    assert issubclass(kind, also) and issubclass(kind, ValueError)
    for error in (kind, *USERS):  # from a worker to its parent
        copy = pickle.loads(pickle.dumps(error("why")))
        assert type(copy) is error and str(copy) == "why"
