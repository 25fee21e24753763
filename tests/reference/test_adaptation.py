"""`adapt_reference`, held against arithmetic by hand on a model of two layers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d, refbn_layers
from refbn_d2.reference import adapt_reference

A = 32 / (32 + 16)
PRIOR, EPS = 20.0, 1e-5
OLD = [(np.array([0.5, -1.0]), np.array([2.0, 0.5])), (np.array([0.1, 3.0]), np.array([1.5, 4.0]))]


def make(norm, **options):
    """A norm, a 1x1 convolution without bias, a norm: with OLD moments and drawn gamma, beta."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(norm(2, **options), nn.Conv2d(2, 2, 1, bias=False), norm(2, **options))
    model = model.double()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator).double())
    for layer, (mean, var) in zip((model[0], model[2]), OLD, strict=True):
        kind = "running" if norm is RefBatchNorm2d else "ref"
        getattr(layer, f"{kind}_mean").copy_(torch.tensor(mean))
        getattr(layer, f"{kind}_var").copy_(torch.tensor(var))
        layer.ref_count.fill_(7)
    return model.eval()


def pictures(n=6, size=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(n, 2, size, size, generator=generator).double()


def pooled(old, x, a=A):
    """Moments of a population: a share 1-a of it has the moments `old`, the rest is x."""
    first = (1 - a) * old[0] + a * x.mean(axis=(0, 2, 3))
    second = (1 - a) * (old[1] + old[0] ** 2) + a * (x**2).mean(axis=(0, 2, 3))
    return first, second - first**2


def normalized(norm, layer, x, mean, var):
    """What the layer computes in eval mode with these moments, image by image."""
    gamma, beta = (p.detach().numpy() for p in (layer.weight, layer.bias))
    out = np.empty_like(x)
    for i, image in enumerate(x):
        m, v = mean, var
        if norm is RefInstanceNorm2d:
            share = image[0].size / (image[0].size + PRIOR)
            m, v = pooled((mean, var), image[None], share)
        out[i] = (
            (image - m[:, None, None]) / np.sqrt(v + EPS)[:, None, None] * gamma[:, None, None]
        ) + beta[:, None, None]
    return out


@pytest.mark.parametrize("norm", [RefBatchNorm2d, RefInstanceNorm2d])
def test_two_layers_by_hand(norm):
    model = make(norm, **({"prior_count": PRIOR} if norm is RefInstanceNorm2d else {}))
    images = pictures()
    recorded = adapt_reference(model, images, A)

    x = images.numpy()
    first = pooled(OLD[0], x)
    x = normalized(norm, model[0], x, *first)
    kernel = model[1].weight.detach().numpy()[:, :, 0, 0]
    x = np.einsum("oc,nchw->nohw", kernel, x)
    second = pooled(OLD[1], x)
    expected = normalized(norm, model[2], x, *second)

    assert list(recorded) == ["0", "2"]
    for layer, (mean, var) in ((model[0], first), (model[2], second)):
        for kind in ["ref"] + ["running"] * (norm is RefBatchNorm2d):
            np.testing.assert_allclose(getattr(layer, f"{kind}_mean").numpy(), mean, rtol=1e-10)
            np.testing.assert_allclose(getattr(layer, f"{kind}_var").numpy(), var, rtol=1e-10)
        assert layer.ref_count == round(images[:, 0].numel() / A)
    # The adapted model computes on the same images what it computed in the pass.
    np.testing.assert_allclose(model(images).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def test_a_norm_that_is_called_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RefBatchNorm2d(2)

        def forward(self, x):
            return self.norm(x=x)

    model, x = ByKeyword(), torch.randn(3, 2, 4, 4) + 5
    adapt_reference(model, x, weight=1)
    torch.testing.assert_close(model.norm.running_mean, x.mean((0, 2, 3)))


def test_weight_1_forgets_the_old_moments():
    model = make(RefBatchNorm2d)
    adapt_reference(model, pictures(), 1)
    out = model(pictures())
    assert torch.allclose(out.mean((0, 2, 3)), model[2].bias)


def test_a_layer_called_twice_pools_by_count():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RefBatchNorm2d(2)

        def forward(self, x):
            return self.norm(x[:, :, :1]).sum() + self.norm(x[:, :, 1:]).sum()

    head = Head()
    images = pictures().float()
    recorded = adapt_reference(head, images, A)
    mean, var = pooled((np.zeros(2), np.ones(2)), images.double().numpy())
    np.testing.assert_allclose(head.norm.running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(head.norm.running_var.numpy(), var, rtol=1e-5)
    assert recorded["norm"].count == images[:, 0].numel()


def test_nothing_else_changes():
    model = nn.Sequential(make(RefBatchNorm2d), nn.BatchNorm2d(2).double(), nn.Dropout())
    model[0].train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    adapt_reference(model, list(pictures()), A)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    kinds = ("running_mean", "running_var", "ref_mean", "ref_var", "ref_count")
    assert changed == {f"0.{layer}.{kind}" for layer in (0, 2) for kind in kinds}
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_pre_hooks for _, layer in refbn_layers(model))
    assert all(layer.recorded_moments is None for _, layer in refbn_layers(model))


def test_an_error_leaves_the_model_as_it_was():
    model = make(RefBatchNorm2d)
    model[0].reset_reference()
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def forward(samples):
        model(torch.stack(samples))
        raise MemoryError

    with pytest.raises(MemoryError):
        adapt_reference(model, pictures(), A, forward)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not model[0].has_reference()


def test_an_empty_input_changes_nothing():
    model = make(RefBatchNorm2d)
    before = model[2].running_mean.clone()
    recorded = adapt_reference(model, pictures(), A, lambda s: model[2](torch.empty(0, 2, 3, 3)))
    assert recorded == {"0": None, "2": None}
    assert torch.equal(model[2].running_mean, before)


def test_bad_arguments():
    model = make(RefBatchNorm2d)
    for weight in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            adapt_reference(model, pictures(), weight)
    with pytest.raises(ValueError, match="samples are none"):
        adapt_reference(model, [], A)
    with pytest.raises(ValueError, match="no RefBN or RefIN"):
        adapt_reference(nn.BatchNorm2d(2), pictures(), A)
