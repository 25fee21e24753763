"""States that torch makes in unusual ways: assigned, on the meta device, reset, in half precision.

Oracles: nn.BatchNorm2d, and a new layer.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refbn_d2.checkpoint.convert import _as
from refbn_d2.layers import Moments, Recording, RefBatchNorm2d, convert_to_refbn
from tests.versions import FLOAT16, needs

C = 4
ASSIGN = needs("torch", 2, 1, "load_state_dict(assign=True)")
HALF = (torch.bfloat16, FLOAT16)


def batch(seed, n=4, dtype=torch.float32):
    x = torch.randn(n, C, 5, 6, generator=torch.Generator().manual_seed(seed))
    return (2 * x + 1).to(dtype)


def trained_bn():
    bn = nn.BatchNorm2d(C)
    bn(batch(0))
    return bn


def with_reference(layer):
    layer.commit(Moments(torch.full((C,), 2.0), torch.full((C,), 3.0), 50))
    return layer


def assert_new(layer):
    """The layer's state is that of a new one, and its first batch becomes the reference."""
    for name, value in RefBatchNorm2d(C).state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    assert not layer.has_reference()
    layer.train()(batch(3))
    torch.testing.assert_close(layer.ref_mean, batch(3).mean((0, 2, 3)))
    assert layer.ref_count == batch(3).numel() // C


@ASSIGN
def test_assigned_statistics_and_reference_are_separate():
    layer = RefBatchNorm2d(C)
    layer.load_state_dict(trained_bn().state_dict(), assign=True)
    reference = layer.ref_mean.clone(), layer.ref_var.clone()
    layer(batch(1))
    assert torch.equal(layer.ref_mean, reference[0]) and torch.equal(layer.ref_var, reference[1])
    assert not torch.equal(layer.running_mean, reference[0])


@ASSIGN
def test_a_file_with_one_tensor_for_both_is_separated(tmp_path):
    state = trained_bn().state_dict()
    state |= {"ref_mean": state["running_mean"], "ref_var": state["running_var"]}
    torch.save(state | {"ref_count": torch.tensor(1)}, tmp_path / "state.pth")
    layer = RefBatchNorm2d(C)
    layer.load_state_dict(torch.load(tmp_path / "state.pth"), assign=True)
    assert layer.ref_mean.data_ptr() != layer.running_mean.data_ptr()
    assert layer.ref_var.data_ptr() != layer.running_var.data_ptr()


@ASSIGN
def test_assigned_onto_the_meta_device():
    with torch.device("meta"):
        layer = RefBatchNorm2d(C)
    assert not layer.has_reference()
    layer.load_state_dict(trained_bn().state_dict(), assign=True)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cpu"}
    assert layer.has_reference() and layer.ref_count == 1
    other = RefBatchNorm2d(C)
    other.load_state_dict(trained_bn().state_dict())
    assert torch.equal(layer(batch(1)), other(batch(1)))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_an_emptied_layer_has_no_reference(device):
    with torch.device(device):
        layer = RefBatchNorm2d(C)
    if device == "cpu":
        with_reference(layer)
    hold = [torch.full((1,), 7) for _ in range(64)]  # freed memory is not all zero
    del hold
    net = nn.Sequential(layer).to_empty(device="cpu")
    assert not layer.has_reference() and layer.ref_count == 0
    layer.reset_parameters()
    assert_new(net[0])


def test_reset_parameters_drops_the_reference():
    layer = with_reference(RefBatchNorm2d(C))
    layer(batch(1))
    layer.reset_parameters()
    assert_new(layer)


def test_reset_running_stats_keeps_the_reference():
    layer = with_reference(RefBatchNorm2d(C))
    layer.reset_running_stats()  # as torch's update_bn does for averaged weights
    assert layer.has_reference() and layer.ref_mean.tolist() == [2.0] * C


def test_one_rule_for_which_statistics_are_a_reference():
    for bn, expected in ((nn.BatchNorm2d(C), 0), (trained_bn(), 1)):
        loaded = RefBatchNorm2d(C)
        loaded.load_state_dict(bn.state_dict())
        converted = convert_to_refbn(copy.deepcopy(bn))
        of_file = RefBatchNorm2d(C)
        of_file.load_state_dict(_as(bn.state_dict(), "RefBN"))
        for layer in (loaded, converted, of_file):
            assert layer.ref_count == expected and layer.has_reference() == bool(expected)
            assert torch.equal(layer.ref_mean, bn.running_mean)


