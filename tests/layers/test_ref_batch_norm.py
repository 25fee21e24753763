"""Oracles: nn.BatchNorm2d (w = 0, concatenation), fixed statistics (w = 1), torch's exporters."""

import copy
import functools
import logging
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from refbn_d2.layers import Moments, Recording, RefBatchNorm2d, refbn_layers
from refbn_d2.layers.functional import GRADIENTS
from refbn_d2.layers.reference_norm import warn_no_reference
from refbn_d2.utils import torch_compat
from tests.versions import FLOAT16, needs

C = 6


def batch(seed, n=4, scale=1.0, shift=0.0):
    return torch.randn(n, C, 5, 7, generator=torch.Generator().manual_seed(seed)) * scale + shift


def with_reference(layer, x=None):
    x = batch(99, 8, 2.0, 1.0) if x is None else x
    layer.start_recording(Recording.CAPTURE)
    with torch.no_grad():
        layer(x)
    layer.commit(layer.recorded_moments)
    layer.stop_recording()
    return layer


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_w_0_is_batch_norm_over_many_steps(gradient, momentum, dtype, tolerance):
    bn = nn.BatchNorm2d(C, momentum=momentum).to(dtype)
    ref = RefBatchNorm2d(C, momentum=momentum, reference_weight=0, gradient=gradient).to(dtype)
    with_reference(ref, batch(99, 8, 2.0, 1.0).to(dtype))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (bn, ref)]
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for step in range(25):
        data = batch(step, scale=1 + step / 10, shift=step / 10).to(dtype)
        x = [data.clone().requires_grad_() for _ in range(2)]
        y = [bn(x[0]), ref(x[1])]
        for output, optimizer in zip(y, optimizers, strict=True):
            optimizer.zero_grad()
            (output**3).mean().backward()
            optimizer.step()
        close(y[1], y[0])
        close(x[1].grad, x[0].grad)
    for name, value in bn.state_dict().items():
        close(ref.state_dict()[name], value)
    close(ref.eval()(x[0]), bn.eval()(x[0]))


def test_w_1_is_normalization_by_fixed_statistics():
    reference = batch(1, 8, 3.0, 2.0)
    layer = with_reference(RefBatchNorm2d(C, reference_weight=1.0, gradient="pooled"), reference)
    for seed in range(200):
        x = batch(seed, shift=5).requires_grad_()
        y = layer(x)
    mean, var = reference.mean((0, 2, 3)), reference.var((0, 2, 3), correction=0)
    fixed = F.batch_norm(x, mean, var, layer.weight, layer.bias)
    torch.testing.assert_close(y, fixed)
    got, expected = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, fixed))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(layer.eval()(x), fixed, rtol=1e-4, atol=1e-4)  # running statistics


def test_count_is_batch_norm_over_the_concatenation():
    reference, x = batch(1, 8, 3.0, 2.0), batch(2)
    layer = with_reference(RefBatchNorm2d(C, weighting="count"), reference)
    both = F.batch_norm(torch.cat([reference, x]), None, None, training=True)
    torch.testing.assert_close(layer(x), both[8:], rtol=1e-5, atol=1e-5)


def test_reference_weight_gradient_and_weighting_are_checked():
    for bad in (-0.1, 1.5, "all", None):
        with pytest.raises(ValueError, match="reference_weight"):
            RefBatchNorm2d(C, reference_weight=bad)
    with pytest.raises(ValueError, match="gradient must be one of"):
        RefBatchNorm2d(C, gradient="exact")
    with pytest.raises(ValueError, match="weighting must be one of fixed, count"):
        RefBatchNorm2d(C, weighting="pooled")


