"""Oracles: float64 autograd of the written-out equations, and torch's own batch norm."""

import pytest
import torch
import torch.nn.functional as F

from refbn_d2.layers.functional import GRADIENTS, batch_moments, mix_moments, ref_batch_norm
from refbn_d2.utils.errors import RefBNError
from tests.versions import FLOAT16

N, C, H, W = 6, 5, 3, 4
EPS = 1e-3


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "x": randn(N, C, H, W) * 2 + 1,
        "dy": randn(N, C, H, W),
        "gamma": randn(C),
        "beta": randn(C),
        "ref_mean": randn(C),
        "ref_var": randn(C).square() + 0.1,
    }


def moments(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


def col(v):
    return v.view(1, -1, 1, 1)


def written_out(x, gamma, beta, ref_mean, ref_var, w, gradient, rows=0, momentum=0.0):
    """Compute the equations as written, for autograd."""
    mean_b, var_b = moments(x)
    if rows:
        mean_s, var_s = moments(x[-rows:])
        if gradient != "reference":
            mean_s, var_s = mean_s.detach(), var_s.detach()
        second = (1 - momentum) * (ref_var + ref_mean**2) + momentum * (var_s + mean_s**2)
        ref_mean = (1 - momentum) * ref_mean + momentum * mean_s
        ref_var = second - ref_mean**2
    mean = w * ref_mean + (1 - w) * mean_b
    var = w * ref_var + (1 - w) * var_b + w * (1 - w) * (ref_mean - mean_b) ** 2
    if gradient == "batch":
        z = (x - col(mean_b)) / col(var_b + EPS).sqrt()
        a = ((var_b + EPS) / (var + EPS)).sqrt().detach()
        d = ((mean_b - mean) / (var + EPS).sqrt()).detach()
        return col(gamma) * (col(a) * z + col(d)) + col(beta)
    return col(gamma) * (x - col(mean)) / col(var + EPS).sqrt() + col(beta)


def gradients(f, x, gamma, beta, dy):
    x, gamma, beta = (t.detach().clone().requires_grad_() for t in (x, gamma, beta))
    y = f(x, gamma, beta)
    return y, *torch.autograd.grad(y, (x, gamma, beta), dy.to(y.dtype))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("rows, momentum", [(0, 0.0), (2, 0.25), (2, 1.0)])
@pytest.mark.parametrize("w", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_output_and_gradients_are_those_of_the_equations(
    data, gradient, w, rows, momentum, channels_last
):
    x, ref_mean, ref_var = data["x"], data["ref_mean"], data["ref_var"]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    blended = (ref_mean, ref_var)
    if rows:
        blended = mix_moments(ref_mean, ref_var, *moments(x[-rows:]), momentum)
    ours = gradients(
        lambda x, g, b: ref_batch_norm(
            x, *blended, g, b, w, gradient, eps=EPS, appended=(rows, momentum)
        ),
        x, data["gamma"], data["beta"], data["dy"],
    )  # fmt: skip
    oracle = gradients(
        lambda x, g, b: written_out(x, g, b, ref_mean, ref_var, w, gradient, rows, momentum),
        x, data["gamma"], data["beta"], data["dy"],
    )  # fmt: skip
    for name, a, b in zip(("y", "dx", "dgamma", "dbeta"), ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert ours[0].is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("w", [0.0, 0.4, 1.0])
def test_gradcheck_of_the_exact_gradient(data, w):
    x, gamma, beta = (data[k].clone().requires_grad_() for k in ("x", "gamma", "beta"))

    def function(x, gamma, beta):
        reference = data["ref_mean"], data["ref_var"]
        return ref_batch_norm(x, *reference, gamma, beta, w, "pooled", eps=EPS)

    assert torch.autograd.gradcheck(function, (x, gamma, beta))


def test_gradcheck_of_virtual_batch_norm(data):
    """The whole reference is appended, w = momentum = 1: the derivative goes through it too."""
    x = data["x"].clone().requires_grad_()

    def vbn(x):
        return ref_batch_norm(
            x,
            *batch_moments(x[-4:].detach()),
            None,
            None,
            1.0,
            "reference",
            eps=EPS,
            appended=(4, 1.0),
        )

    assert torch.autograd.gradcheck(vbn, (x,))


def test_count_weight_is_batch_norm_over_reference_and_batch(data):
    reference, x = data["x"][:2], data["x"][2:]
    w = len(reference) / N
    y = ref_batch_norm(x, *moments(reference), data["gamma"], data["beta"], w, eps=EPS)
    both = F.batch_norm(data["x"], None, None, data["gamma"], data["beta"], True, eps=EPS)
    torch.testing.assert_close(y, both[2:])


@pytest.fixture(params=[False, True], ids=["as on the CPU", "as on a GPU"])
def kernels(request, monkeypatch):
    """Return every gradient of BN's kernel, as on a GPU, whatever the mask says."""
    kernel = torch.ops.aten.native_batch_norm_backward
    if request.param:
        every = lambda *args: kernel(*args[:-1], [True] * 3)  # noqa: E731
        monkeypatch.setattr(torch.ops.aten, "native_batch_norm_backward", every)


@pytest.mark.usefixtures("kernels")
def test_without_affine(data):
    x = data["x"].clone().requires_grad_()
    for gradient in GRADIENTS:
        y = ref_batch_norm(x, data["ref_mean"], data["ref_var"], gradient=gradient, eps=EPS)
        ones, zeros = torch.ones(C, dtype=x.dtype), torch.zeros(C, dtype=x.dtype)
        oracle = written_out(x, ones, zeros, data["ref_mean"], data["ref_var"], 0.9, gradient)
        torch.testing.assert_close(y, oracle)
        got, expected = (torch.autograd.grad(t, x, data["dy"])[0] for t in (y, oracle))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [FLOAT16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_moments_of_half_precision_are_float32(dtype, channels_last):
    x = (torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0)) + 30).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    mean, var = batch_moments(x)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean.double(), moments(x.double())[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), moments(x.double())[1], rtol=1e-4, atol=0)


def test_one_element_a_channel():
    x = torch.randn(1, C, 1, 1).bfloat16()
    assert batch_moments(x)[1].tolist() == [0.0] * C
    ref = torch.zeros(C), torch.ones(C)
    running = torch.zeros(C), torch.ones(C)
    y = ref_batch_norm(x.float(), *ref, None, None, 0.5, "batch", *running)
    assert y.isfinite().all() and running[1].isfinite().all()
    with pytest.raises(RefBNError, match="more than 1 value per channel.*REFERENCE_WEIGHT"):
        ref_batch_norm(x, *ref, reference_weight=0.0)


def test_unknown_gradient():
    with pytest.raises(ValueError, match="pooled, batch, reference, not 'exact'"):
        ref_batch_norm(torch.ones(2, C, 2, 2), torch.zeros(C), torch.ones(C), gradient="exact")
