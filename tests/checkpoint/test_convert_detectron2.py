"""Converted files in Detectron2's own checkpointer."""

import logging

import pytest
import torch
from torch import nn

from refbn_d2.checkpoint.convert import pack
from refbn_d2.checkpoint.files import save_checkpoint
from tests.checkpoint.resnet_states import converted, detectron2_names, small


def detectron2s_resnet(norm, freeze_at=0, name="resnet18"):
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = int(name[-2:])
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.detectron2
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("place", ["", "backbone.bottom_up."])
@pytest.mark.parametrize("source", ["RefBN", "BN", "FrozenBN"])
@pytest.mark.parametrize(
    "norm, model_norm, freeze_at",
    [("BN", "BN", 0), ("BN", "BN", 3), ("FrozenBN", "FrozenBN", 2), ("folded", "FrozenBN", 0)],
)
def test_stock_detectron2_loads_it_in_silence(
    source, norm, model_norm, freeze_at, place, suffix, tmp_path, caplog
):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer

    state = converted(small(source), "detectron2", norm)
    path = tmp_path / f"a{suffix}"
    save_checkpoint(pack(state, "detectron2", suffix), path)
    model = root = detectron2s_resnet(model_norm, freeze_at)
    for name in place.split(".")[-2::-1]:
        root = nn.ModuleDict({name: root})
    caplog.set_level(logging.INFO)
    DetectionCheckpointer(root).load(str(path))
    assert caplog.records and not [r for r in caplog.records if r.levelno > logging.INFO]
    state = {name: tensor for name, tensor in state.items() if not name.startswith("linear")}
    assert sorted(model.state_dict()) == sorted(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.detectron2
def test_stock_detectron2_loads_a_backbone_into_a_mask_rcnn(tmp_path, caplog):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    stages = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(
        [
            "MODEL.DEVICE", "cpu", "MODEL.MASK_ON", True, "MODEL.RESNETS.DEPTH", 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", stages,
            "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", stages,
            "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
            "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
            "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
            "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
            "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16,
            "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]],
        ]
    )  # fmt: skip
    state = converted(small(), "detectron2", "FrozenBN")
    save_checkpoint(pack(state, "detectron2", ".pkl"), tmp_path / "a.pkl")
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(tmp_path / "a.pkl"))
    warned = [r.getMessage() for r in caplog.records if r.levelno > logging.INFO]
    assert len(warned) == 1 and "not found in the checkpoint" in warned[0]
    assert "bottom_up" not in warned[0] and "fpn_lateral2" in warned[0]
    for name, tensor in model.backbone.bottom_up.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.detectron2
def test_stock_detectron2_would_have_loaded_nothing_of_it_before(tmp_path, caplog):
    """The test of silence can fail: with torchvision's file, and with a classifier's."""
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer

    for number, state in enumerate((small(), detectron2_names(small()))):
        path = tmp_path / f"{number}.pth"
        save_checkpoint({"model": state, "matching_heuristics": True}, path)
        caplog.clear()
        DetectionCheckpointer(detectron2s_resnet("BN")).load(str(path))
        assert [r for r in caplog.records if r.levelno > logging.INFO]
