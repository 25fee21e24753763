import logging
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from refbn_d2.layers import RefBatchNorm2d
from refbn_d2.layers.convert import convert_from_refbn, convert_to_refbn
from refbn_d2.layers.fold import fold


def randomized(model, seed=0):
    """Give the norms random parameters and statistics, as after training."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        if tensor is not None:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for m in model.modules():
        if hasattr(m, "running_var") and m.running_var is not None:
            uniform(m.weight, 0.5, 1.5)
            uniform(m.bias, -0.5, 0.5)
            uniform(m.running_mean, -0.5, 0.5)
            uniform(m.running_var, 0.5, 2)
    return model


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(model, x):
    training = [m.training for m in model.modules()]
    with torch.no_grad():
        y = model.eval()(x)
    for m, flag in zip(model.modules(), training, strict=True):
        m.training = flag
    return y


def assert_equal_in_eval(model, expected, x):
    assert_close(outputs(model, x), expected)


def assert_close(y, expected):
    tolerance = 1e-6 if y.dtype == torch.float32 else 1e-13  # rounding adds up in deep models
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def norms(model, kind=RefBatchNorm2d):
    return [m for m in model.modules() if type(m) is kind]


def resnet(name="resnet18", norm=None, seed=0):
    torch.manual_seed(seed)
    return randomized(torchvision.models.get_model(name, norm_layer=norm, num_classes=10))


class Conv(nn.Conv2d):
    """A convolution with its norm and activation, as in Detectron2."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        if x.numel() == 0:  # as in Detectron2; torch.fx cannot trace it
            raise AssertionError
        x = super().forward(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def conv_norm_model(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return randomized(
        nn.Sequential(
            Conv(3, 8, 3, stride=2, bias=False, norm=norm(8), activation=torch.relu),
            Conv(8, 8, 3, padding=2, dilation=2, groups=4, norm=norm(8)),
            Conv(8, 4, 1),
        )
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


class Shared(nn.Module):
    """Two convolutions that share one norm, under two names; each calls it once."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm_a = self.norm_b = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm_a(self.a(x)) + self.norm_b(self.b(x))


def test_a_shared_norm_stays_shared():
    model = convert_to_refbn(randomized(Shared()))
    assert type(model.norm_a) is RefBatchNorm2d and model.norm_a is model.norm_b
    convert_from_refbn(model)
    assert type(model.norm_a) is nn.BatchNorm2d and model.norm_a is model.norm_b


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


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
    assert caplog.messages == ["Not converted from RefBatchNorm2d: fused"]


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


# ---- folding


def left(caplog):
    """Return the names of the norms that the log lists as left."""
    names = re.search(r"left as they are: (.*)", caplog.messages[-1])
    return names[1].split(", ") if names else []


@pytest.mark.parametrize("seen", ["traced", "run"])
@pytest.mark.parametrize(
    "kind", [nn.BatchNorm2d, RefBatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d]
)
def test_a_resnet_folds_whole(kind, seen, caplog):
    caplog.set_level(logging.INFO)
    model, x = resnet(norm=kind), image(2, 3, 32, 32)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    expected = outputs(model, x)
    folded = fold(model, x if seen == "run" else None)
    assert caplog.messages == ["Folded 20 norms into convolutions"]
    assert not norms(folded, kind) and len(norms(folded, nn.Identity)) == 20
    assert not folded.training and not any(m._forward_pre_hooks for m in folded.modules())
    assert_equal_in_eval(folded, expected, x)
    # the model itself is not changed
    assert model.training and torch.equal(outputs(model, x), expected)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("seen", ["traced", "run"])
def test_a_resnet50_folds_whole(seen, caplog):
    caplog.set_level(logging.INFO)
    model, x = convert_to_refbn(resnet("resnet50").double()), image(1, 3, 32, 32).double()
    folded = fold(model, (x,) if seen == "run" else None)
    assert caplog.messages == ["Folded 53 norms into convolutions"]
    assert_equal_in_eval(folded, outputs(model, x), x)


def test_weights_are_torchs():
    conv, norm = nn.Conv2d(6, 4, 3, groups=2), randomized(RefBatchNorm2d(4))
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    folded = fold(nn.Sequential(conv, norm))[0]
    torch.testing.assert_close(folded.weight, weight)
    torch.testing.assert_close(folded.bias, bias)
    assert isinstance(folded.weight, nn.Parameter) and folded.weight is not conv.weight


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, RefBatchNorm2d])
def test_detectron2s_structure_folds_without_a_run(kind, caplog):
    caplog.set_level(logging.INFO)
    model, x = conv_norm_model(kind), image(2, 3, 16, 16)
    folded = fold(model)
    assert caplog.messages == ["Folded 2 norms into convolutions"]
    assert_equal_in_eval(folded, outputs(model, x), x)


class NormsItsInput(nn.Conv2d):
    """Looks like Detectron2's convolution, but its norm comes first."""

    def __init__(self):
        super().__init__(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return super().forward(self.norm(x))


@pytest.mark.parametrize("run", [False, True])
def test_a_child_that_does_not_follow_its_convolution_is_left(run, caplog):
    caplog.set_level(logging.INFO)
    model, x = randomized(nn.Sequential(nn.ReLU(), NormsItsInput())), image(2, 4, 8, 8)
    folded = fold(model, x if run else None)
    assert left(caplog) == ["1.norm"]
    assert torch.equal(outputs(folded, x), outputs(model, x))


class WantsMore(nn.Module):
    class Conv(nn.Conv2d):
        def forward(self, x, offset):
            return self.norm(super().forward(x)) + offset

    def __init__(self):
        super().__init__()
        self.conv = self.Conv(4, 4, 3)
        self.conv.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv(x, x.mean())


@pytest.mark.parametrize("run", [False, True])
def test_a_child_that_cannot_be_tried_by_itself_is_found_in_a_run(run, caplog):
    caplog.set_level(logging.INFO)
    model, x = randomized(WantsMore()), image(2, 4, 8, 8)
    folded = fold(model, x if run else None)
    assert left(caplog) == ([] if run else ["conv.norm"])
    assert_equal_in_eval(folded, outputs(model, x), x)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    ],
    ids=["reflect", "grouped", "transposed", "transposed, grouped"],
)
@pytest.mark.parametrize("run", [False, True])
def test_kinds_of_convolution(conv, affine, run, caplog):
    caplog.set_level(logging.INFO)
    norm = RefBatchNorm2d(6, eps=0.1, affine=affine)
    model, x = randomized(nn.Sequential(conv, norm, nn.ReLU())), image(2, 4, 8, 8)
    folded = fold(model, x if run else None)
    assert caplog.messages == ["Folded 1 norms into convolutions"]
    assert_equal_in_eval(folded, outputs(model, x), x)


def test_half_precision_and_memory_format_are_kept():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), RefBatchNorm2d(6)).bfloat16()
    model = randomized(model).to(memory_format=torch.channels_last)
    conv = fold(model)[0]
    assert conv.weight.dtype == conv.bias.dtype == torch.bfloat16
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


