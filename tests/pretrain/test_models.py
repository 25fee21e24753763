"""Norms in timm's models, and which models Detectron2 can build as a backbone."""

import logging

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from refbn_d2.config import ConfigError
from refbn_d2.layers import Recording, RefBatchNorm2d, convert_from_refbn, fold, refbn_layers
from refbn_d2.pretrain.backbone import resnet_keys
from refbn_d2.pretrain.models import RefBatchNormAct2d, build_model, check_num_classes
from tests.device import on_cpu

PLAIN = {
    "resnet18": (18, 1, 64, 64),
    "resnet34": (34, 1, 64, 64),
    "resnet50": (50, 1, 64, 256),
    "resnet101": (101, 1, 64, 256),
    "resnet152": (152, 1, 64, 256),
    "resnext50_32x4d": (50, 32, 4, 256),
    "resnext101_32x8d": (101, 32, 8, 256),
}
BN_ACT = ["regnetx_002", "efficientnet_b0", "densenet121", "mobilenetv3_small_050"]


def build(cfg, *overrides):
    cfg.merge_from_list([*overrides])
    torch.manual_seed(0)
    return build_model(cfg, 12)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", *BN_ACT])
def test_refbn_has_the_weights_and_the_outputs_of_bn(cfg, name):
    bn = build(cfg, "MODEL.NAME", name, "MODEL.NORM", "BN").eval()
    refbn = build(cfg, "MODEL.NORM", "RefBN").eval()
    x = torch.randn(2, 3, 64, 64)
    number = sum(isinstance(m, nn.BatchNorm2d) for m in bn.modules())
    assert len(list(refbn_layers(refbn))) == number > 10
    added = {"ref_mean", "ref_var", "ref_count"}
    kept = {n: t for n, t in refbn.state_dict().items() if n.rpartition(".")[2] not in added}
    assert kept.keys() == bn.state_dict().keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in bn.state_dict().items())
    torch.testing.assert_close(refbn(x), bn(x))


@pytest.mark.parametrize("name", BN_ACT)
def test_refbn_of_weight_0_trains_as_bn_with_its_activation(cfg, name):
    overrides = ["MODEL.NAME", name, "MODEL.REFBN.REFERENCE_WEIGHT", 0.0]
    models = [build(cfg, *overrides, "MODEL.NORM", norm).double() for norm in ("BN", "RefBN")]
    x = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for model in models:
        torch.manual_seed(1)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_refbn_options_reach_the_layers(cfg):
    overrides = ["MODEL.REFBN.REFERENCE_WEIGHT", 0.4, "MODEL.REFBN.GRADIENT", "pooled"]
    for name in ("test_resnet", "regnetx_002"):
        layers = refbn_layers(build(cfg, "MODEL.NAME", name, *overrides))
        assert {(m.reference_weight, m.gradient) for _, m in layers} == {(0.4, "pooled")}


def test_nothing_is_reported_as_not_converted(cfg, caplog):
    with caplog.at_level(logging.WARNING):
        build(cfg, "MODEL.NAME", "regnetx_002")
    assert "Not converted" not in caplog.text


def test_conversion_and_folding_keep_an_activation(cfg, caplog):
    """A plain BatchNorm2d in its place would silently drop the activation."""
    x = torch.randn(2, 3, 64, 64)
    model = build(cfg, "MODEL.NAME", "regnetx_002").eval()
    want = model(x)
    torch.testing.assert_close(fold(model)(x), want)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(convert_from_refbn(model)(x), want)
    assert "Not converted from RefBN or RefIN: stem.bn" in caplog.text


def test_the_activation_follows_the_normalized_batch():
    layer = RefBatchNormAct2d(4)
    layer.drop, layer.act = nn.Identity(), nn.ReLU()
    plain = RefBatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    for recording in (Recording.CAPTURE, Recording.SLICE, Recording.OFF):
        for norm in (layer, plain):
            norm.start_recording(recording)
        torch.testing.assert_close(layer(x), plain(x).relu())
    torch.testing.assert_close(layer.ref_mean, plain.ref_mean)