def test_capture_pools_several_calls_and_touches_nothing_else():
    layer = RefBatchNorm2d(C)
    before = copy.deepcopy(layer.state_dict())
    parts = [batch(1, 2), batch(2, 5, 4.0, 3.0), batch(3, 1)]
    layer.start_recording(Recording.CAPTURE)
    for part in parts:
        own = F.batch_norm(part, None, None, training=True)
        torch.testing.assert_close(layer(part), own, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    layer.commit(layer.recorded_moments)
    together = torch.cat(parts)
    torch.testing.assert_close(layer.ref_mean, together.mean((0, 2, 3)))
    torch.testing.assert_close(layer.ref_var, together.var((0, 2, 3), correction=0))
    assert layer.ref_count == together.numel() // C


def test_slice_normalizes_by_the_reference_and_averages_both_moments():
    reference, slice_ = batch(1, 8, 3.0, 2.0), batch(2, 2, 0.5, -1.0)
    layer = with_reference(RefBatchNorm2d(C), reference)
    mean, var = reference.mean((0, 2, 3)), reference.var((0, 2, 3), correction=0)
    layer.start_recording(Recording.SLICE)
    torch.testing.assert_close(layer(slice_), F.batch_norm(slice_, mean, var))
    layer.commit(layer.recorded_moments, 0.25)
    # These are the moments of a batch in which every fourth element comes from the slice.
    first = 0.75 * reference.mean((0, 2, 3)) + 0.25 * slice_.mean((0, 2, 3))
    second = 0.75 * reference.square().mean((0, 2, 3)) + 0.25 * slice_.square().mean((0, 2, 3))
    torch.testing.assert_close(layer.ref_mean, first)
    torch.testing.assert_close(layer.ref_var, second - first**2, rtol=1e-4, atol=1e-5)
    assert layer.ref_count == reference.numel() // C
    assert layer.num_batches_tracked == 0


def test_concat_uses_and_records_the_last_rows():
    layer = with_reference(RefBatchNorm2d(C))
    x = batch(5, 6)
    blended = RefBatchNorm2d(C)
    blended.load_state_dict(layer.state_dict())
    blended.commit(Moments(x[-2:].mean((0, 2, 3)), x[-2:].var((0, 2, 3), correction=0), 70), 0.25)
    layer.start_recording(Recording.CONCAT, 2, 0.25)
    before = layer.ref_mean.clone()
    torch.testing.assert_close(layer(x), blended(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.ref_mean, before)  # it changes only with commit
    layer.commit(layer.recorded_moments, 0.25)
    torch.testing.assert_close(layer.ref_var, blended.ref_var, rtol=1e-4, atol=1e-5)


def test_empty_batch_passes_with_zero_gradients():
    layer = with_reference(RefBatchNorm2d(C))
    before = copy.deepcopy(layer.state_dict())
    for recording in (Recording.OFF, Recording.CAPTURE, Recording.SLICE):
        layer.start_recording(recording)
        x = torch.zeros(0, C, 5, 7, requires_grad=True)
        y = layer(x)
        assert y.shape == x.shape
        layer.zero_grad()
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0.0] * C
        assert layer.recorded_moments is None
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_first_batch_becomes_the_reference_with_one_warning(caplog):
    warn_no_reference.cache_clear()
    layers = [RefBatchNorm2d(C), RefBatchNorm2d(C)]
    with caplog.at_level(logging.WARNING):
        for layer in layers:
            layer(batch(1))
    assert caplog.text.count("takes its first training batch as the reference") == 1
    torch.testing.assert_close(layers[0].ref_mean, batch(1).mean((0, 2, 3)))
    mean = layers[0].ref_mean.clone()
    layers[0](batch(2, shift=9))
    assert torch.equal(layers[0].ref_mean, mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16])
def test_autocast_takes_moments_in_float32_and_keeps_channels_last(dtype):
    conv, layer = nn.Conv2d(3, C, 3), with_reference(RefBatchNorm2d(C))
    net = nn.Sequential(conv, layer).to(memory_format=torch.channels_last)
    x = (torch.randn(4, 3, 9, 9) + 20).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype):
        y = net(x)
        y.float().square().mean().backward()
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype), torch.no_grad():
        h = conv(x).double()
    layer.start_recording(Recording.CAPTURE)
    with torch.autocast("cpu", dtype), torch.no_grad():
        net(x)
    torch.testing.assert_close(
        layer.recorded_moments.mean.double(), h.mean((0, 2, 3)), rtol=1e-5, atol=1e-5
    )
    assert (
        layer.ref_mean.dtype == layer.running_var.dtype == conv.weight.grad.dtype == torch.float32
    )
    assert conv.weight.grad.isfinite().all()