# Models with norms that must stay. Each: (module, names of the norms that are left).


class ConvUsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class ConvReturned(ConvUsedTwice):
    def forward(self, x):
        y = self.conv(x)
        return torch.cat([self.norm(y), y.relu()])


class ConvChangedInPlace(ConvUsedTwice):
    def forward(self, x):
        y = self.conv(x)
        y.add_(1)
        return self.norm(y)


class BetweenThem(ConvUsedTwice):
    def forward(self, x):
        return self.norm(self.conv(x).tanh())


class ConvCalledAgain(ConvUsedTwice):
    def forward(self, x):
        return torch.cat([self.norm(self.conv(x)), self.conv(-x)])


class NormCalledAgain(ConvUsedTwice):
    def forward(self, x):
        return self.norm(self.norm(self.conv(x)))


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.norm(self.a(x)) + self.b(x)


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight / self.weight.std(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class Both(nn.Module):
    """A model in which one norm folds, and one stays."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            ConvUsedTwice(),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        )

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("run", [False, True], ids=["traced", "run"])
@pytest.mark.parametrize(
    "model, stay",
    [
        (ConvUsedTwice, ["norm"]),
        (ConvReturned, ["norm"]),
        (ConvChangedInPlace, ["norm"]),
        (BetweenThem, ["norm"]),
        (ConvCalledAgain, ["norm"]),
        (NormCalledAgain, ["norm"]),
        (TiedWeights, ["norm"]),
        (Shared, ["norm_a"]),
        (Both, ["first.norm"]),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), ["0"]),
        (lambda: nn.Sequential(StandardizedConv(3, 4, 3), nn.BatchNorm2d(4)), ["1"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAndActivation(4)), ["1"]),
        (
            lambda: nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)
            ),
            ["1"],
        ),
    ],
)
def test_a_norm_that_cannot_fold_is_left(model, stay, run, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model, x = convert_to_refbn(randomized(model())), image(2, 3, 8, 8)
    caplog.clear()
    folded = fold(model, x if run else None)
    assert left(caplog) == stay
    assert not norms(folded)
    assert_equal_in_eval(folded, outputs(model, x), x)


class SharedHead(nn.Module):
    """One convolution and its norm, called on every level of a pyramid."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), RefBatchNorm2d(4)

    def forward(self, x):
        levels = [self.norm(self.conv(level)) for level in (x, x[..., ::2, ::2])]
        return torch.cat([level.flatten(1) for level in levels], 1)


@pytest.mark.parametrize("run", [False, True])
def test_a_head_called_on_several_levels_folds(run, caplog):
    caplog.set_level(logging.INFO)
    model, x = randomized(SharedHead()), image(2, 3, 16, 16)
    folded = fold(model, x if run else None)
    assert left(caplog) == [] and not norms(folded)
    assert_equal_in_eval(folded, outputs(model, x), x)


@pytest.mark.parametrize("run", [False, True])
def test_a_densenet_keeps_the_norms_before_its_convolutions(run, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model = randomized(torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5))
    x = image(1, 3, 32, 32)
    folded = fold(convert_to_refbn(model), x if run else None)
    denselayers = [f"features.denseblock{b}.denselayer{n}.norm1" for b in (1, 2) for n in (1, 2)]
    assert sorted(left(caplog)) == sorted(
        [*denselayers, "features.transition1.norm", "features.norm5"]
    )
    assert_equal_in_eval(folded, outputs(model, x), x)


class Detector(nn.Module):
    """torch.fx cannot trace this: its forward depends on data, and takes and returns dicts."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), RefBatchNorm2d(4), nn.ReLU())
        self.unused = nn.Sequential(nn.Conv2d(3, 4, 3), RefBatchNorm2d(4))

    def forward(self, samples, offset=0.0):
        y = self.body(torch.stack([s["image"] for s in samples]))
        if y.sum() < -1:
            raise AssertionError
        return [{"features": y + offset}]


def test_a_model_that_cannot_be_traced_needs_example_inputs(caplog):
    caplog.set_level(logging.INFO)
    model, samples = randomized(Detector()), [{"image": image(3, 8, 8)}]
    with pytest.raises(ValueError, match="(?s)cannot trace Detector .*Pass example_inputs"):
        fold(model)
    expected = outputs(model, samples)[0]["features"]
    for example_inputs in (samples, (samples, 1.0)):
        folded = fold(model, example_inputs)
        assert left(caplog) == ["unused.1"] and type(folded.unused[1]) is nn.BatchNorm2d
        assert_close(outputs(folded, samples)[0]["features"], expected)


def test_a_folded_file_does_not_need_this_package():
    folded = fold(convert_to_refbn(resnet()))
    stock = torchvision.models.resnet18(num_classes=10, norm_layer=lambda _: nn.Identity())
    for m in stock.modules():
        if isinstance(m, nn.Conv2d):
            m.bias = nn.Parameter(torch.zeros(m.out_channels))
    stock.load_state_dict(folded.state_dict())
    x = image(1, 3, 32, 32)
    assert torch.equal(outputs(stock, x), outputs(folded, x))


@pytest.mark.detectron2
@pytest.mark.parametrize("norm", ["BN", "RefBN", "FrozenBN"])
def test_a_detectron2_backbone_folds_whole(norm, caplog):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "FrozenBN" if norm == "FrozenBN" else "BN"
    torch.manual_seed(0)
    model = randomized(build_resnet_fpn_backbone(cfg, ShapeSpec(channels=3)))
    if norm == "RefBN":
        convert_to_refbn(model)
    caplog.set_level(logging.INFO)
    folded, x = fold(model.double()), image(1, 3, 32, 32).double()
    assert caplog.messages == ["Folded 28 norms into convolutions"]
    for y, expected in zip(outputs(folded, x).values(), outputs(model, x).values(), strict=True):
        assert_close(y, expected)
