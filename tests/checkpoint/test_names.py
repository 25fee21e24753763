import re

import pytest
import torch
import torchvision

from refbn_d2.checkpoint.names import (
    backbone_prefix,
    detectron2_to_torchvision,
    resnet_name,
    to_detectron2,
    torchvision_to_detectron2,
)

DEPTHS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"]
BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}
NORM = ["weight", "bias", "running_mean", "running_var"]


def torchvision_keys(name):
    with torch.device("meta"):
        return list(torchvision.models.get_model(name).state_dict())


def detectron2_keys(depth):
    """Return Detectron2's names of a ResNet backbone, written down from its architecture."""
    layers = ["stem.conv1"]
    for stage, blocks in zip((2, 3, 4, 5), BLOCKS[depth], strict=True):
        for block in range(blocks):
            convs = 2 if depth < 50 else 3
            if block == 0 and (depth >= 50 or stage > 2):
                layers.append(f"res{stage}.0.shortcut")
            layers += [f"res{stage}.{block}.conv{i + 1}" for i in range(convs)]
    return {f"{layer}.weight" for layer in layers} | {
        f"{layer}.norm.{tensor}" for layer in layers for tensor in NORM
    }


@pytest.mark.parametrize("name", DEPTHS)
def test_there_and_back_is_the_identity(name):
    keys = torchvision_keys(name)
    theirs = [torchvision_to_detectron2(key) for key in keys]
    assert len(set(theirs)) == len(keys)
    assert [detectron2_to_torchvision(key) for key in theirs] == keys
    assert not set(theirs) & set(keys)


@pytest.mark.parametrize("depth", BLOCKS)
def test_names_are_those_detectron2_gives_to_the_architecture(depth):
    keys = {torchvision_to_detectron2(key) for key in torchvision_keys(f"resnet{depth}")}
    keys = {key for key in keys if not re.search(r"linear|num_batches_tracked", key)}
    assert keys == detectron2_keys(depth)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.conv3.weight", "res2.0.conv3.weight"),
        ("layer3.22.bn2.num_batches_tracked", "res4.22.conv2.norm.num_batches_tracked"),
        ("layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
        ("layer4.0.downsample.1.ref_mean", "res5.0.shortcut.norm.ref_mean"),
        ("fc.bias", "linear.bias"),
    ],
)
def test_rules_by_example(theirs, ours):
    assert torchvision_to_detectron2(theirs) == ours
    assert detectron2_to_torchvision(ours) == theirs
    assert detectron2_to_torchvision("backbone.bottom_up." + ours) == theirs


@pytest.mark.parametrize("name", ["layer5.0.conv1.weight", "conv1.0.weight", "blocks.0.qkv.weight"])
def test_a_foreign_name_is_an_error_with_the_name(name):
    with pytest.raises(ValueError, match=re.escape(name)):
        torchvision_to_detectron2(name)
    with pytest.raises(ValueError, match=re.escape(name)):
        detectron2_to_torchvision(name)


@pytest.mark.parametrize("prefix", ["backbone.bottom_up.", "backbone.", ""])
def test_any_form_of_names_reaches_the_model(prefix):
    heads = ["roi_heads.box_predictor.cls_score.weight", "proposal_generator.rpn_head.conv.bias"]
    model_keys = [prefix + key for key in detectron2_keys(50)] + heads
    bare = {key: key for key in detectron2_keys(50)}
    torchvision_state = {detectron2_to_torchvision(key): key for key in bare}
    for state in (bare, torchvision_state):
        assert to_detectron2(state, model_keys) == {prefix + key: key for key in bare}
    whole = dict.fromkeys(model_keys)
    assert to_detectron2(whole, model_keys) == whole


def test_a_model_with_torchvision_names_keeps_them():
    keys = torchvision_keys("resnet18")
    assert list(to_detectron2(dict.fromkeys(keys), keys)) == keys


def test_res5_of_a_c4_model_is_among_its_heads():
    model_keys = ["backbone.res4.0.conv1.weight", "roi_heads.res5.0.conv1.weight"]
    state = {"layer3.0.conv1.weight": 4, "layer4.0.conv1.weight": 5}
    assert to_detectron2(state, model_keys) == dict(zip(model_keys, (4, 5), strict=True))


def test_tensors_that_the_model_lacks_keep_their_place():
    model_keys = ["backbone.bottom_up.stem.conv1.weight"]
    state = {"bn1.weight": 0, "fc.weight": 1, "roi_heads.mask_head.predictor.bias": 2}
    assert list(to_detectron2(state, model_keys)) == [
        "backbone.bottom_up.stem.conv1.norm.weight",
        "backbone.bottom_up.linear.weight",
        "roi_heads.mask_head.predictor.bias",
    ]


def test_two_names_for_one_tensor_are_an_error():
    state = {"conv1.weight": 0, "stem.conv1.weight": 1}
    with pytest.raises(ValueError, match=r"'conv1.weight' and 'stem.conv1.weight'"):
        to_detectron2(state, ["backbone.stem.conv1.weight"])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("conv1.weight", ("", "stem.conv1.weight")),
        ("layer4.1.bn2.ref_var", ("", "res5.1.conv2.norm.ref_var")),
        ("res2.0.shortcut.norm.bias", ("", "res2.0.shortcut.norm.bias")),
        ("backbone.bottom_up.res2.0.conv1.weight", ("backbone.bottom_up.", "res2.0.conv1.weight")),
        ("backbone.stem.conv1.weight", ("backbone.", "stem.conv1.weight")),
        ("roi_heads.res5.0.conv1.weight", ("roi_heads.", "res5.0.conv1.weight")),
        ("backbone.layer1.0.conv1.weight", None),
        ("backbone.fpn_lateral2.weight", None),
        ("layer1.0.se.fc1.weight", None),
        ("res6.0.conv1.weight", None),
    ],
)
def test_a_resnets_name_is_split_from_its_place(name, expected):
    assert resnet_name(name) == expected


def test_backbone_prefix():
    assert backbone_prefix(["backbone.fpn_lateral2.weight", "backbone.bottom_up.stem.a"]) == (
        "backbone.bottom_up."
    )
    assert backbone_prefix(iter(["backbone.stem.conv1.weight"])) == "backbone."
    assert backbone_prefix(["stem.conv1.weight"]) == ""


@pytest.mark.detectron2
@pytest.mark.parametrize("depth", BLOCKS)
def test_detectron2s_own_resnets_have_these_names(depth):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    with torch.device("meta"):
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert set(model.state_dict()) == detectron2_keys(depth)


def test_timms_resnets_have_torchvisions_names():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        assert list(timm.create_model("resnet50").state_dict()) == torchvision_keys("resnet50")
