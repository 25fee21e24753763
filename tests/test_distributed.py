import subprocess
import sys

import pytest

PAGES = """
import resource
import torch
from refbn_d2.distributed import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4 * 2**20)  # 16 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(4)
before = new_pages()
keep_freed_memory()
torch.ones(4 * 2**20)
print(before, new_pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_freed_memory_is_kept():
    """20 x 16 MiB are 81,920 pages of 4 KiB where each tensor gets its own."""
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 100 < before
