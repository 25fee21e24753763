"""Errors on the command line: one line for what a user can fix, a traceback for a bug."""

import argparse
import pickle

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
     ImportError, RuntimeError, AssertionError, KeyboardInterrupt],
)  # fmt: skip
def test_a_bug_keeps_its_traceback(kind):
    with pytest.raises(kind) as error:
        run(kind("a bug"))
    assert error.traceback[-1].name == "fail"


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
