"""The backbone of a pretraining, in Detectron2's and in our detectors."""

import pickle
from pathlib import Path

import pytest
import torch
import yaml

from refbn_d2.checkpoint import load_checkpoint, load_weights
from refbn_d2.config import get_cfg
from refbn_d2.config.resume import FREE_IN_PRETRAINING
from refbn_d2.engines.torchvision.modeling import build_model as build_detector
from refbn_d2.pretrain.models import build_model
from refbn_d2.pretrain.trainer import evaluate, train
from refbn_d2.training.main import run_training


@pytest.fixture(scope="module", params=["RefBN", "RefIN", "BN", "GN"])
def pretrained(request, make_cfg, tmp_path_factory):
    """Return config and folder of a short run of a ResNet-18 with a moving average."""
    cfg = make_cfg(tmp_path_factory.mktemp(request.param))
    cfg.merge_from_list(
        ["MODEL.NAME", "resnet18", "MODEL.NORM", request.param, "SOLVER.EPOCHS", 1,
         "SOLVER.WARMUP_EPOCHS", 0, "MODEL.REFBN.PRIOR_COUNT", 32,
         "MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.5,
         "MODEL.PIXEL_MEAN", [90.0, 100.0, 110.0], "MODEL.PIXEL_STD", [50.0, 60.0, 70.0]]
    )  # fmt: skip
    run_training(cfg, train, evaluate, FREE_IN_PRETRAINING, resume=False, eval_only=False)
    return cfg, Path(cfg.OUTPUT_DIR)


def features(cfg, folder, x):
    """Return the output of timm's model at res5, with the averaged weights."""
    model = build_model(cfg, 12)
    model.load_state_dict(load_checkpoint(folder / "model_final.pth")["model_ema"])
    with torch.no_grad():
        return model.eval().forward_features(x)


def detector_config(folder, cfg, *overrides):
    """Return a user's config with two bases, of which the last is the backbone's."""
    (folder / "mine.yaml").write_text(f"_BASE_: [other.yaml, {folder}/backbone.yaml]\nSEED: 5\n")
    (folder / "other.yaml").write_text("MODEL: {WEIGHTS: other.pkl, RESNETS: {DEPTH: 101}}\n")
    cfg.merge_from_file(str(folder / "mine.yaml"))
    cfg.merge_from_list(
        ["MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.RPN.IN_FEATURES", ["res5"],
         "MODEL.ROI_HEADS.IN_FEATURES", ["res5"], "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
         "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
         "MODEL.DEVICE", "cpu", *overrides]
    )  # fmt: skip
    return cfg


def test_config_keys(pretrained):
    cfg, folder = pretrained
    detector = detector_config(folder, get_cfg())
    assert detector.MODEL.WEIGHTS == str((folder / "backbone.pkl").resolve())
    assert detector.MODEL.RESNETS.DEPTH == 18 and detector.MODEL.RESNETS.RES2_OUT_CHANNELS == 64
    assert detector.MODEL.RESNETS.NUM_GROUPS == 1 and detector.MODEL.RESNETS.WIDTH_PER_GROUP == 64
    assert detector.MODEL.RESNETS.NORM == cfg.MODEL.NORM
    assert detector.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert detector.INPUT.FORMAT == "RGB"
    assert list(detector.MODEL.PIXEL_MEAN) == [90.0, 100.0, 110.0]
    assert list(detector.MODEL.PIXEL_STD) == [50.0, 60.0, 70.0]
    assert detector.MODEL.BACKBONE.FREEZE_AT == (0 if cfg.MODEL.NORM in ("RefBN", "RefIN") else 2)
    if cfg.MODEL.NORM == "RefIN":
        assert detector.MODEL.REFBN.PRIOR_COUNT == 32
    written = (folder / "backbone.yaml").read_text()
    log = (folder / "log.txt").read_text()
    assert yaml.safe_dump(yaml.safe_load(written), sort_keys=False) in log
    assert f"_BASE_: [base.yaml, {folder.resolve()}/backbone.yaml]" in written


def test_the_file_is_detectron2s(pretrained):
    cfg, folder = pretrained
    with open(folder / "backbone.pkl", "rb") as file:
        data = pickle.load(file)
    assert data["matching_heuristics"] is True and isinstance(data["__author__"], str)
    names = data["model"].keys()
    assert {"stem.conv1.weight", "stem.conv1.norm.weight", "res5.1.conv2.norm.bias"} <= names
    assert not any(name.startswith(("fc", "linear", "backbone")) for name in names)
    assert ("res2.0.conv1.norm.ref_mean" in names) == (cfg.MODEL.NORM in ("RefBN", "RefIN"))


def test_the_torchvision_engine_loads_it(pretrained):
    cfg, folder = pretrained
    detector = detector_config(folder, get_cfg())
    model = build_detector(detector)
    weights = load_checkpoint(detector.MODEL.WEIGHTS)["model"]
    report = load_weights(model, weights, detector.MODEL.WEIGHTS)
    ours = {name for name in model.state_dict() if name.startswith("backbone.")}
    assert set(report.loaded) == ours and not report.unexpected
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got = model.eval().backbone(x)["res5"]
    torch.testing.assert_close(got, features(cfg, folder, x), rtol=1e-4, atol=1e-5)


@pytest.mark.detectron2
def test_detectron2_loads_it(pretrained):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg as get_detectron2_cfg
    from detectron2.modeling import build_model as build_detectron2

    cfg, folder = pretrained
    detector = detector_config(folder, get_detectron2_cfg())
    model = build_detectron2(detector)
    DetectionCheckpointer(model).load(detector.MODEL.WEIGHTS)
    weights = load_checkpoint(detector.MODEL.WEIGHTS)["model"]
    state = model.state_dict()
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in weights.items())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got = model.eval().backbone(x)["res5"]
    torch.testing.assert_close(got, features(cfg, folder, x), rtol=1e-4, atol=1e-5)


def test_no_backbone_for_other_models(cfg):
    run_training(cfg, train, evaluate, FREE_IN_PRETRAINING, resume=False, eval_only=False)
    folder = Path(cfg.OUTPUT_DIR)
    assert not list(folder.glob("backbone*"))
    log = (folder / "log.txt").read_text()
    assert "test_resnet is not a ResNet or ResNeXt that Detectron2 can build: only the" in log
    assert "No backbone written: Detectron2 cannot build test_resnet" in log
