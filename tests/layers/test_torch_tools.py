"""RefBN under torch's own tools: fx, feature extraction, checkpointing, fusion, scripting."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.utils.checkpoint import checkpoint

from refbn_d2.layers import (
    Moments,
    Recording,
    RefBatchNorm2d,
    convert_from_refbn,
    convert_to_refbn,
    ref_batch_norm,
    refbn_layers,
)
from refbn_d2.layers.functional import GRADIENTS

C = 4


def batch(seed, n=4, channels=3):
    return torch.randn(n, channels, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, C, 3), RefBatchNorm2d(C), nn.ReLU())
    net[1].commit(Moments(torch.ones(C), torch.full((C,), 2.0), 9))
    net(batch(9))
    return net


@pytest.mark.parametrize("training", [True, False])
def test_fx_keeps_the_layer_as_it_keeps_batch_norm(training):
    net = small_net().train(training)
    expected = copy.deepcopy(net)(batch(1))
    traced = torch.fx.symbolic_trace(net)
    assert [name for name, _ in refbn_layers(traced)] == ["1"]
    assert torch.equal(traced(batch(1)), expected)


def test_fx_goes_through_a_subclass_in_eval_mode():
    class Leaky(RefBatchNorm2d):
        def forward(self, x):
            return torch.relu(super().forward(x))

    net, x = nn.Sequential(Leaky(C)).eval(), batch(1, channels=C)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
    with pytest.raises(torch.fx.proxy.TraceError, match="Leaky can be traced in eval mode only"):
        torch.fx.symbolic_trace(net.train())


def test_torchvisions_feature_extractor():
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = convert_to_refbn(torchvision.models.resnet18()).eval()
    seen = []
    model.layer1.register_forward_hook(lambda m, args, output: seen.append(output))
    expected = model(x := torch.randn(1, 3, 64, 64))
    extractor = create_feature_extractor(model, ["layer1", "fc"])
    found = extractor.eval()(x)
    assert torch.equal(found["fc"], expected) and torch.equal(found["layer1"], seen[0])


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("has_weight, has_bias", [(True, False), (False, True), (False, False)])
def test_gamma_and_beta_without_each_other(gradient, has_weight, has_bias):
    """Oracle: both given, gamma = 1 or beta = 0 standing in for the missing one."""
    x = batch(1, channels=C)
    reference = torch.full((C,), 0.5), torch.full((C,), 2.0)
    given = torch.linspace(1, 2, C), torch.linspace(-1, 1, C)

    def run(*parameters):
        leaves = [x.clone().requires_grad_()]
        leaves += [None if p is None else p.clone().requires_grad_() for p in parameters]
        y = ref_batch_norm(leaves[0], *reference, *leaves[1:], 0.7, gradient)
        (y**3).mean().backward()
        return [y, *(None if leaf is None else leaf.grad for leaf in leaves)]

    some = run(given[0] if has_weight else None, given[1] if has_bias else None)
    both = run(given[0] if has_weight else torch.ones(C), given[1] if has_bias else torch.zeros(C))
    for got, expected in zip(some, both, strict=True):
        if got is not None:
            torch.testing.assert_close(got, expected)
    assert [got is None for got in some[2:]] == [not has_weight, not has_bias]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recording", [Recording.OFF, Recording.CONCAT])
def test_activation_checkpointing_changes_nothing(recording, reentrant):
    """Oracle: the same step without it."""
    results = []
    for repeated in (False, True):
        net = small_net()
        net[1].start_recording(recording, 1, 0.5)
        x = batch(1).requires_grad_()
        y = checkpoint(net, x, use_reentrant=reentrant) if repeated else net(x)
        y.square().sum().backward()
        recorded = net[1].stop_recording() or ()
        results.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers(), *recorded])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tool",
    [
        torch.jit.script,
        lambda net: torch.ao.quantization.fuse_modules(net, ["0", "1"]),
        fuse,
    ],
    ids=["torch.jit.script", "torch.ao fuse_modules", "torch.fx fuse"],
)
def test_tools_that_know_batch_norm_by_its_type_take_the_converted_model(tool):
    """What docs/plain_pytorch.md says to do first."""
    net = small_net().eval()
    expected = net(batch(1))
    new = tool(convert_from_refbn(copy.deepcopy(net)))
    torch.testing.assert_close(new(batch(1)), expected)