def test_half_precision_module():
    layer = with_reference(RefBatchNorm2d(C)).bfloat16()
    x = batch(3).bfloat16().requires_grad_()
    layer(x).float().square().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16


def test_state_dict_goes_to_batch_norm_and_back():
    bn = nn.BatchNorm2d(C)
    bn(batch(1, shift=3))
    layer = RefBatchNorm2d(C)
    layer.load_state_dict(bn.state_dict())  # strict
    assert torch.equal(layer.ref_mean, bn.running_mean) and torch.equal(
        layer.ref_var, bn.running_var
    )
    assert layer.has_reference()
    assert set(layer.state_dict()) == set(bn.state_dict()) | {"ref_mean", "ref_var", "ref_count"}
    other = nn.BatchNorm2d(C)
    keys = other.load_state_dict(layer.state_dict(), strict=False)
    assert keys.missing_keys == []
    torch.testing.assert_close(other.eval()(batch(2)), layer.eval()(batch(2)))
    fresh = RefBatchNorm2d(C)
    fresh.load_state_dict(with_reference(RefBatchNorm2d(C)).state_dict())
    assert fresh.has_reference() and fresh.ref_count == 8 * 35


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(clone):
    layer = with_reference(RefBatchNorm2d(C, weighting="count", gradient="pooled"))
    other = clone(layer)
    torch.testing.assert_close(other(batch(1)), layer(batch(1)))
    assert other.weighting == "count" and other.gradient == "pooled"


@needs("torch", 2, 5, "torch.onnx.export(dynamo=False)")
@pytest.mark.filterwarnings("ignore")
def test_trace_and_onnx_in_eval_mode(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Conv2d(C, C, 3, bias=False), with_reference(RefBatchNorm2d(C))).eval()
    x = batch(1)
    torch.testing.assert_close(torch.jit.trace(net, x)(batch(2)), net(batch(2)))
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), str(path), dynamo=False, input_names=["x"])
    session = onnxruntime.InferenceSession(str(path))
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_trains_as_eager():
    eager = with_reference(RefBatchNorm2d(C))
    compiled_layer = copy.deepcopy(eager)
    compiled = torch.compile(compiled_layer, fullgraph=True)
    x = [batch(1).requires_grad_() for _ in range(2)]
    y = [eager(x[0]), compiled(x[1])]
    for output in y:
        (output**3).mean().backward()
    torch.testing.assert_close(y[1], y[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x[1].grad, x[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled_layer.running_var, eager.running_var)


def _ddp_step(rank, port, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(C, C, 1), with_reference(RefBatchNorm2d(C)))
    model = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    model(batch(rank)).square().sum().backward()
    if rank == 0:
        torch.save([p.grad for p in net.parameters()], path)
    torch_compat.destroy_process_group()


def test_ddp_averages_the_gradients_of_the_workers(tmp_path, free_port):
    mp.spawn(_ddp_step, args=(free_port, tmp_path / "grads.pth"), nprocs=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(C, C, 1), with_reference(RefBatchNorm2d(C)))
    for rank in range(2):  # each worker with its own batch's moments
        (net(batch(rank)).square().sum() / 2).backward()
    for got, parameter in zip(torch.load(tmp_path / "grads.pth"), net.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)


def test_refbn_layers_names_each_layer_once():
    shared = RefBatchNorm2d(C)
    model = nn.Sequential(shared, nn.Sequential(shared, RefBatchNorm2d(C)), nn.BatchNorm2d(C))
    assert [name for name, _ in refbn_layers(model)] == ["0", "1.1"]
