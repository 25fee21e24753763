"""RefBN in Detectron2's models: wherever BN may stand, and treated as BN."""

import copy
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn

from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d, refbn_layers
from tests.plugin.helpers import FPN, build

pytest.importorskip("detectron2.layers", reason="Detectron2 is not installed")
pytestmark = pytest.mark.detectron2


# ---- the places where Detectron2 takes a norm's name


RETINANET = [
    "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
]  # fmt: skip


def regnet(norm):
    from detectron2.modeling.backbone import RegNet
    from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

    return RegNet(
        stem_class=SimpleStem, stem_width=8, block_class=ResBottleneckBlock, depth=4, w_a=10,
        w_0=16, w_m=2.5, group_width=8, norm=norm,
    )  # fmt: skip


def vitdet_pyramid(norm):
    from detectron2.modeling.backbone import SimpleFeaturePyramid, ViT

    vit = ViT(img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2, out_feature="last")
    return SimpleFeaturePyramid(
        vit, in_feature="last", out_channels=8, scale_factors=(4.0, 2.0, 1.0), norm=norm
    )


def point_rend(norm):
    from detectron2.projects.point_rend import add_pointrend_config

    return build(
        *FPN, "MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead",
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "", "MODEL.POINT_HEAD.NUM_CLASSES", 80,
        "MODEL.POINT_HEAD.IN_FEATURES", ["p2"], "MODEL.RESNETS.NORM", norm,
        add_config=add_pointrend_config,
    )  # fmt: skip


def deeplab(norm):
    from detectron2.projects.deeplab import add_deeplab_config

    return build(
        "MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone",
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"], "MODEL.RESNETS.NORM", norm,
        "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32,
        "MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3PlusHead", "MODEL.SEM_SEG_HEAD.NORM", norm,
        "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res5"],
        "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES", ["res2"],
        "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [8],
        "INPUT.CROP.SIZE", [64, 64], "INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute",
        meta="SemanticSegmentor", add_config=add_deeplab_config,
    )  # fmt: skip


def panoptic_deeplab(norm):
    from detectron2.projects.panoptic_deeplab import add_panoptic_deeplab_config

    return build(
        "MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone",
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res5"], "MODEL.RESNETS.NORM", norm,
        "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32,
        "MODEL.SEM_SEG_HEAD.NAME", "PanopticDeepLabSemSegHead", "MODEL.SEM_SEG_HEAD.NORM", norm,
        "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res5"],
        "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES", ["res2", "res3"],
        "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [8, 8], "MODEL.INS_EMBED_HEAD.NORM", norm,
        "MODEL.INS_EMBED_HEAD.IN_FEATURES", ["res2", "res3", "res5"],
        "MODEL.INS_EMBED_HEAD.PROJECT_FEATURES", ["res2", "res3"],
        "MODEL.INS_EMBED_HEAD.PROJECT_CHANNELS", [8, 8],
        "INPUT.CROP.SIZE", [64, 64], "DATASETS.TRAIN", ("coco_2017_train",),
        meta="PanopticDeepLab", add_config=add_panoptic_deeplab_config,
    )  # fmt: skip


def box_head(norm):
    return build(
        *FPN, "MODEL.ROI_BOX_HEAD.NORM", norm, "MODEL.ROI_BOX_HEAD.NUM_CONV", 2
    ).roi_heads.box_head


def mask_head(norm):
    return build(
        *FPN, "MODEL.MASK_ON", True,
        "MODEL.ROI_MASK_HEAD.NORM", norm, "MODEL.ROI_MASK_HEAD.NUM_CONV", 2,
    ).roi_heads.mask_head  # fmt: skip


def semantic_head(norm):
    return build(*FPN, "MODEL.SEM_SEG_HEAD.NORM", norm, meta="PanopticFPN").sem_seg_head


def retinanet_head(norm):
    return build(*RETINANET, "MODEL.RETINANET.NORM", norm, meta="RetinaNet").head


PLACES = {
    "RESNETS": lambda norm: build("MODEL.RESNETS.NORM", norm).backbone,
    "FPN": lambda norm: build(*FPN, "MODEL.FPN.NORM", norm).backbone,
    "ROI_BOX_HEAD": box_head,
    "ROI_MASK_HEAD": mask_head,
    "RETINANET": retinanet_head,
    "SEM_SEG_HEAD": semantic_head,
    "RegNet": regnet,
    "ViTDet": vitdet_pyramid,
    "PointRend": point_rend,
    "DeepLab": deeplab,
    "Panoptic-DeepLab": panoptic_deeplab,
}


