"""Oracles: nn.BatchNorm2d (k = 1; the concatenation), the paper's formulas in float64 autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refbn_d2.layers.peers import CrossIterationBatchNorm2d, LinkError, link_cbn
from refbn_d2.layers.peers.linking import preceding_convolutions

C_IN, C = 4, 6


def batch(seed, n=3, shift=0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, C_IN, 7, 8, generator=generator, dtype=dtype) + shift


def conv_and_cbn(window=3, burn_in=0, eps=1e-3, **conv):
    torch.manual_seed(0)
    cbn = CrossIterationBatchNorm2d(C, eps, window=window, burn_in=burn_in)
    net = nn.Sequential(nn.Conv2d(C_IN, C, 3, **conv), cbn).double()
    nn.init.normal_(net[1].weight)
    link_cbn(net)
    return net


def test_k_1_is_batch_norm_over_many_steps():
    net = conv_and_cbn(window=1)
    bn = nn.Sequential(copy.deepcopy(net[0]), nn.BatchNorm2d(C, 1e-3)).double()
    bn[1].load_state_dict(net[1].state_dict(), strict=False)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (net, bn)]
    for step in range(10):
        y = [m(batch(step)) for m in (net, bn)]
        for output, optimizer in zip(y, optimizers, strict=True):
            optimizer.zero_grad()
            (output**3).mean().backward()
            optimizer.step()
        torch.testing.assert_close(*y)
    for name, value in bn.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value)


def test_with_still_weights_it_is_batch_norm_over_the_last_k_batches():
    net = conv_and_cbn(window=3)
    for last in range(5):
        together = net[0](torch.cat([batch(s) for s in range(max(0, last - 2), last + 1)]))
        both = F.batch_norm(together, None, None, net[1].weight, net[1].bias, True, eps=1e-3)
        torch.testing.assert_close(net(batch(last)), both[-3:])


class Oracle:
    """Section 3 of the paper as written, with full Jacobians by theta."""

    def __init__(self, k, eps, **conv):
        self.k, self.eps, self.conv = k, eps, conv
        self.past = []
        self.maximum_mattered = False

    def moments(self, x, theta, bias):
        z = F.conv2d(x, theta, bias, **self.conv)
        return z.mean((0, 2, 3)), (z**2).mean((0, 2, 3)), z

    def __call__(self, x, theta, bias, gamma, beta):
        mu, nu, z = self.moments(x, theta, bias)
        mus, nus = [mu], [nu]
        for mu_s, nu_s, dmu, dnu, theta_s in self.past:
            step = (theta - theta_s).detach()
            mu_t = mu_s + torch.einsum("coikl,oikl->c", dmu, step)
            nu_t = nu_s + torch.einsum("coikl,oikl->c", dnu, step)
            self.maximum_mattered |= bool((nu_t < mu_t**2).any())
            mus.append(mu_t)
            nus.append(torch.where(nu_t < mu_t**2, mu_t**2, nu_t))
        mean, second = sum(mus) / len(mus), sum(nus) / len(nus)
        sigma = (second - mean**2 + self.eps) ** 0.5

        def moments_of(theta):
            return self.moments(x.detach(), theta, bias.detach() if bias is not None else None)[:2]

        slopes = torch.autograd.functional.jacobian(moments_of, theta.detach())
        now = mu.detach(), nu.detach(), *slopes, theta.detach().clone()
        self.past = [now, *self.past][: self.k - 1]
        column = lambda v: v.view(1, -1, 1, 1)  # noqa: E731
        return column(gamma) * (z - column(mean)) / column(sigma) + column(beta)


@pytest.mark.parametrize("lr, maximum", [(0.02, False), (5.0, True)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"groups": 2, "dilation": 2, "padding": (2, 1)},
    ],
)
def test_outputs_and_gradients_are_the_papers(options, lr, maximum):
    burn_in, k = 2, 3
    net = conv_and_cbn(window=k, burn_in=burn_in, **options)
    conv, cbn = net
    functional = {key: value for key, value in options.items() if key != "bias"}
    oracle, bn_only = Oracle(k, 1e-3, **functional), Oracle(1, 1e-3, **functional)
    for step in range(7):
        data = batch(step, shift=0.5 * step)
        x, x_oracle = data.clone().requires_grad_(), data.clone().requires_grad_()
        parameters = [p for p in (conv.weight, conv.bias, cbn.weight, cbn.bias) if p is not None]
        copies = [p.detach().clone().requires_grad_() for p in parameters]
        theta, *rest = copies
        bias = rest.pop(0) if conv.bias is not None else None
        expected = oracle(x_oracle, theta, bias, *rest)
        if step < burn_in:
            expected = bn_only(x_oracle, theta, bias, *rest)
        y = net(x)
        torch.testing.assert_close(y, expected)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(step)).double()
        got = torch.autograd.grad(y, [x, *parameters], dy)
        correct = torch.autograd.grad(expected, [x_oracle, *copies], dy)
        for a, b in zip(got, correct, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, got[1:], strict=True):
                parameter -= lr * gradient / gradient.norm().clamp(min=1)
    assert oracle.maximum_mattered == maximum
    assert len(cbn.past) == k - 1


def test_running_statistics_are_batch_norms():
    net, bn = conv_and_cbn(), nn.BatchNorm2d(C).double()
    for step in range(6):
        x = batch(step, shift=step)
        net(x), bn(net[0](x))
        nn.init.normal_(net[0].weight, std=0.2)
    torch.testing.assert_close(net[1].running_mean, bn.running_mean)
    torch.testing.assert_close(net[1].running_var, bn.running_var)


class Detectron2Conv(nn.Conv2d):
    def __init__(self, *args, norm):
        super().__init__(*args)
        self.norm = norm

    def forward(self, x):
        return F.relu(self.norm(super().forward(x)))


def test_a_child_norm_is_linked_as_a_following_one():
    plain = conv_and_cbn().float()
    child = Detectron2Conv(C_IN, C, 3, norm=copy.deepcopy(plain[1]))
    child.norm = CrossIterationBatchNorm2d(C, 1e-3, window=3, burn_in=0)
    child.load_state_dict(
        {k.replace("0.", "").replace("1.", "norm."): v for k, v in plain.state_dict().items()}
    )
    link_cbn(child)
    for step in range(4):
        x = batch(step, dtype=torch.float32)
        torch.testing.assert_close(child(x), F.relu(plain(x)))


def test_resnets_are_linked_and_stay_clean():
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    models = [
        torchvision.models.resnet18(norm_layer=CrossIterationBatchNorm2d),
        timm.create_model("resnet18d", norm_layer=CrossIterationBatchNorm2d),
    ]
    for model in models:
        keys, parameters = list(model.state_dict()), list(model.parameters())
        link_cbn(model)
        link_cbn(model)  # a second call changes nothing
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(len(m._forward_pre_hooks) < 2 for m in model.modules())
        norms = {n: m for n, m in model.named_modules() if isinstance(m, CrossIterationBatchNorm2d)}
        assert len(norms) >= 20 and all(m.slot == n for n, m in norms.items())
        for seed in range(10):
            model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))
        for norm in norms.values():  # each is linked, and none keeps its input
            assert len(norm.past) == 3 and norm._checked and norm._seen is None


def shared_conv():
    conv = nn.Conv2d(C, C, 1)
    norms = CrossIterationBatchNorm2d(C), CrossIterationBatchNorm2d(C)
    return nn.Sequential(conv, norms[0], conv, norms[1])


def shared_norm():
    norm = CrossIterationBatchNorm2d(C)
    return nn.Sequential(nn.Conv2d(C, C, 1), norm, nn.Conv2d(C, C, 1), norm)


def shared_weight():
    model = nn.Sequential(nn.Conv2d(C, C, 1), CrossIterationBatchNorm2d(C), nn.Conv2d(C, C, 1))
    model[2].weight = model[0].weight
    return model


def computed_weight():
    """Beside it a single parameter is None: the convolution's bias."""
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(C, C, 1, bias=False))
    return nn.Sequential(conv, CrossIterationBatchNorm2d(C))


