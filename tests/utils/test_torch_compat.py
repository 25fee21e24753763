"""Old versions of torch, faked; and the shims beside what they replace, or a formula."""

import subprocess
import sys

import pytest
import torch

from refbn_d2.utils import torch_compat
from refbn_d2.utils.errors import MissingDependencyError
from tests.versions import needs


def test_a_torch_that_is_too_old_is_refused_at_the_import():
    code = "import torch; torch.__version__ = '1.13.1+cu117'; import refbn_d2"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "MissingDependencyError: refbn_d2 needs torch 2.0" in last
    assert "torch 1.13.1+cu117 is installed" in last and "install `torch>=2.0`" in last


@pytest.mark.parametrize("version", ["2.0.0", "2.10.0a0+git1", "2.15.1+cpu", "3.0"])
def test_every_other_version_is_read(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    torch_compat.check_torch()
    assert torch_compat.torch_version() == tuple(int(n) for n in version.split(".")[:2])


def test_a_feature_that_is_too_new_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    torch_compat.need_torch("flying", 2, 5)
    with pytest.raises(MissingDependencyError, match="flying needs torch 2.6 .* torch 2.5.1 is"):
        torch_compat.need_torch("flying", 2, 6)


@pytest.mark.parametrize("hidden", [False, True])
def test_get_total_norm(hidden, monkeypatch):
    if hidden:
        monkeypatch.delattr(torch.nn.utils, "get_total_norm", raising=False)
    tensors = [torch.tensor([3.0]), torch.tensor([[4.0, 12.0]])]
    assert torch_compat.get_total_norm(iter(tensors)) == 13
    assert torch_compat.get_total_norm([]) == 0
    assert torch_compat.get_total_norm([torch.tensor([float("inf")])]).isinf()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_scaler_that_is_not_enabled_changes_nothing(hidden, monkeypatch):
    if hidden:
        monkeypatch.delattr(torch.amp, "GradScaler", raising=False)
        monkeypatch.setattr(torch, "__version__", "2.2.0")
        with pytest.raises(MissingDependencyError, match="float16 on the CPU needs torch 2.3"):
            torch_compat.grad_scaler("cpu", enabled=True)
    scaler = torch_compat.grad_scaler("cpu", enabled=False)
    assert scaler.scale(torch.tensor(2.0)) == 2 and not scaler.is_enabled()


def test_itemsize_of():
    sizes = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.bool: 1}
    assert {dtype: torch_compat.itemsize_of(dtype) for dtype in sizes} == sizes


@pytest.mark.slow
@needs("torch", 2, 1, "torch.compile on every supported Python")
def test_is_compiling():
    def run(x):
        return x + 1 if torch_compat.is_compiling() else x

    assert run(torch.zeros(1)) == 0
    assert torch.compile(run, backend="eager", fullgraph=True)(torch.zeros(1)) == 1
