"""One program a folder: refused, taken over, removed."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from refbn_d2.utils.errors import ConfigError
from refbn_d2.utils.lock import locked

HOLD = """
import sys, time
from refbn_d2.utils.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    for _ in range(600):  # one long sleep misses a signal that comes just before it
        time.sleep(0.1)
"""


def holder(folder, **options):
    """Start a process that holds the lock of `folder`."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline() == "held\n"
    return process


def start_of(pid):
    """The 22nd field of a process's stat, which has no space in its name here."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split()[21]


def test_the_lock_names_host_and_process_and_is_removed(tmp_path):
    with locked(tmp_path / "new"):
        content = (tmp_path / "new/run.lock").read_text().split()
        assert content == [socket.gethostname(), str(os.getpid()), start_of(os.getpid())]
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / "run.lock").exists()


def test_a_second_process_is_refused_by_one_line(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(ConfigError) as error, locked(tmp_path, "--output-dir"):
            pass
    finally:
        process.kill()
        process.wait()
    line = str(error.value)
    assert re.search(
        f"{tmp_path} is in use by process {process.pid} on host {socket.gethostname()}, as "
        f"{tmp_path}/run.lock says. Wait .*choose another --output-dir",
        line,
    )
    assert "\n" not in line
    with locked(tmp_path):  # it was killed: its lock is taken over
        assert (tmp_path / "run.lock").read_text().split()[1] == str(os.getpid())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_removes_it(tmp_path, number, before):
    process = holder(
        tmp_path,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, before),
    )
    process.send_signal(number)
    assert process.wait(10) == -number
    assert not (tmp_path / "run.lock").exists()


def test_another_host_is_believed(tmp_path):
    (tmp_path / "run.lock").write_text("elsewhere 1 12345\n")
    with pytest.raises(ConfigError, match=f"elsewhere.*If it has ended, remove {tmp_path}/run.lo"):
        with locked(tmp_path):
            pass
    assert (tmp_path / "run.lock").read_text() == "elsewhere 1 12345\n"


@pytest.mark.parametrize("start", ["1", ""])
def test_a_number_that_is_used_again(tmp_path, start):
    """The process of the lock has ended, and another one has its number: this one."""
    (tmp_path / "run.lock").write_text(f"{socket.gethostname()} {os.getpid()} {start}\n")
    with locked(tmp_path):
        assert start_of(os.getpid()) in (tmp_path / "run.lock").read_text()


def test_a_lock_cut_off_by_a_kill(tmp_path):
    (tmp_path / "run.lock").touch()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / "run.lock").read_text()


def test_the_lock_of_another_is_not_removed(tmp_path):
    with locked(tmp_path):
        (tmp_path / "run.lock").write_text("elsewhere 1 12345\n")
    assert (tmp_path / "run.lock").exists()
