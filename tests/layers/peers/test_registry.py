"""Tests that every peer passes. Oracle: nn.BatchNorm2d."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refbn_d2.layers.peers import (
    PEERS,
    link_cbn,
    link_mabn,
    peer_options,
    prepare_peers,
    restart_peers,
)
from tests.versions import FLOAT16

C_IN, C = 3, 6


def batch(seed, n=4):
    return torch.randn(n, C_IN, 6, 7, generator=torch.Generator().manual_seed(seed)) + 1


@pytest.fixture(params=PEERS)
def net(request):
    """Return a convolution and a peer: after 8 steps burn-in and warm-up are over."""
    torch.manual_seed(0)
    short = {
        "BRN": {"ramp_steps": 4},
        "CBN": {"window": 3, "burn_in": 2},
        "MABN": {"window": 3, "warmup_steps": 2, "renorm_steps": 4},
    }
    norm = PEERS[request.param](C, **short[request.param])
    net = nn.Sequential(nn.Conv2d(C_IN, C, 3, bias=False), norm)
    link_cbn(net)
    link_mabn(net)
    return net


def train(net, steps=8):
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        net(batch(step)).pow(3).mean().backward()
        optimizer.step()
    return net


def test_it_is_a_batch_norm_with_its_state(net):
    bn = nn.BatchNorm2d(C)
    assert isinstance(net[1], nn.BatchNorm2d)
    assert list(bn.state_dict()) == [k for k in net[1].state_dict() if k in bn.state_dict()]
    bn(batch(0)[:, :1].expand(-1, C, -1, -1))
    net[1].load_state_dict(bn.state_dict())  # strict
    torch.testing.assert_close(net[1].running_var, bn.running_var)
    assert net[1].steps == 0


def test_eval_mode_is_batch_norm(net):
    train(net).eval()
    plain = nn.Sequential(nn.Conv2d(C_IN, C, 3, bias=False), nn.BatchNorm2d(C)).eval()
    assert plain.load_state_dict(net.state_dict(), strict=False).missing_keys == []
    before = copy.deepcopy(net.state_dict())
    torch.testing.assert_close(net(batch(9)), plain(batch(9)))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_state_dict_round_trip_continues_the_run(net):
    other = copy.deepcopy(net)
    train(net)
    other.load_state_dict(net.state_dict())
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    if not hasattr(net[1], "past"):  # CBN fills its window again
        torch.testing.assert_close(other(batch(9)), net(batch(9)))


def test_a_restarted_layer_trains_as_a_new_one_with_its_weights_and_statistics(net):
    if type(net[1]) is PEERS["CBN"]:
        net[1].burn_in = 0  # so that the first steps use the past
    new = copy.deepcopy(net)
    train(net)
    forgotten = ("steps", "moments")  # MABN's windows
    kept = {k: v for k, v in net.state_dict().items() if not k.endswith(forgotten)}
    new.load_state_dict(kept, strict=False)
    restart_peers(net)
    assert net[1].steps == 0
    train(new), train(net)
    for key, value in new.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_as_the_original_and_apart_from_it(net, clone):
    train(net)
    other = clone(net)
    before = copy.deepcopy(net.state_dict())
    train(other, 4)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    train(net, 4)
    torch.testing.assert_close(other(batch(9)), net(batch(9)))


def test_an_empty_batch_passes_with_zero_gradients(net):
    train(net)
    before, past = copy.deepcopy(net.state_dict()), list(getattr(net[1], "past", []))
    x = torch.zeros(0, C_IN, 6, 7, requires_grad=True)
    net.zero_grad()
    y = net(x)
    assert y.shape == (0, C, 4, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert list(getattr(net[1], "past", [])) == past
    net(batch(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16])
def test_under_autocast_statistics_are_float32(net, dtype):
    reference = train(copy.deepcopy(net))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    net.to(memory_format=torch.channels_last)
    for step in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            y = net(batch(step).contiguous(memory_format=torch.channels_last))
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        y.float().pow(3).mean().backward()
        optimizer.step()
    for (key, value), expected in zip(
        net.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected, rtol=0.05, atol=0.05, msg=key)
    for moments in getattr(net[1], "past", []):
        assert all(t.dtype == torch.float32 for t in moments)


def test_half_precision_module(net):
    net.bfloat16()
    x = batch(0).bfloat16().requires_grad_()
    for _ in range(6):
        net(x).float().square().sum().backward()
    assert x.grad.dtype == net[1].weight.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all() and net[1].running_var.isfinite().all()


def test_without_gradients_training_mode_still_works(net):
    with torch.no_grad():
        for step in range(8):
            net(batch(step))
    assert net[1].steps == 8


def test_cumulative_average(net):
    norm = net[1]
    norm.momentum = None
    for _ in range(3):
        net(batch(0))  # the same batch: its cumulative average is itself
    with torch.no_grad():
        x = net[0](batch(0))
    net[1].eval()
    expected = x.var((0, 2, 3)) if type(norm) is not PEERS["MABN"] else x.square().mean((0, 2, 3))
    torch.testing.assert_close(norm.running_var, expected)
    torch.testing.assert_close(
        net(batch(0)), F.batch_norm(x, norm.running_mean, expected), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", PEERS)
def test_it_learns_a_small_task_in_a_short_run(name):
    """Learn which quadrant is brighter, in 400 steps of 4 pictures; chance is 0.25."""
    generator = torch.Generator().manual_seed(1)

    def pictures(n):
        y = torch.randint(0, 4, (n,), generator=generator)
        x = torch.randn(n, 2, 2, 8, 8, generator=generator)  # (N, row, column, 8, 8)
        x[torch.arange(n), y // 2, y % 2] += 0.7
        return x.permute(0, 1, 3, 2, 4).reshape(n, 1, 16, 16), y

    torch.manual_seed(0)
    layers, channels = [], [1, 16, 32, 32]
    for c_in, c_out, stride in zip(channels, channels[1:], (1, 2, 1), strict=False):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, bias=False), PEERS[name](c_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 4))
    prepare_peers(model, 400)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9)
    for _ in range(400):
        x, y = pictures(4)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = pictures(256)
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


def test_schedules_are_the_papers_in_long_runs_and_scaled_in_short_ones():
    assert peer_options("BRN", 160_000) == {"ramp_steps": 40_000, "momentum": 0.01}
    assert peer_options("BRN", 3200) == {"ramp_steps": 800, "momentum": 0.05}
    assert peer_options("BRN", 100)["momentum"] == 0.1
    assert peer_options("MABN", 600_000) == {"warmup_steps": 100, "renorm_steps": 1000}
    assert peer_options("MABN", 1000) == {"warmup_steps": 100, "renorm_steps": 250}
    for name, peer in PEERS.items():
        peer(C, **peer_options(name, 500))
    with pytest.raises(ValueError, match="unknown peer norm 'XBN'; known: BRN, CBN, MABN"):
        peer_options("XBN", 500)
