"""Processes that load data end by their parent's SIGTERM, and by no other."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

from refbn_d2.data.samplers import start_worker


def load(ready):
    start_worker(0)
    ready.set()
    for _ in range(600):  # one long sleep misses a signal that comes just before it
        time.sleep(0.1)


def start():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=load, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(10)
    return process


def test_only_the_parents_sigterm_ends_it():
    process = start()
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    assert process.exitcode == 0


def test_python_exits_while_a_worker_loads():
    """At exit, multiprocessing ends its processes by SIGTERM and waits for them."""
    code = "from tests.data.test_loading_processes import start\nprint(start().pid, flush=True)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0, ended.stderr
    try:
        os.kill(int(ended.stdout), signal.SIGKILL)
        alive = True
    except ProcessLookupError:
        alive = False
    assert not alive
