"""Oracles: the outputs of the model itself, and the weights of torch's own fusion."""

import logging

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from refbn_d2.layers import RefBatchNorm2d
from refbn_d2.layers.convert import convert_to_refbn
from refbn_d2.layers.fold import fold
from tests.layers.helpers import (
    assert_close,
    assert_equal_in_eval,
    conv_norm_model,
    image,
    norms,
    outputs,
    randomized,
    resnet,
)


@pytest.mark.parametrize("seen", ["traced", "run"])
@pytest.mark.parametrize(
    "kind", [nn.BatchNorm2d, RefBatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d]
)
def test_a_resnet_folds_whole(kind, seen, caplog):
    caplog.set_level(logging.INFO)
    model, x = resnet(norm=kind).double(), image(2, 3, 32, 32).double()
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
