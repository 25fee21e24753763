"""From BatchNorm to RefBN and back."""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from refbn_d2.layers import RefBatchNorm2d
from refbn_d2.layers.convert import convert_from_refbn, convert_to_refbn
from tests.layers.helpers import (
    NormAndActivation,
    Shared,
    assert_equal_in_eval,
    conv_norm_model,
    image,
    norms,
    outputs,
    randomized,
    resnet,
)

# ---- to RefBN


def test_every_batch_norm_becomes_refbn():
    model = resnet()
    model.layer1.train(), model.layer2.eval()
    flags = {name: m.training for name, m in model.named_modules()}
    expected, x = outputs(model, image(2, 3, 32, 32)), image(2, 3, 32, 32)
    parameters, statistics = list(model.named_parameters()), dict(model.named_buffers())
    n = len(norms(model, nn.BatchNorm2d))

    assert convert_to_refbn(model, reference_weight=0.7, gradient="pooled") is model

    assert len(norms(model)) == n == 20 and not norms(model, nn.BatchNorm2d)
    assert all(m.reference_weight == 0.7 and m.gradient == "pooled" for m in norms(model))
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
    for p, (_, before) in zip(model.parameters(), parameters, strict=True):
        assert p is before
    buffers = dict(model.named_buffers())
    assert all(buffers[name] is buffer for name, buffer in statistics.items())
    assert torch.equal(outputs(model, x), expected)


def test_the_reference_starts_from_the_running_statistics_as_a_copy():
    model = convert_to_refbn(resnet())
    norm = model.layer1[0].bn2
    assert torch.equal(norm.ref_mean, norm.running_mean) and norm.has_reference()
    assert torch.equal(norm.ref_var, norm.running_var)
    before = norm.ref_mean.clone()
    norm.running_mean.add_(1)
    assert torch.equal(norm.ref_mean, before)


def test_a_norm_that_has_seen_nothing_gives_no_reference():
    norm = convert_to_refbn(nn.BatchNorm2d(3))
    assert not norm.has_reference()
    x = image(4, 3, 5, 5) * 7 + 3
    norm(x)
    torch.testing.assert_close(norm.ref_mean, x.mean((0, 2, 3)))


def test_an_optimizer_continues_as_with_batch_norm():
    models = [conv_norm_model().double().train() for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(image(4, 3, 32, 32, seed=step).double()).square().mean().backward()
            optimizer.step()
        if step == 0:
            convert_to_refbn(models[1], reference_weight=0)
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(5, eps=0.1, momentum=0.3),
        nn.BatchNorm2d(5, momentum=None, affine=False),
        nn.BatchNorm2d(5, dtype=torch.float64),
        nn.SyncBatchNorm(5, eps=0.1, momentum=0.3),
    ],
    ids=["plain", "not affine", "double", "sync"],
)
def test_attributes_are_kept_and_a_root_is_returned(norm):
    randomized(norm).eval()
    converted = convert_to_refbn(norm)
    assert type(converted) is RefBatchNorm2d and not converted.training
    for name in ("num_features", "eps", "momentum", "affine", "weight", "bias", "running_var"):
        assert getattr(converted, name) is getattr(norm, name)
    assert {b.dtype for n, b in converted.named_buffers() if b.is_floating_point()} == {
        norm.running_mean.dtype
    }
    x = image(2, 5, 4, 4).to(norm.running_mean.dtype)
    assert torch.equal(converted(x), norm(x))
    back = convert_from_refbn(converted, type(norm))
    assert type(back) is type(norm) and not back.training
    for name in ("num_features", "eps", "momentum", "affine", "weight", "bias", "running_var"):
        assert getattr(back, name) is getattr(norm, name)
    assert back.num_batches_tracked is norm.num_batches_tracked