def named(**children):
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def two_norms():
    norms = CrossIterationBatchNorm2d(C), CrossIterationBatchNorm2d(C)
    return named(conv1=nn.Conv2d(C, C, 1), other=norms[0], bn1=norms[1])


def after_a_block():
    block = Detectron2Conv(C, C, 1, norm=nn.BatchNorm2d(C))
    return nn.Sequential(block, CrossIterationBatchNorm2d(C))


def test_numbers_pair_norms_and_convolutions_that_are_registered_apart():
    convs, norms = [nn.Conv2d(C, C, 1) for _ in "12"], [CrossIterationBatchNorm2d(C) for _ in "12"]
    model = named(conv1=convs[0], conv2=convs[1], bn1=norms[0], bn2=norms[1])
    pairs = preceding_convolutions(model, CrossIterationBatchNorm2d)
    assert pairs == {"bn1": (norms[0], convs[0]), "bn2": (norms[1], convs[1])}


@pytest.mark.parametrize(
    "model, name, reason",
    [
        (lambda: nn.Sequential(nn.ReLU(), CrossIterationBatchNorm2d(C)), "1", "no Conv2d"),
        (lambda: nn.Sequential(CrossIterationBatchNorm2d(C)), "0", "no Conv2d"),
        (lambda: CrossIterationBatchNorm2d(C), "CrossIterationBatchNorm2d", "no Conv2d"),
        (
            lambda: nn.Sequential(nn.ConvTranspose2d(C, C, 2), CrossIterationBatchNorm2d(C)),
            "1",
            "no Conv2d",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(C, C + 1, 1), CrossIterationBatchNorm2d(C)),
            "1",
            "7 channels, the norm 6",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding="same"), CrossIterationBatchNorm2d(C)),
            "1",
            "does not pad",
        ),
        (shared_conv, "1", "shared"),
        (two_norms, "bn1", "another norm"),
        (after_a_block, "1", "no Conv2d"),
        (shared_norm, "1", "several places"),
        (shared_weight, "1", "shared"),
        (computed_weight, "1", "computes its weight from others"),
    ],
)
def test_what_cannot_be_linked_is_refused_by_name(model, name, reason):
    with pytest.raises(LinkError, match=rf"at {name} \(.*{reason}.*Use another norm there"):
        link_cbn(model())


