"""The error of the parent process after one of its workers fails."""

import signal

import pytest
import torch.multiprocessing as mp

from refbn_d2.utils import distributed
from refbn_d2.utils.errors import ConfigError, DataError


def in_two_workers(main, *args):
    distributed.launch(main, 2, 1, 0, "auto", "cpu", args)


def fail_on_worker_1(error):
    distributed.barrier()
    if distributed.rank() == 1:
        raise error
    distributed.barrier()  # worker 0 waits for a worker that has ended


@pytest.mark.parametrize(
    "error", [DataError("a.json: annotation 7 has no box"), FileNotFoundError("no such image")]
)
def test_a_users_error_comes_out_of_the_parent_as_it_was(error):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(error)) as raised:
        in_two_workers(fail_on_worker_1, error)
    assert type(raised.value) is type(error) and str(raised.value) == str(error)
    assert signal.getsignal(signal.SIGTERM) is handler


def bug_on_worker_1():
    if distributed.rank() == 1:
        raise ValueError("a bug")


def test_a_bug_comes_with_the_workers_traceback():
    with pytest.raises(mp.ProcessRaisedException, match="in bug_on_worker_1(.|\n)*ValueError: a b"):
        in_two_workers(bug_on_worker_1)


def leave():
    raise SystemExit(143)


def test_an_exit_code_is_passed_on():
    with pytest.raises(SystemExit) as error:
        in_two_workers(leave)
    assert error.value.code == 143


@pytest.mark.parametrize(
    "workers, machines, device, message",
    [
        (0, 1, "cpu", "--num-gpus 0"),
        (2, 2, "cpu", "--dist-url auto"),
        (999, 1, "cuda", "999; allowed"),
    ],
)
def test_workers_that_cannot_be(workers, machines, device, message):
    with pytest.raises(ConfigError, match=message):
        distributed.launch(leave, workers, machines, 0, "auto", device, ())
