import subprocess
import sys

import pytest

PAGES = """
import resource
import torch
from refbn_d2.utils.device import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(12 * 2**20)  # freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(4)
before = new_pages()
keep_freed_memory()
new_pages()  # the heap grows once
print(before, new_pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_freed_memory_is_kept():
    """48 MiB are more than glibc keeps by default (32), so they would get new pages every time."""
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 100 < before