def test_the_refusal_names_every_slot():
    model = nn.ModuleDict({key: CrossIterationBatchNorm2d(C) for key in ("neck", "head")})
    with pytest.raises(LinkError, match=r"neck \(.*head \("):
        link_cbn(model)


def test_a_layer_called_twice_in_a_forward_pass_is_refused_by_name():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Sequential(nn.Conv2d(C_IN, C, 1), CrossIterationBatchNorm2d(C))

        def forward(self, levels):
            return [self.tower(x) for x in levels]

    head, x = Head(), batch(0, dtype=torch.float32)
    link_cbn(head)
    head([x])
    head([x])
    head.tower(x), head.tower(x)  # calls of parts of the model are not counted
    with pytest.raises(LinkError, match="tower.1: this norm is called several times"):
        head([x, x])
    head([x])
    head.eval()([x, x])


def test_a_norm_that_takes_something_else_is_refused_in_its_first_step():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(C_IN, C, 3), CrossIterationBatchNorm2d(C, burn_in=0)

        def forward(self, x):
            return self.bn1(F.relu(self.conv1(x)))

    model = Sneaky()
    link_cbn(model)
    with pytest.raises(LinkError, match="bn1: the input of this norm is not the output"):
        model(batch(0, dtype=torch.float32))


def test_a_layer_that_was_not_linked_says_what_to_do():
    layer = CrossIterationBatchNorm2d(C)
    layer.eval()(torch.ones(2, C, 3, 3))
    with pytest.raises(LinkError, match=r"link_cbn\(model\)"):
        layer.train()(torch.ones(2, C, 3, 3))


def test_a_resumed_run_does_not_burn_in_again():
    net = conv_and_cbn(window=3, burn_in=4)
    for step in range(6):
        net(batch(step))
    resumed = conv_and_cbn(window=3, burn_in=4)
    resumed.load_state_dict(net.state_dict())
    resumed(batch(6))
    resumed(batch(7))
    together = resumed[0](torch.cat([batch(6), batch(7), batch(8)]))
    both = F.batch_norm(together, None, None, net[1].weight, net[1].bias, True, eps=1e-3)
    torch.testing.assert_close(resumed(batch(8)), both[-3:])


@pytest.mark.parametrize("bad", [{"window": 0}, {"window": 2.5}, {"burn_in": -1}])
def test_arguments_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CrossIterationBatchNorm2d(C, **bad)