def test_frozen_norms_thaw():
    model = resnet("resnet50", norm=FrozenBatchNorm2d).double()
    x = image(1, 3, 32, 32).double()
    expected, count = outputs(model, x), len(norms(model, FrozenBatchNorm2d))
    convert_to_refbn(model)
    assert len(norms(model)) == count == 53
    assert all(m.weight.requires_grad for m in norms(model))
    assert {"layer1.0.bn1.weight", "layer1.0.bn1.bias"} <= dict(model.named_parameters()).keys()
    assert_equal_in_eval(model, expected, x)


def test_a_shared_norm_stays_shared():
    model = convert_to_refbn(randomized(Shared()))
    assert type(model.norm_a) is RefBatchNorm2d and model.norm_a is model.norm_b
    convert_from_refbn(model)
    assert type(model.norm_a) is nn.BatchNorm2d and model.norm_a is model.norm_b


def test_other_norms_are_not_converted(caplog):
    model = nn.ModuleDict(
        {
            "fused": NormAndActivation(3),
            "stateless": nn.BatchNorm2d(3, track_running_stats=False),
            "one": nn.BatchNorm1d(3),
            "three": nn.BatchNorm3d(3),
            "group": nn.GroupNorm(1, 3),
            "refbn": RefBatchNorm2d(3, reference_weight=0.5),
        }
    )
    before = dict(model)
    convert_to_refbn(model)
    assert dict(model) == before and model["refbn"].reference_weight == 0.5
    assert caplog.messages == ["Not converted to RefBatchNorm2d: fused, stateless"]


class RefBNAndActivation(RefBatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_refbn_that_does_more_is_not_converted(caplog):
    """A plain BatchNorm in its place would do less."""
    model = nn.ModuleDict({"fused": RefBNAndActivation(3), "plain": RefBatchNorm2d(3)})
    fused = model["fused"]
    convert_to_refbn(model)
    assert model["fused"] is fused and not caplog.messages
    convert_from_refbn(model)
    assert model["fused"] is fused and type(model["plain"]) is nn.BatchNorm2d
    assert caplog.messages == ["Not converted from RefBN or RefIN: fused"]


def test_bad_settings_are_refused_and_nothing_is_converted():
    model = resnet()
    for settings in ({"reference_weight": 2}, {"gradient": "none"}):
        with pytest.raises(ValueError):
            convert_to_refbn(model, **settings)
    assert not norms(model)


# ---- from RefBN


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_there_and_back(norm):
    model = resnet(norm=norm)
    x, expected, state = (
        image(2, 3, 32, 32),
        outputs(model, image(2, 3, 32, 32)),
        model.state_dict(),
    )
    convert_from_refbn(convert_to_refbn(model), norm)
    assert len(norms(model, norm)) == 20
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert torch.equal(outputs(model, x), expected)


def test_a_frozen_norm_of_one_without_parameters():
    refbn = randomized(RefBatchNorm2d(5, eps=0.1, affine=False, dtype=torch.float64))
    frozen = convert_from_refbn(refbn.eval(), FrozenBatchNorm2d)
    x = image(2, 5, 4, 4).double()
    torch.testing.assert_close(frozen(x), refbn(x), rtol=1e-12, atol=1e-12)


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match="BatchNorm3d"):
        convert_from_refbn(RefBatchNorm2d(4), nn.BatchNorm3d)
    model = nn.BatchNorm2d(4)
    assert convert_from_refbn(model, nn.SyncBatchNorm) is model


@pytest.mark.detectron2
def test_detectron2s_frozen_norm():
    frozen = pytest.importorskip("detectron2.layers").FrozenBatchNorm2d
    model = resnet()
    x, expected = image(2, 3, 32, 32), outputs(model, image(2, 3, 32, 32))
    convert_from_refbn(convert_to_refbn(model), frozen)
    assert len(norms(model, frozen)) == 20 and not norms(model)
    assert_equal_in_eval(model, expected, x)
    assert len(norms(convert_to_refbn(model))) == 20
    assert_equal_in_eval(model, expected, x)
