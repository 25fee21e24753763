"""tools/convert_checkpoint.py converts files, as a user calls it."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.config import ConfigError
from refbn_d2.export import verify
from refbn_d2.export.convert_file import convert_file
from refbn_d2.utils.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("small_picture")

TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"


@pytest.fixture
def source(resnet18, tmp_path):
    """Save torchvision's ResNet-18 as torchvision's users do."""
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return path


@pytest.fixture
def detector(mask_rcnn, mask_rcnn_cfg, tmp_path):
    """Write a detector's checkpoint and its config.yaml, as a run does."""
    folder = tmp_path / "run"
    save_checkpoint({"model": mask_rcnn.state_dict(), "iteration": 7}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(mask_rcnn_cfg.dump())
    return folder / "model_final.pth"


def same(first, second):
    return list(first) == list(second) and all(first[n].equal(second[n]) for n in first)


@pytest.mark.parametrize("suffix", ["pkl", "pth", "safetensors"])
def test_there_and_back_is_the_file_to_the_bit(source, tmp_path, suffix, no_detectron2):
    there, back = tmp_path / f"r18.{suffix}", tmp_path / "back.pth"
    text = convert_file(source, there, "detectron2", check=True)
    assert "ResNet-18 in detectron2's layout" in text and "res5 " in text
    for line in ("MODEL.RESNETS.DEPTH 18", "MODEL.RESNETS.NORM BN", "INPUT.FORMAT RGB"):
        assert f"  {line}\n" in f"{text}\n"
    assert ("Detectron2 itself reads only .pkl and .pth." in text) == (suffix == "safetensors")
    convert_file(there, back, "torchvision")
    expected, found = (torch.load(path) for path in (source, back))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_pkl_is_what_detectron2_reads(source, tmp_path):
    convert_file(source, tmp_path / "a.pkl", "detectron2", "RefBN")
    data = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert data["__author__"] == "refbn_d2" and data["matching_heuristics"] is True
    assert all(isinstance(value, np.ndarray) for value in data["model"].values())
    assert {"stem.conv1.weight", "res5.1.conv2.norm.ref_mean"} < data["model"].keys()
    assert not any(name.startswith("linear") for name in data["model"])
    assert data["classifier"]["linear.weight"].shape == (7, 512)


@pytest.mark.parametrize("norm", ["FrozenBN", "folded"])
def test_a_detector_is_converted_with_the_config_beside_it(
    detector, mask_rcnn, tmp_path, norm, no_detectron2
):
    text = convert_file(detector, tmp_path / "a.pth", "detectron2", norm, check=True)
    assert "detections" in text and "MODEL.RESNETS.NORM FrozenBN" in text
    heads = {"FrozenBN": "FrozenBN", "folded": "''"}[norm]
    for section in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        assert f"  MODEL.{section}.NORM {heads}\n" in f"{text}\n"
    state = load_checkpoint(tmp_path / "a.pth")["model"]
    assert not any(name.endswith(("ref_mean", "num_batches_tracked")) for name in state)
    assert ("backbone.fpn_output2.bias" in state) == (norm == "folded")
    kept = "roi_heads.box_predictor.cls_score.weight"
    assert state[kept].equal(mask_rcnn.state_dict()[kept])


def test_a_detector_without_config_and_one_with_anothers(detector, source, tmp_path):
    convert_file(detector, tmp_path / "a.pth", "detectron2", "BN")  # names and norms need no config
    (detector.parent / "config.yaml").rename(tmp_path / "other.yaml")
    with pytest.raises(CheckpointError, match="no config.yaml next to it.* give --config-file"):
        convert_file(detector, tmp_path / "b.pth", "detectron2", "BN", check=True)
    text = (tmp_path / "other.yaml").read_text()
    (tmp_path / "other.yaml").write_text(text.replace("DEPTH: 18", "DEPTH: 34"))
    with pytest.raises(ConfigError, match="MODEL.RESNETS.DEPTH is 34, but .* holds a ResNet-18"):
        convert_file(
            detector, tmp_path / "b.pth", "detectron2", "BN", True, False, tmp_path / "other.yaml"
        )
    assert not (tmp_path / "b.pth").exists()


def test_stride_in_the_1x1_convolution_does_not_go_to_torchvision(tmp_path):
    import torchvision

    from refbn_d2.config import get_cfg

    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "r50.pth")
    (tmp_path / "c.yaml").write_text(get_cfg().dump())
    with pytest.raises(ConfigError, match="STRIDE_IN_1X1 is True, but torchvision's"):
        convert_file(
            tmp_path / "r50.pth", tmp_path / "o.pth", "torchvision", config_file=tmp_path / "c.yaml"
        )


def test_what_fails_the_check_is_not_written(source, tmp_path, monkeypatch, no_detectron2):
    monkeypatch.setattr(verify, "TOLERANCE", 1e-12)
    with pytest.raises(CheckpointError, match="computes something else"):
        convert_file(source, tmp_path / "a.pkl", "detectron2", "folded", check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resnet18.pth"]


def test_refin_takes_no_check(source, tmp_path):
    with pytest.raises(CheckpointError, match="something else by design: leave out --verify"):
        convert_file(source, tmp_path / "a.pkl", "detectron2", "RefIN", check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resnet18.pth"]


def test_no_file_is_ever_replaced(source, tmp_path):
    before = source.read_bytes()
    with pytest.raises(
        FileExistsError, match="resnet18.pth is the source itself and is not replaced"
    ):
        convert_file(source, source, "torchvision", "RefBN")
    (tmp_path / "mine.pth").write_text("precious")
    with pytest.raises(FileExistsError, match="mine.pth exists already and is not replaced"):
        convert_file(source, tmp_path / "mine.pth", "detectron2")
    assert source.read_bytes() == before and (tmp_path / "mine.pth").read_text() == "precious"


@pytest.mark.parametrize(
    "to, name, message",
    [
        ("detectron2", "a.onnx", r"writes .pkl or .pth or .safetensors, not '.onnx'"),
        ("torchvision", "a.pkl", r"writes .pth or .pt or .safetensors, not '.pkl'"),
        ("onnx", "a.pth", r"writes .onnx, not '.pth'"),
    ],
)
def test_suffixes(source, tmp_path, to, name, message):
    with pytest.raises(CheckpointError, match=message):
        convert_file(source, tmp_path / name, to)


def test_a_norm_is_not_for_a_program(source, tmp_path):
    with pytest.raises(CheckpointError, match="--to onnx folds all norms: leave out --norm BN"):
        convert_file(source, tmp_path / "a.onnx", "onnx", "BN")


# ---- the command line


def call(*arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), *map(str, arguments)],
        capture_output=True, text=True, env={"PYTHONPATH": str(TOOL.parents[1])},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_command_line(source, tmp_path):
    code, out, err = call(source, tmp_path / "a.pkl", "--to", "detectron2", "--verify")
    assert code == 0 and "res5 " in out, err
    code, out, err = call("--inspect", tmp_path / "a.pkl")
    assert code == 0 and "classifier, ResNet-18 with BN, 7 classes" in out, err
    cut = tmp_path / "cut.pth"
    cut.write_bytes(source.read_bytes()[:1000])
    code, out, err = call(cut, tmp_path / "b.pkl", "--to", "detectron2")
    assert code == 1 and err.startswith("CheckpointError: ") and "cut.pth is cut off" in err
    assert "Traceback" not in err and not (tmp_path / "b.pkl").exists()
    code, out, err = call(source)
    assert code == 2 and "give SRC, DST and --to" in err
