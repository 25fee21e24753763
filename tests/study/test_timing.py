"""Memory of a process that is timed."""

import resource
import subprocess
import sys

import pytest

from refbn_d2.study.timing import _largest_resident


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_process_itself():
    """wait4 says more: at least the memory of the process that started it."""
    code = "x = bytearray(60 << 20); print('ready', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child.stdout.readline()
    measured = _largest_resident(child.pid)
    child.communicate("\n")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert 60 < measured < 120 < own
    assert _largest_resident(child.pid) == 0
