"""Every norm on a GPU, in each precision and memory format. Oracle: float64 on the CPU."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d, has_refbn
from refbn_d2.layers.functional import GRADIENTS
from refbn_d2.layers.peers import PEERS, link_cbn, link_mabn
from refbn_d2.reference.isolation import untouched
from tests.device import on_gpu

pytestmark = on_gpu
C = 16
NORMS = {f"RefBN {g}": partial(RefBatchNorm2d, C, gradient=g) for g in GRADIENTS}
NORMS |= {"RefIN": partial(RefInstanceNorm2d, C)}
NORMS |= {name: partial(kind, C) for name, kind in PEERS.items()}
NORMS |= {f"{name}, not affine": partial(norm, affine=False) for name, norm in NORMS.items()}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def model(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, C, 3, bias=False), NORMS[name](), nn.Conv2d(C, 4, 1))
    link_cbn(net)
    link_mabn(net)
    return net


def trained(net, device, dtype, layout, autocast=None):
    """Train 6 steps; return the losses, the last input's gradient and the state, on the CPU."""
    net = net.to(device, dtype, memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    losses = []
    for step in range(6):
        x = torch.randn(4, 3, 20, 24, generator=torch.Generator().manual_seed(step)) + 1
        x = x.to(device, dtype).contiguous(memory_format=layout).requires_grad_()
        optimizer.zero_grad()
        with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
            y = net(x)
        assert y.dtype == (autocast or dtype)
        loss = (y.float() if autocast else y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = {"loss": torch.stack(losses), "input gradient": x.grad, **net.state_dict()}
    return {key: value.detach().double().cpu() for key, value in state.items()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", NORMS)
def test_it_trains_as_on_the_cpu(name, precision, layout):
    net = model(name)
    expected = trained(copy.deepcopy(net), "cpu", torch.float64, torch.contiguous_format)
    autocast = None if precision == torch.float32 else precision
    found = trained(net, "cuda", torch.float32, layout, autocast)
    for key, value in expected.items():
        scale = value.abs().max().item() or 1
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=TOLERANCE[precision] * scale, msg=lambda m, k=key: k + m
        )


@pytest.mark.parametrize("name", NORMS)
def test_a_capture_restores_the_gpu(name):
    net = model(name).cuda()
    x = torch.randn(4, 3, 20, 24, device="cuda")
    net(x)
    before = copy.deepcopy(net.state_dict())
    generator = torch.cuda.get_rng_state()
    drawn = []
    for _ in range(2):
        with untouched(net, seed=5):
            net(x)
            drawn.append(torch.rand(3, device="cuda"))
    assert torch.equal(*drawn)
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", [name for name in NORMS if name.startswith("Ref")])
def test_evaluation_needs_no_batch(name):
    net = model(name).cuda()
    assert has_refbn(net)
    x = torch.randn(4, 3, 20, 24, device="cuda")
    net(x)
    net.eval()
    alone = torch.cat([net(image[None]) for image in x])
    torch.testing.assert_close(net(x), alone, rtol=1e-4, atol=1e-5)