@pytest.mark.parametrize("place", PLACES)
def test_refbn_stands_wherever_bn_does(place, monkeypatch):
    """As many layers as BN's, of the same sizes."""
    # Panoptic-DeepLab's data mapper wants it at import; its model does not.
    utils = types.SimpleNamespace(rgb2id=None)
    monkeypatch.setitem(sys.modules, "panopticapi", types.SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "panopticapi.utils", utils)
    try:
        theirs = PLACES[place]("BN")
    except ImportError as error:  # projects come with a source checkout alone
        pytest.skip(f"{place}: {error}")
    others = [m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm, kind in (("RefBN", RefBatchNorm2d), ("RefIN", RefInstanceNorm2d)):
        ours = PLACES[place](norm)
        layers = [m for m in ours.modules() if isinstance(m, kind)]
        assert [m.num_features for m in layers] == [m.num_features for m in others] and layers
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        expected = {n for n in theirs.state_dict() if norm == "RefBN" or not n.endswith(statistics)}
        assert expected <= set(ours.state_dict())


def test_lazy_configs_take_the_name_and_the_class():
    from detectron2.config import LazyCall as L
    from detectron2.config import instantiate
    from detectron2.modeling.backbone.resnet import BasicStem

    for norm in ("RefBN", RefBatchNorm2d, partial(RefBatchNorm2d, reference_weight=0.5)):
        stem = instantiate(L(BasicStem)(in_channels=3, out_channels=8, norm=norm))
        assert isinstance(stem.conv1.norm, RefBatchNorm2d)
        expected = 0.5 if isinstance(norm, partial) else 0.9
        assert stem.conv1.norm.reference_weight == expected


# ---- what BN gets, RefBN gets


def test_options_reach_the_layers():
    model = build(
        "MODEL.RESNETS.NORM", "RefBN", "MODEL.REFBN.REFERENCE_WEIGHT", 0.25,
        "MODEL.REFBN.GRADIENT", "pooled",
    )  # fmt: skip
    assert {(m.reference_weight, m.gradient) for _, m in refbn_layers(model)} == {(0.25, "pooled")}
    with pytest.raises(ValueError, match=r"MODEL.REFBN.REFERENCE_WEIGHT = 1.5; allowed"):
        build("MODEL.REFBN.REFERENCE_WEIGHT", 1.5)


def test_a_config_without_the_keys_takes_the_defaults():
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    del cfg.MODEL["REFBN"], cfg.DATASETS["REGISTER"], cfg.DATALOADER["BATCH_COMPOSITION"]
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM = "cpu", "RefBN"
    layers = list(refbn_layers(build_model(cfg)))
    assert len(layers) > 9
    assert {(m.reference_weight, m.gradient) for _, m in layers} == {(0.9, "batch")}


def test_freeze_at_makes_frozen_bn():
    model = build(*FPN, "MODEL.RESNETS.NORM", "RefBN", "MODEL.BACKBONE.FREEZE_AT", 2)
    bottom_up = model.backbone.bottom_up
    for part, kind in (
        (bottom_up.stem, "Frozen"),
        (bottom_up.res2, "Frozen"),
        (bottom_up.res3, "Ref"),
    ):
        kinds = {
            type(c.norm).__name__
            for c in part.modules()
            if isinstance(getattr(c, "norm", None), nn.Module)
        }
        assert kinds == {f"{kind}BatchNorm2d"}
    assert not any("ref_" in key for key in bottom_up.res2.state_dict())


def test_weight_decay_norm():
    from detectron2.config import get_cfg
    from detectron2.solver import build_optimizer

    cfg = get_cfg()
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM = 0.3, 0.07
    model = build("MODEL.RESNETS.NORM", "RefBN").backbone
    decay = {
        p: group["weight_decay"]
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    for _, layer in refbn_layers(model):
        assert decay[layer.weight] == decay[layer.bias] == 0.07
    assert decay[model.stem.conv1.weight] == 0.3


def test_precise_bn_averages_over_batches():
    """The running variance is the population's: E[var + mean^2] - E[mean]^2 of all batches."""
    from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats

    torch.manual_seed(0)
    model = nn.Sequential(RefBatchNorm2d(3), nn.ReLU())
    assert get_bn_modules(model) == [model[0]]
    batches = [torch.randn(4, 3, 5, 5) * (i + 1) + i for i in range(6)]
    model[0].reference_weight = 0.0
    update_bn_stats(model, batches, len(batches))
    x = torch.cat(batches).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[0].running_mean, x.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[0].running_var, x.var(1), rtol=2e-2, atol=1e-3)


def test_retinanets_shared_head_has_a_layer_for_each_level():
    from detectron2.layers import CycleBatchNormList, ShapeSpec
    from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

    by_config = retinanet_head("RefBN")
    shape = [ShapeSpec(channels=32)] * 3
    by_hand = RetinaNetHead(
        input_shape=shape, num_classes=2, num_anchors=1, conv_dims=[32, 32], norm="RefBN"
    )
    for head, levels in ((by_config, 5), (by_hand, 3)):
        cycles = [m for m in head.modules() if isinstance(m, CycleBatchNormList)]
        assert cycles and all(len(c) == levels for c in cycles)
        assert all(type(m) is RefBatchNorm2d and m.weight is None for c in cycles for m in c)
    features = [torch.randn(1, 32, 8 >> i, 8 >> i) + 10 * i for i in range(3)]
    by_hand.cls_subnet[1][0].momentum = by_hand.cls_subnet[1][2].momentum = 1.0
    by_hand(features)
    low, high = (by_hand.cls_subnet[1][i] for i in (0, 2))
    conv = by_hand.cls_subnet[0]
    torch.testing.assert_close(low.running_mean, conv(features[0]).mean((0, 2, 3)))
    torch.testing.assert_close(high.running_mean, conv(features[2]).mean((0, 2, 3)))


def test_test_time_augmentation(detectron2_cfg):
    """GeneralizedRCNNWithTTA finds with RefBN what it finds with BN of the same weights."""
    from detectron2.data import DatasetCatalog, DatasetMapper
    from detectron2.modeling import GeneralizedRCNNWithTTA, build_model

    from refbn_d2.layers import convert_from_refbn

    detectron2_cfg.TEST.AUG.MIN_SIZES = (64, 80)
    detectron2_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(1)
    model = build_model(detectron2_cfg).eval()
    for _, layer in refbn_layers(model):
        layer.running_mean.normal_(0, 0.1)
        layer.running_var.uniform_(0.5, 1.5)
    sample = DatasetMapper(detectron2_cfg, is_train=False)(DatasetCatalog.get("tiny_val")[0])
    bn = convert_from_refbn(copy.deepcopy(model))
    with torch.no_grad():
        found, expected = (
            GeneralizedRCNNWithTTA(detectron2_cfg, m)([copy.deepcopy(sample)])[0]["instances"]
            for m in (model, bn)
        )
    assert len(found) == len(expected) > 3
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
