"""Checkpoints that the Detectron2 engine reads and writes."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch

from refbn_d2.checkpoint.files import save_checkpoint
from refbn_d2.layers import refbn_layers
from refbn_d2.utils.errors import CheckpointError
from tests.detectron2_scripts import weights

pytestmark = pytest.mark.detectron2


def small(**changes):
    """Build Detectron2's Faster R-CNN R-18-FPN, with config `changes`."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
            "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
            "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
            "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
            "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
            "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
            "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
            "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
            *[part for key, value in changes.items() for part in (f"MODEL.{key}", value)],
        ]
    )  # fmt: skip
    return build_model(cfg)


def randomized(model):
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "var" in name else value.normal_()
            elif name.endswith("ref_count"):
                value.fill_(7)
    return model


def with_norm(norm):
    return small(**{"RESNETS.NORM": norm, "FPN.NORM": "" if norm == "FrozenBN" else norm})


def load(model, path, allow_partial=False):
    from refbn_d2.engines.detectron2.trainer import Checkpointer

    checkpointer = Checkpointer(model, "", allow_partial)
    checkpointer.load(str(path))


@pytest.fixture
def log(caplog):
    """Collect the warnings of Detectron2, fvcore and this package."""
    names = ("detectron2", "fvcore", "refbn_d2")
    before = {name: logging.getLogger(name).propagate for name in names}
    for name in names:
        logging.getLogger(name).propagate = True
    caplog.set_level(logging.WARNING)
    yield caplog
    for name, value in before.items():
        logging.getLogger(name).propagate = value


def test_a_refbn_checkpoint_loads_complete_and_silent(tmp_path, log):
    """Detectron2's checkpointer loads it; only the plugin is needed."""
    from detectron2.checkpoint import DetectionCheckpointer

    saved = randomized(with_norm("RefBN"))
    DetectionCheckpointer(saved, str(tmp_path)).save("model")
    log.clear()
    model = with_norm("RefBN")
    DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert log.text == ""
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(layer.has_reference() for _, layer in refbn_layers(model))


def test_a_bn_checkpoint_loads_and_its_statistics_are_the_reference(tmp_path, log):
    from detectron2.checkpoint import DetectionCheckpointer

    saved = randomized(with_norm("BN"))
    DetectionCheckpointer(saved, str(tmp_path)).save("model")
    log.clear()
    model = with_norm("RefBN")
    DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert log.text == ""
    for name, layer in refbn_layers(model):
        mean = saved.state_dict()[f"{name}.running_mean"]
        assert torch.equal(layer.ref_mean, mean) and torch.equal(layer.running_mean, mean)
        assert layer.ref_count == 1


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torchvisions_resnet_fills_the_backbone(tmp_path, suffix):
    import torchvision
    from safetensors.torch import save_file

    theirs = randomized(torchvision.models.resnet18())
    path = tmp_path / f"resnet18.{suffix}"
    if suffix == "pth":
        torch.save(theirs.state_dict(), path)
    else:
        save_file(theirs.state_dict(), path)
    model = small(**{"RESNETS.NORM": "RefBN", "RESNETS.STRIDE_IN_1X1": False})
    load(model, path)
    theirs.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        stage = theirs.layer2(theirs.layer1(y))
        ours = model.backbone.bottom_up.eval()(x)["res3"]
    torch.testing.assert_close(ours, stage, rtol=1e-4, atol=1e-3 * float(stage.abs().max()))


def as_caffe2(backbone):
    """Rename to MSRA's names: convolutions, and norms with folded statistics."""
    state, blobs = backbone.state_dict(), {}
    for name, value in state.items():
        if "norm" in name and name.rpartition(".")[2] not in ("weight", "bias"):
            continue
        *path, kind = name.split(".")
        norm = "norm" in path
        layer = [part for part in path if part != "norm"]
        if layer == ["stem", "conv1"]:
            blob = "res_conv1_bn" if norm else "conv1"
        else:
            stage, block, conv = layer
            branch = "1" if conv == "shortcut" else f"2{'abc'[int(conv[-1]) - 1]}"
            blob = f"{stage}_{block}_branch{branch}{'_bn' if norm else ''}"
        blobs[f"{blob}_{ {'weight': 's', 'bias': 'b'}[kind] if norm else 'w' }"] = value.numpy()
    return blobs


@pytest.mark.parametrize("norm", ["FrozenBN", "RefBN"])
def test_detectrons_caffe2_weights(tmp_path, norm):
    """R-50.pkl and similar files, which Detectron2's configs name."""
    changes = {"RESNETS.NORM": norm, "RESNETS.DEPTH": 50, "RESNETS.RES2_OUT_CHANNELS": 256}
    saved = randomized(small(**changes)).backbone.bottom_up
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(as_caffe2(saved)))
    model = small(**changes)
    load(model, path)
    loaded = model.backbone.bottom_up.state_dict()
    for name, value in saved.state_dict().items():
        if name.endswith((".weight", ".bias")):
            assert torch.equal(loaded[name], value), name
        elif name.endswith("running_mean"):
            assert not loaded[name].any(), name
        elif name.endswith("running_var"):
            assert loaded[name].eq(1).all(), name


def test_weights_that_do_not_fit_stop_the_run(tmp_path, log):
    """Detectron2 itself only warns, and trains from random weights."""
    saved = randomized(small(**{"RESNETS.NORM": "RefBN"}))
    save_checkpoint({"model": saved.backbone.bottom_up.state_dict()}, tmp_path / "r18.pth")
    deeper = {"RESNETS.NORM": "RefBN", "RESNETS.DEPTH": 34}
    with pytest.raises(
        CheckpointError, match=r"(?s)r18.pth: .*res2.2.conv1.weight not in the file"
    ):
        load(small(**deeper), tmp_path / "r18.pth")
    load(small(**deeper), tmp_path / "r18.pth", allow_partial=True)
    assert "do not fit" in log.text
    np.savez(tmp_path / "odd.npz", a=1)
    with pytest.raises(CheckpointError, match="odd.npz is cut off or not a checkpoint"):
        load(small(), tmp_path / "odd.npz")


def test_a_checkpoint_of_either_engine_loads_in_the_other(detectron2_cfg, tiny_cfg, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    from refbn_d2.engines.torchvision import trainer
    from refbn_d2.engines.torchvision.modeling import build_model as build_ours
    from refbn_d2.training.main import run_training

    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "DATASETS.TEST", []])
    run_training(copy.deepcopy(tiny_cfg), trainer.train, trainer.evaluate, (), False, False)
    path = tmp_path / "output/model_final.pth"
    theirs = build_model(detectron2_cfg)
    DetectionCheckpointer(theirs).load(str(path))
    DetectionCheckpointer(theirs, str(tmp_path)).save("theirs")
    ours = build_ours(tiny_cfg)
    ours.load_state_dict(weights(tmp_path / "theirs.pth"), strict=True)
    expected = weights(path)
    assert list(expected) == list(ours.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value.cpu(), expected[name]), name