def test_conversion_on_the_meta_device():
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C))
    net = convert_to_refbn(net).to_empty(device="cpu")
    net[1].reset_parameters()
    assert_new(net[1])


@pytest.mark.parametrize("dtype", HALF)
def test_w_0_in_half_precision_is_batch_norm(dtype):
    bn, layer = nn.BatchNorm2d(C).to(dtype), RefBatchNorm2d(C, reference_weight=0).to(dtype)
    for seed in range(5):
        x = [batch(seed, dtype=dtype).requires_grad_() for _ in range(2)]
        y = [bn(x[0]), layer(x[1])]
        for output in y:
            output.float().pow(2).mean().backward()
        torch.testing.assert_close(y[1], y[0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(x[1].grad, x[0].grad, rtol=0.05, atol=1e-4)
    eps = torch.finfo(dtype).eps
    for name, value in bn.state_dict().items():
        assert layer.state_dict()[name].dtype == value.dtype
        # rounded twice in each of the five steps: up to 2 units of the last place
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=2 * eps, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x[0]), bn.eval()(x[0]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", HALF)
def test_capture_and_slice_in_half_precision(dtype):
    layer, x, part = RefBatchNorm2d(C).to(dtype), batch(1, 8, dtype), batch(2, 2, dtype)
    layer.weight.data.fill_(3)
    with torch.no_grad():
        layer.start_recording(Recording.CAPTURE)
        own = F.batch_norm(x.float(), None, None, layer.weight.float(), training=True)
        torch.testing.assert_close(layer(x).float(), own, rtol=0.01, atol=0.01)
        layer.commit(layer.stop_recording())
        torch.testing.assert_close(layer.ref_mean, x.float().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        layer.start_recording(Recording.SLICE)
        fixed = F.batch_norm(part.float(), layer.ref_mean, layer.ref_var, layer.weight.float())
        torch.testing.assert_close(layer(part).float(), fixed, rtol=0.01, atol=0.01)
    assert len(layer(batch(3, 0, dtype))) == 0  # no RoIs


@ASSIGN
def test_the_reference_stays_float32_in_half_precision(tmp_path):
    layer = with_reference(RefBatchNorm2d(C))
    layer.ref_mean.fill_(1 + 2**-20)
    exact = layer.ref_mean.clone()
    layer.bfloat16().half()
    assert layer.running_mean.dtype == layer.weight.dtype == torch.float16
    assert torch.equal(layer.ref_mean, exact)  # no detour over half precision
    assert layer.ref_var.dtype == RefBatchNorm2d(C, dtype=torch.half).ref_var.dtype == torch.float32
    other = RefBatchNorm2d(C)
    other.load_state_dict(nn.BatchNorm2d(C).half().state_dict(), assign=True)
    assert other.running_mean.dtype == torch.half and other.ref_mean.dtype == torch.float32
    assert layer.double().ref_mean.dtype == torch.float64
    assert layer.half().ref_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_statistics_are_rounded_once(dtype):
    layer = RefBatchNorm2d(256, dtype=dtype, reference_weight=1.0)
    layer.commit(Moments(torch.linspace(1, 3, 256), torch.linspace(2, 5, 256), 9))
    before = layer.running_mean.normal_().clone()
    layer(torch.randn(2, 256, 3, 3, dtype=dtype))
    expected = (0.9 * before.float() + 0.1 * layer.ref_mean).to(dtype)
    assert torch.equal(layer.running_mean, expected)


@pytest.mark.parametrize("w", [0.0, 0.7])
def test_the_float32_path_did_not_change(w):
    """The running statistics' EMA to the bit."""
    layer = with_reference(RefBatchNorm2d(C, reference_weight=w))
    x, n = batch(1), batch(1).numel() // C
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    mixed = mean + w * (2.0 - mean)
    spread = (1 - w) * var + w * torch.full((C,), 3.0) + (w * (1 - w)) * (2.0 - mean).square()
    layer(x)
    assert torch.equal(layer.running_mean, torch.zeros(C) * 0.9 + 0.1 * mixed)
    expected = torch.ones(C) * 0.9 + 0.1 * (spread + (1 - w) * var / (n - 1))
    assert torch.equal(layer.running_var, expected)