def test_gn_has_detectron2s_groups_and_zero_at_a_blocks_end(cfg):
    model = build(cfg, "MODEL.NAME", "resnet18", "MODEL.NORM", "GN")
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    assert len(norms) == 20 and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert {m.num_groups for m in norms.values()} == {32}
    assert not norms["layer1.0.bn2"].weight.any() and norms["layer1.0.bn1"].weight.all()
    assert model.state_dict().keys() <= timm.create_model("resnet18").state_dict().keys()


def test_gn_keeps_an_activation(cfg):
    model = build(cfg, "MODEL.NAME", "densenet121", "MODEL.NORM", "GN")
    original = timm.create_model("densenet121")
    for name, module in original.named_modules():
        if isinstance(module, BatchNormAct2d):
            assert type(model.get_submodule(name).act) is type(module.act)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 12)


@on_cpu
def test_syncbn_on_the_cpu_is_bn_and_says_so(cfg, caplog):
    with caplog.at_level(logging.WARNING):
        model = build(cfg, "MODEL.NORM", "SyncBN")
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    assert "SyncBN needs CUDA in torch: using BN on the CPU" in caplog.text


def test_syncbn_for_cuda(cfg):
    model = build(cfg, "MODEL.NAME", "regnetx_002", "MODEL.NORM", "SyncBN", "MODEL.DEVICE", "cuda")
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 44


def test_drop_rates(cfg):
    model = build(cfg, "MODEL.DROP_RATE", 0.3, "MODEL.DROP_PATH_RATE", 0.2)
    assert model.drop_rate == 0.3
    assert model.layer4[-1].drop_path.drop_prob == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="'vgg11_bn' does not take MODEL.DROP_.*drop_path_rate"):
        build(cfg, "MODEL.NAME", "vgg11_bn")


def test_unknown_model_names_the_closest(cfg):
    with pytest.raises(ConfigError, match="'resnet_50': timm .* did you mean resnet50"):
        build(cfg, "MODEL.NAME", "resnet_50")


@pytest.mark.parametrize("norm", ["RefBN", "BN", "GN"])
def test_a_model_without_batchnorm(cfg, norm):
    with pytest.raises(ConfigError, match=f"'test_vit' has no BatchNorm2d .* {norm!r}"):
        build(cfg, "MODEL.NAME", "test_vit", "MODEL.NORM", norm)


def test_channels_that_gn_cannot_group(cfg):
    with pytest.raises(ConfigError, match="16 channels cannot be split into 32 groups"):
        build(cfg, "MODEL.NORM", "GN")


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "densenet121"])
def test_class_count(cfg, name):
    model = build(cfg, "MODEL.NAME", name)
    state = timm.create_model(name, num_classes=7).state_dict()
    with pytest.raises(ConfigError, match="a.pth was trained on 7 classes, .* has 12"):
        check_num_classes(model, state, "a.pth")
    check_num_classes(model, model.state_dict(), "a.pth")
    check_num_classes(model, {"layer1.0.conv1.weight": torch.zeros(1)}, "a.pth")  # a backbone


# ---- Detectron2's


KEYS = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS")


@pytest.mark.parametrize("name", PLAIN)
def test_backbones_that_detectron2_has(name):
    with torch.device("meta"):
        assert resnet_keys(timm.create_model(name)) == dict(zip(KEYS, PLAIN[name], strict=True))


@pytest.mark.parametrize("norm", ["RefBN", "RefIN", "GN"])
def test_norms_and_drop_rates_make_no_other_backbone(cfg, norm):
    model = build(
        cfg, "MODEL.NAME", "resnet50", "MODEL.NORM", norm, "MODEL.DROP_RATE", 0.1,
        "MODEL.DROP_PATH_RATE", 0.1,
    )  # fmt: skip
    assert resnet_keys(model) == dict(zip(KEYS, PLAIN["resnet50"], strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "resnet26",  # a depth that Detectron2 does not have
        "resnet50d",  # deep stem, pooling in the shortcut
        "resnet50c",
        "resnetblur18",  # has the same parameters as resnet18
        "resnetaa50",
        "seresnet50",
        "resnetv2_50",
        "regnetx_002",
        "densenet121",
    ],
)
def test_backbones_that_it_has_not(name):
    with torch.device("meta"):
        assert resnet_keys(timm.create_model(name)) is None
