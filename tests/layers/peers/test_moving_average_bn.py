"""Oracles: autograd (window 1), the formulas over lists of past batches, nn.BatchNorm2d in eval."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refbn_d2.layers.peers import BatchRenorm2d, LinkError, MovingAverageBatchNorm2d, link_mabn
from tests.versions import needs

C_IN, C = 4, 6


def batch(seed, n=3, channels=C_IN, shift=0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, 5, 6, generator=generator, dtype=dtype) + shift


def conv_and_mabn(bias=False, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(C_IN, C, 3, bias=bias), MovingAverageBatchNorm2d(C, **options))
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    link_mabn(net)
    return net.double()


def linked(layer):
    layer.slot = "norm"  # for tests of the layer without its convolution
    return layer.double()


def column(v):
    return v.view(1, -1, 1, 1)


def test_a_window_of_1_has_the_exact_gradient_of_its_forward_pass():
    layer = linked(MovingAverageBatchNorm2d(C, 1e-3, window=1, warmup_steps=0))
    nn.init.normal_(layer.weight)
    for step in range(4):
        x = batch(step, channels=C).requires_grad_()
        z = x / column((x**2).mean((0, 2, 3)) + 1e-3).sqrt()
        expected = column(layer.weight) * z + column(layer.bias)
        y, dy = layer(x), batch(50 + step, channels=C)
        torch.testing.assert_close(y, expected)
        inputs = x, layer.weight, layer.bias
        for got, correct in zip(
            torch.autograd.grad(y, inputs, dy),
            torch.autograd.grad(expected, inputs, dy),
            strict=True,
        ):
            torch.testing.assert_close(got, correct)


@pytest.mark.parametrize("affine", [True, False])
def test_outputs_gradients_and_statistics_over_many_steps(affine):
    """Compare with the formulas of section 4 over lists: warm-up, then averages, then clipped r."""
    eps, momentum, window, warmup, renorm, r_max = 1e-3, 0.1, 3, 5, 7, 1.3
    layer = linked(
        MovingAverageBatchNorm2d(C, eps, momentum, affine, window, warmup, renorm, r_max)
    )
    gamma, beta = torch.ones(C).double(), torch.zeros(C).double()
    if affine:
        gamma, beta = nn.init.normal_(layer.weight).detach(), nn.init.normal_(layer.bias).detach()
    chi2s, psis, ema, sides = [], [], torch.ones(C).double(), set()
    spread = column(torch.linspace(0.5, 1.6, C).double())
    for step in range(1, 13):
        growth = 1.5 if step > 9 else 1
        x, dy = batch(step, channels=C) * spread * growth, batch(100 + step, channels=C)
        x.requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)

        chi2s.append((x.detach() ** 2).mean((0, 2, 3)))
        averages = step > window and step >= warmup
        chi2 = sum(chi2s[-window:]) / window if averages else chi2s[-1]
        chi, raw_r = (chi2 + eps) ** 0.5, ((chi2 + eps) / (ema + eps)) ** 0.5
        r = raw_r.clip(1 / r_max, r_max) if step > renorm else torch.ones(C).double()
        if step > renorm:
            sides |= set((raw_r - r).sign().tolist())
        z = x.detach() / column(chi)
        g = dy * column(gamma * r)
        psis.append((g * z).mean((0, 2, 3)))
        psi = sum(psis[-window:]) / window if averages else psis[-1]
        ema = (1 - momentum) * ema + momentum * chi2

        torch.testing.assert_close(y, column(gamma * r) * z + column(beta))
        torch.testing.assert_close(gradients[0], (g - z * column(psi)) / column(chi))
        if affine:
            torch.testing.assert_close(gradients[1], (dy * z * column(r)).sum((0, 2, 3)))
            torch.testing.assert_close(gradients[2], dy.sum((0, 2, 3)))
        torch.testing.assert_close(layer.running_var, ema)
    assert sides == {-1, 0, 1}
    assert not layer.running_mean.any()
    y = layer.eval()(x)
    expected = column(gamma) * x / column((ema + eps) ** 0.5) + column(beta)
    torch.testing.assert_close(y, expected)


def test_a_gradient_that_overflows_is_not_averaged():
    """A GradScaler skips such a step; the next gradients are finite again."""
    layer = linked(MovingAverageBatchNorm2d(C, window=2, warmup_steps=0))
    for step in range(3):
        layer(batch(step, channels=C)).square().mean().backward()
    before = layer.gradient_moments.clone()
    x = batch(3, channels=C).requires_grad_()
    layer(x).backward(torch.full_like(x, torch.inf))
    torch.testing.assert_close(layer.gradient_moments, before)
    x = batch(4, channels=C).requires_grad_()
    layer(x).square().mean().backward()
    assert x.grad.isfinite().all() and not torch.equal(layer.gradient_moments, before)


def test_the_convolution_before_it_is_centralized_gradient_included():
    net = conv_and_mabn(bias=True)
    weight = net[0].weight
    nn.init.normal_(weight, mean=0.3)
    x = batch(0)
    centralized = weight - weight.mean((1, 2, 3), keepdim=True)
    expected = F.conv2d(x, centralized, net[0].bias)
    y = net[0](x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    got, correct = (torch.autograd.grad(t, weight, dy)[0] for t in (y, expected))
    torch.testing.assert_close(got, correct)
    torch.testing.assert_close(got.sum((1, 2, 3)), torch.zeros(C).double(), atol=1e-9, rtol=0)
    assert net[0].weight is weight and "weight" not in net[0].__dict__


@needs("torch", 2, 1, "register_forward_hook(always_call=True)")
def test_the_weight_is_itself_again_after_a_failure():
    net, x = conv_and_mabn(), batch(0)
    weight = net[0].weight
    with pytest.raises(RuntimeError):
        net[0](x[:, :2])
    assert net[0].weight is weight and "weight" not in net[0].__dict__


def test_training_is_that_of_an_explicit_parametrization_and_saving_does_not_disturb_it():
    """Train V, W = V - mean(V), by SGD with momentum and decay; read the state dict each step."""

    class Explicit(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.v = nn.Parameter(net[0].weight.detach().clone())
            self.norm = linked(copy.deepcopy(net[1]))

        def forward(self, x):
            return self.norm(F.conv2d(x, self.v - self.v.mean((1, 2, 3), keepdim=True)))

    net = conv_and_mabn(window=2, warmup_steps=3, renorm_steps=5)
    models = net, Explicit(net)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=0.01) for m in models]
    for step in range(12):
        outputs = [model(batch(step)) for model in models]
        torch.testing.assert_close(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (output**3).mean().backward()
            optimizer.step()
        net.state_dict()


def test_its_checkpoint_is_a_batch_norm_model_in_eval_mode():
    net = conv_and_mabn()
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for step in range(5):
        optimizer.zero_grad()
        net(batch(step)).pow(3).mean().backward()
        optimizer.step()
    state = net.state_dict()
    assert state["0.weight"].data_ptr() == net[0].weight.data_ptr()  # an EMA model writes to it
    plain = nn.Sequential(nn.Conv2d(C_IN, C, 3, bias=False), nn.BatchNorm2d(C)).double()
    assert plain.load_state_dict(state, strict=False).missing_keys == []
    torch.testing.assert_close(plain.eval()(batch(9)), net.eval()(batch(9)))
    again = conv_and_mabn()
    again.load_state_dict(state)
    net.train(), again.train()
    torch.testing.assert_close(again(batch(10)), net(batch(10)))


def test_a_batch_norm_checkpoint_starts_it_anew_and_its_means_are_dropped(caplog):
    bn = nn.Sequential(nn.Conv2d(C_IN, C, 3), nn.BatchNorm2d(C)).double()
    bn(batch(0))
    net = conv_and_mabn(bias=True)
    net(batch(1))
    with caplog.at_level(logging.WARNING):
        net.load_state_dict(bn.state_dict())  # strict
    assert "1: the running means of a BatchNorm are dropped" in caplog.text
    assert not net[1].running_mean.any() and net[1].steps == 0
    torch.testing.assert_close(net[1].running_var, bn[1].running_var)


def test_another_peers_checkpoint_starts_its_schedule_anew():
    source, layer = BatchRenorm2d(C), MovingAverageBatchNorm2d(C)
    source.steps.fill_(5000)
    layer.load_state_dict(source.state_dict())  # strict
    assert layer.steps == 0


def test_linking_leaves_the_model_clean_and_refuses_by_name():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", norm_layer=MovingAverageBatchNorm2d)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    link_mabn(model)
    hooks = len(model.conv1._forward_pre_hooks)
    link_mabn(model)
    assert len(model.conv1._forward_pre_hooks) == hooks == 1
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in parameters)
    with pytest.raises(LinkError, match=r"MovingAverageBatchNorm2d needs .* at 1 \(no Conv2d"):
        link_mabn(nn.Sequential(nn.ReLU(), MovingAverageBatchNorm2d(C)))
    with pytest.raises(LinkError, match="at 1: .* single weight per output"):
        link_mabn(nn.Sequential(nn.Conv2d(C, C, 1, groups=C), MovingAverageBatchNorm2d(C)))


def test_a_layer_that_was_not_linked_says_what_to_do():
    layer = MovingAverageBatchNorm2d(C)
    layer.eval()(torch.ones(2, C, 3, 3))
    with pytest.raises(LinkError, match=r"link_mabn\(model\)"):
        layer.train()(torch.ones(2, C, 3, 3))


@pytest.mark.parametrize(
    "bad", [{"window": 0}, {"warmup_steps": -1}, {"renorm_steps": 0.5}, {"r_max": 0.9}]
)
def test_arguments_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MovingAverageBatchNorm2d(C, **bad)
