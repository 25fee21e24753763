"""Oracles: nn.BatchNorm2d (r = 1, d = 0), running statistics, float64 autograd of Algorithm 1."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refbn_d2.layers.peers import BatchRenorm2d

C = 5


def batch(seed, n=4, scale=1.0, shift=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, C, 3, 4, generator=generator, dtype=dtype) * scale + shift


def test_without_correction_it_is_batch_norm_over_many_steps():
    bn = nn.BatchNorm2d(C, momentum=0.1).double()
    brn = BatchRenorm2d(C, momentum=0.1, r_max=1, d_max=0, ramp_steps=0).double()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (bn, brn)]
    for step in range(20):
        data = batch(step, scale=1 + step / 5, shift=step / 5)
        x = [data.clone().requires_grad_() for _ in range(2)]
        y = [layer(t) for layer, t in zip((bn, brn), x, strict=True)]
        for output, optimizer in zip(y, optimizers, strict=True):
            optimizer.zero_grad()
            (output**3).mean().backward()
            optimizer.step()
        torch.testing.assert_close(y[1], y[0])
        torch.testing.assert_close(x[1].grad, x[0].grad)
    for name, value in bn.state_dict().items():
        torch.testing.assert_close(brn.state_dict()[name], value)


def test_where_nothing_is_clipped_it_normalizes_by_the_running_statistics():
    layer = BatchRenorm2d(C, r_max=1e6, d_max=1e6, ramp_steps=0).double()
    layer(batch(0, scale=2, shift=1))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = batch(1, shift=3)
    torch.testing.assert_close(layer(x), F.batch_norm(x, mean, var))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ramp_steps", [0, 8])
def test_outputs_gradients_and_statistics_are_those_of_algorithm_1(affine, ramp_steps):
    """Over several training steps, r and d are clipped on either side in some channels."""
    eps, momentum, final_r, final_d = 1e-3, 0.3, 1.5, 0.4
    layer = BatchRenorm2d(C, eps, momentum, affine, final_r, final_d, ramp_steps).double()
    gamma, beta = torch.randn(2, C, dtype=torch.float64)
    if affine:
        layer.load_state_dict({**layer.state_dict(), "weight": gamma, "bias": beta})
    else:
        gamma, beta = torch.ones_like(gamma), torch.zeros_like(beta)
    gamma.requires_grad_(), beta.requires_grad_()
    mean, var = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
    spread = torch.linspace(0.3, 2.0, C, dtype=torch.float64).view(1, -1, 1, 1)
    sides = {"r": set(), "d": set()}
    for step in range(16):
        data = batch(step) * spread * (1, 1, 1, 4)[step % 4] + (-1) ** step * spread * 0.5
        opened = step / ramp_steps if ramp_steps else 1
        r_max = 1 + (final_r - 1) * min(max((opened - 1 / 8) / (7 / 8), 0), 1)
        d_max = final_d * min(max((opened - 1 / 8) / (4 / 8), 0), 1)
        x, x_oracle = data.clone().requires_grad_(), data.clone().requires_grad_()
        dy = batch(100 + step)

        column = lambda v: v.view(1, -1, 1, 1)  # noqa: E731
        mu_b = x_oracle.mean((0, 2, 3))
        var_b = ((x_oracle - column(mu_b)) ** 2).mean((0, 2, 3))
        sigma_b, sigma = (var_b + eps) ** 0.5, (var + eps) ** 0.5
        raw_r = (sigma_b / sigma).detach()
        raw_d = ((mu_b - mean) / sigma).detach()
        r, d = raw_r.clip(1 / r_max, r_max), raw_d.clip(-d_max, d_max)
        if opened > 1 / 8:
            sides["r"] |= set((raw_r - r).sign().tolist())
            sides["d"] |= set((raw_d - d).sign().tolist())
        z = (x_oracle - column(mu_b)) / column(sigma_b)
        expected = column(gamma) * (z * column(r) + column(d)) + column(beta)
        n = data.numel() / C
        mean = (1 - momentum) * mean + momentum * mu_b.detach()
        var = (1 - momentum) * var + momentum * var_b.detach() * n / (n - 1)

        y = layer(x)
        torch.testing.assert_close(y, expected)
        inputs = [x, *layer.parameters()]
        oracle_inputs = [x_oracle, gamma, beta][: len(inputs)]
        got = torch.autograd.grad(y, inputs, dy)
        for a, b in zip(got, torch.autograd.grad(expected, oracle_inputs, dy), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, var)
    assert sides == {"r": {-1, 0, 1}, "d": {-1, 0, 1}}


def test_clips_open_in_the_papers_proportions():
    layer = BatchRenorm2d(C)
    # The paper: BatchNorm until 5,000, d_max = 5 at 25,000, r_max = 3 at 40,000.
    for step, r_max, d_max in [
        (0, 1, 0), (5_000, 1, 0), (15_000, 1 + 4 / 7, 2.5), (25_000, 1 + 8 / 7, 5),
        (40_000, 3, 5), (90_000, 3, 5),
    ]:  # fmt: skip
        layer.steps.fill_(step + 1)  # the value during the call of that step
        got = [float(clip) for clip in layer.clips()]
        assert got == pytest.approx([r_max, d_max], abs=1e-4), step


def test_steps_are_counted_apart_from_batch_norms():
    bn = nn.BatchNorm2d(C)
    bn.num_batches_tracked.fill_(10**6)
    layer = BatchRenorm2d(C)
    layer.load_state_dict(bn.state_dict())
    for seed in range(3):
        layer(batch(seed, dtype=torch.float32))
    layer.eval()(batch(0, dtype=torch.float32))
    assert (layer.steps, layer.num_batches_tracked) == (3, 10**6 + 3)


@pytest.mark.parametrize(
    "bad", [{"r_max": 0.5}, {"d_max": -1}, {"d_max": "5"}, {"ramp_steps": -1}, {"ramp_steps": 1.5}]
)
def test_arguments_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        BatchRenorm2d(C, **bad)
