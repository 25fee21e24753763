import argparse
import logging
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.checkpoint.loading import load_weights
from refbn_d2.layers import RefBatchNorm2d
from refbn_d2.utils.errors import CheckpointError
from refbn_d2.utils.file_io import remove_unfinished, write_text


class Code:
    """Its unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def assert_same(tensors, expected):
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, torch.as_tensor(expected[name]), rtol=0, atol=0)


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "stem.conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "stem.conv1.norm.num_batches_tracked": torch.tensor(7),
        "linear.bias": torch.randn(5, generator=generator).half(),
    }


# ---- writing


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "sub/folder/a.pth"])
def test_saved_is_what_torch_reads(tmp_path, name):
    save_checkpoint({"model": state(), "iteration": 3}, tmp_path / name)
    data = torch.load(tmp_path / name, weights_only=True)
    assert data.pop("iteration") == 3
    assert_same(data["model"], state())


def test_saved_pkl_is_detectron2s_format(tmp_path):
    save_checkpoint({"model": state(), "matching_heuristics": True}, tmp_path / "a.pkl")
    with open(tmp_path / "a.pkl", "rb") as file:
        data = pickle.load(file, encoding="latin1")
    assert data["__author__"] and data["matching_heuristics"] is True
    assert all(isinstance(array, np.ndarray) for array in data["model"].values())
    assert_same({name: torch.from_numpy(array) for name, array in data["model"].items()}, state())
    with pytest.raises(ValueError, match="b.pkl"):
        save_checkpoint(state(), tmp_path / "b.pkl")


def test_saved_pkl_holds_no_tensors_anywhere(tmp_path):
    data = {"model": state(), "classifier": state(1), "optimizer": {"state": {0: torch.ones(2)}}}
    save_checkpoint(data, tmp_path / "a.pkl")
    loaded = load_checkpoint(tmp_path / "a.pkl")
    assert_same({n: torch.tensor(a) for n, a in loaded["classifier"].items()}, state(1))
    assert isinstance(loaded["optimizer"]["state"][0], np.ndarray)
    with pytest.raises(ValueError, match="b.pkl: numpy has no bfloat16.*.pth"):
        save_checkpoint({"model": {"a": torch.ones(2).bfloat16()}}, tmp_path / "b.pkl")
    assert os.listdir(tmp_path) == ["a.pkl"]


def test_saved_safetensors_is_what_safetensors_reads(tmp_path):
    whole = torch.arange(24.0).view(2, 3, 4, 1)
    tensors = {**state(), "half": whole[:1], "turned": whole.transpose(1, 2), "same": whole}
    tensors["last"] = whole.contiguous(memory_format=torch.channels_last).bfloat16()
    save_checkpoint(tensors, tmp_path / "a.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert_same({name: loaded[name] for name in tensors}, tensors)
    assert_same(load_checkpoint(tmp_path / "a.safetensors")["model"], loaded)
    with pytest.raises(ValueError, match="b.safetensors: .*tensors alone, not model, iteration"):
        save_checkpoint({"model": state(), "iteration": 3}, tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, name):
    save_checkpoint({"model": state(0)}, tmp_path / name)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint({"model": state(1), "hook": lambda: None}, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert_same(load_checkpoint(tmp_path / name)["model"], state(0))


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    """By a process that is killed in the middle of a file, really."""
    code = """
import os, sys
from refbn_d2.utils.file_io import written_whole
from pathlib import Path
with written_whole(Path(sys.argv[1])) as file:
    file.write(b"half")
    os.kill(os.getpid(), 9)
"""
    write_text(tmp_path / "model.pth", "whole")
    command = [sys.executable, "-c", code, str(tmp_path / "model.pth")]
    assert subprocess.run(command).returncode == -9
    assert len(os.listdir(tmp_path)) == 2
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["model.pth"]
    assert (tmp_path / "model.pth").read_text() == "whole"


def test_a_text_iswritten_whole(tmp_path):
    write_text(tmp_path / "folder" / "last_checkpoint", "modèle.pth")
    write_text(tmp_path / "folder" / "last_checkpoint", "model.pth")
    assert (tmp_path / "folder" / "last_checkpoint").read_text() == "model.pth"
    with pytest.raises(AttributeError):
        write_text(tmp_path / "folder" / "last_checkpoint", None)
    assert (tmp_path / "folder" / "last_checkpoint").read_text() == "model.pth"
    assert os.listdir(tmp_path / "folder") == ["last_checkpoint"]


# ---- reading


def write(path, data):
    if path.suffix == ".pkl":
        with open(path, "wb") as file:
            pickle.dump(data, file)
    else:
        torch.save(data, path)


@pytest.mark.parametrize("protocol", range(6))
def test_reads_detectron2s_pkl(tmp_path, protocol):
    arrays = {name: tensor.numpy() for name, tensor in state().items()}
    arrays["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    data = {
        "model": OrderedDict(arrays),
        "__author__": "someone",
        "matching_heuristics": True,
        "results": [np.float64(1.5), (np.int64(2), None, b"\xff\x00", {"set", "of"})],
    }
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump(data, file, protocol=protocol)
    loaded = load_checkpoint(tmp_path / "a.pkl")
    assert_same(loaded.pop("model"), arrays)
    data.pop("model")
    assert loaded == data


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrapper", ["model", "state_dict", "model_state_dict", "params", "weights", "model_ema", None]
)
def test_reads_torchs_files_however_wrapped(tmp_path, wrapper, legacy):
    data = {wrapper: state(), "iteration": 3} if wrapper else state()
    torch.save(data, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert_same(loaded.pop("model"), state())
    assert loaded == ({"iteration": 3} if wrapper else {})


def test_weights_come_before_their_averages(tmp_path):
    save_checkpoint({"model_ema": state(1), "model": state(0)}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert_same(loaded["model"], state(0))
    assert_same(loaded["model_ema"], state(1))


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_a_key_says_which_weights(tmp_path, name):
    data = {"model": state(0), "state_dict_ema": state(1), "iteration": 3}
    save_checkpoint(data, tmp_path / name)
    loaded = load_checkpoint(tmp_path / name, key="state_dict_ema")
    assert_same(loaded["model"], state(1))
    for key in ("ema", "iteration"):
        text = f"{name} has no weights under '{key}'; it has .*model, state_dict_ema, iteration"
        with pytest.raises(CheckpointError, match=text):
            load_checkpoint(tmp_path / name, key=key)


def test_reads_safetensors(tmp_path):
    safetensors.torch.save_file(state(), tmp_path / "a.safetensors")
    loaded = load_checkpoint(tmp_path / "a.safetensors")["model"]
    assert_same({name: loaded[name] for name in state()}, state())


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "_orig_mod."])
def test_parallel_prefixes_are_dropped(tmp_path, prefix):
    save_checkpoint({prefix + name: t for name, t in state().items()}, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth")["model"], state())


def test_an_averaged_models_prefix_and_counter_are_dropped(tmp_path):
    model = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    save_checkpoint({"model_ema": model.state_dict()}, tmp_path / "a.pth")
    assert list(load_checkpoint(tmp_path / "a.pth")["model"]) == ["weight", "bias"]


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    data = {"module.weight": torch.ones(2), "other.weight": torch.ones(2)}
    save_checkpoint(data, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth")["model"], data)


def test_what_is_no_tensor_is_ignored_with_a_word(tmp_path, caplog):
    save_checkpoint({"model": {**state(), "note": "hello"}}, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth")["model"], state())
    assert "a.pth" in caplog.text and "note" in caplog.text


# ---- refusing


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "plain.pth", "legacy.pth"])
def test_code_is_refused_and_not_run(tmp_path, name):
    data = {"model": state() if "pkl" not in name else {}, "more": [Code(tmp_path / "ran")]}
    if name == "plain.pth":
        (tmp_path / name).write_bytes(pickle.dumps(data["more"]))
    elif name == "legacy.pth":
        torch.save(data, tmp_path / name, _use_new_zipfile_serialization=False)
    else:
        write(tmp_path / name, data)
    with pytest.raises(CheckpointError, match=f"{name} holds code.*open.*refused"):
        load_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(data["more"]))[0].close()  # the trap is a live one
    assert (tmp_path / "ran").exists()


def test_objects_are_refused(tmp_path):
    torch.save({"model": state(), "thing": nn.Linear(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a.pth holds code or objects \(.*Linear"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "legacy.pth"])
def test_argparses_options_beside_the_weights_are_read(tmp_path, name):
    """timm's own training checkpoints have them."""
    options = argparse.Namespace(lr=0.1, model="resnet50", sizes=[1, 2])
    data = {"state_dict": state(), "args": options, "arch": "resnet50"}
    if name == "a.pkl":
        data["state_dict"] = {n: t.numpy() for n, t in state().items()}
        write(tmp_path / name, data)
    else:
        torch.save(data, tmp_path / name, _use_new_zipfile_serialization=name == "a.pth")
    loaded = load_checkpoint(tmp_path / name)
    assert loaded["args"] == vars(options) and loaded["arch"] == "resnet50"
    assert_same(loaded["model"], state())


@pytest.mark.parametrize("suffix", ["pth", "pkl", "safetensors"])
@pytest.mark.parametrize("content", ["empty", "half", "tail", "text", "page", "pointer"])
def test_what_is_no_checkpoint_is_an_error_with_the_file(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(state(), path)
    else:
        save_checkpoint({"model": state()}, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "tail": whole[:-20],
            "text": b"hello, world\n",
            "page": b"<!doctype html><html><body>404</body></html>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        }[content]
    )
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + " is (empty|cut off)"):
        load_checkpoint(path)


def test_a_missing_file_is_an_error_with_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
@pytest.mark.parametrize("data", [{}, {"model": {}}, {"epoch": 3, "lr": [0.1]}, [1, 2]])
def test_no_tensors_is_an_error_with_the_file(tmp_path, name, data):
    write(tmp_path / name, data)
    with pytest.raises(CheckpointError, match=f"{name} holds (no tensors|a list)"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "data", [{"blobs": {"conv1_w": np.ones(2)}}, {"conv1_w": np.ones(2), "conv1_bn_s": np.ones(2)}]
)
def test_caffe2_is_refused_with_the_way_out(tmp_path, data):
    write(tmp_path / "R-50.pkl", data)
    with pytest.raises(CheckpointError, match="R-50.pkl.*Caffe2.*use Detectron2"):
        load_checkpoint(tmp_path / "R-50.pkl")


def test_torchscript_is_refused(tmp_path):
    with pytest.warns(Warning):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt is a TorchScript"):
        load_checkpoint(tmp_path / "a.pt")


# ---- loading into a model

NORMS = {
    "BN": nn.BatchNorm2d,
    "RefBN": RefBatchNorm2d,
    "FrozenBN": torchvision.ops.FrozenBatchNorm2d,
    "": lambda channels: nn.Identity(),
    "GN": lambda channels: nn.GroupNorm(2, channels),
}


class Conv(nn.Conv2d):
    def __init__(self, inputs, outputs, norm):
        super().__init__(inputs, outputs, 3, bias=False)
        self.norm = norm(outputs)


class Detector(nn.Module):
    """The names of a Detectron2 detector with FPN, or without (`fpn=False`)."""

    def __init__(self, norm="BN", blocks=6, classes=3, fpn=True, width=4):
        super().__init__()
        norm = NORMS[norm]
        resnet = nn.Module()
        resnet.stem = nn.Module()
        resnet.stem.conv1 = Conv(3, width, norm)
        resnet.res2 = nn.Sequential()
        for i in range(blocks):
            resnet.res2.append(nn.Module())
            resnet.res2[i].conv1 = Conv(width, width, norm)
        self.backbone = resnet
        if fpn:
            self.backbone = nn.Module()
            self.backbone.fpn_lateral2 = nn.Conv2d(width, 8, 1)
            self.backbone.bottom_up = resnet
        self.roi_heads = nn.Module()
        self.roi_heads.box_predictor = nn.Linear(8, classes)


def randomised(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 9 + 1)
    return model


def shared(model, other):
    names = [n for n in model.state_dict() if n in other.state_dict()]
    assert names
    return names


@pytest.mark.parametrize("there", ["BN", "RefBN", "FrozenBN"])
@pytest.mark.parametrize("here", ["BN", "RefBN", "FrozenBN"])
def test_batch_norms_load_into_each_other(here, there, caplog):
    caplog.set_level(logging.INFO)
    source, model = randomised(Detector(there)), randomised(Detector(here), seed=2)
    report = load_weights(model, source.state_dict(), "a.pth")
    names = shared(model, source)
    assert_same(
        {n: model.state_dict()[n] for n in names}, {n: source.state_dict()[n] for n in names}
    )
    assert report.loaded == names
    assert report.missing == report.unexpected == report.shape_mismatch == []
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "a.pth: 39 of the model's 39 tensors loaded; 0 not in the file" in caplog.text
    if here == "RefBN" and there != "RefBN":
        norm = model.backbone.bottom_up.stem.conv1.norm
        assert torch.equal(norm.ref_mean, norm.running_mean)
        assert torch.equal(norm.ref_var, norm.running_var)


def imagenet_names(model):
    """The backbone's state under torchvision's names, with a classifier."""
    renamed = {"fc.weight": torch.ones(10, 4)}
    for name, tensor in model.backbone.bottom_up.state_dict().items():
        name = name.replace("stem.conv1.norm", "bn1").replace("stem.", "").replace("res2", "layer1")
        renamed[name.replace("conv1.norm", "bn1")] = tensor
    return renamed


@pytest.mark.parametrize("fpn", [True, False])
def test_an_imagenet_backbone_fills_a_detectors(fpn, caplog):
    source, model = randomised(Detector()), randomised(Detector("RefBN", fpn=fpn), seed=2)
    heads = {
        n: t.clone() for n, t in model.state_dict().items() if "res" not in n and "stem" not in n
    }
    report = load_weights(model, imagenet_names(source), "resnet50.pth")
    resnet = model.backbone.bottom_up if fpn else model.backbone
    expected = source.backbone.bottom_up.state_dict()
    assert_same({n: resnet.state_dict()[n] for n in expected}, expected)
    assert_same({n: model.state_dict()[n] for n in heads}, heads)
    assert sorted(report.missing) == sorted(heads)
    assert report.unexpected == [f"backbone.{'bottom_up.' if fpn else ''}linear.weight"]
    assert "left as initialized: backbone.fpn_lateral2.weight" in caplog.text or not fpn


def test_a_predictor_of_other_classes_is_skipped(caplog):
    source, model = randomised(Detector(classes=80)), randomised(Detector(classes=3), seed=2)
    before = model.roi_heads.box_predictor.weight.clone()
    report = load_weights(model, source.state_dict(), "coco.pth")
    assert torch.equal(model.roi_heads.box_predictor.weight, before)
    assert torch.equal(model.backbone.fpn_lateral2.weight, source.backbone.fpn_lateral2.weight)
    name = "roi_heads.box_predictor.weight"
    assert report.shape_mismatch[0] == (name, (80, 8), (3, 8)) and name not in report.loaded
    assert f"Skip loading '{name}'" in caplog.text and "(80, 8)" in caplog.text


def test_nothing_fits_is_an_error_with_both_sides_names():
    model = Detector()
    with pytest.raises(CheckpointError) as error:
        load_weights(model, {"blocks.0.attn.qkv.weight": torch.ones(3)}, "vit.pth")
    for text in ("vit.pth", "blocks.0.attn.qkv.weight", "backbone.fpn_lateral2.weight"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    "source, model, text",
    [
        (Detector(blocks=4), Detector(), "10 of the 35 backbone tensors of the model do not fit"),
        (Detector(blocks=9), Detector(), "15 of the 50 backbone tensors of the file do not fit"),
        (Detector(""), Detector(), "28 of the 35 backbone tensors of the model do not fit"),
        (Detector(), Detector(""), "28 of the 35 backbone tensors of the file do not fit"),
        (Detector("GN"), Detector(), "14 of the 35 backbone tensors of the model do not fit"),
        (Detector(), Detector("GN"), "14 of the 35 backbone tensors of the file do not fit"),
        (
            Detector(width=8),
            Detector(),
            "35 of the 35 .*stem.conv1.weight (8, 3, 3, 3) in the file, (4, 3, 3, 3) in the model",
        ),
    ],
    ids=["depth", "deeper", "no norm", "no norm here", "GN", "GN here", "width"],
)
def test_a_backbone_that_does_not_fit_is_an_error(source, model, text, caplog):
    before = {name: t.clone() for name, t in randomised(model).state_dict().items()}
    pattern = "other.pth: " + re.escape(text).replace(r"\.\*", "(.|\n)*")
    with pytest.raises(CheckpointError, match=pattern) as error:
        load_weights(model, source.state_dict(), "other.pth")
    assert "depth, width or norm" in str(error.value)
    assert_same(model.state_dict(), before)

    load_weights(model, source.state_dict(), "other.pth", allow_partial=True)
    assert re.search(pattern, caplog.text)
    for name in shared(model, source):
        theirs = source.state_dict()[name]
        expected = theirs if theirs.shape == before[name].shape else before[name]
        assert torch.equal(model.state_dict()[name], expected), name


def test_long_lists_are_cut_with_their_number():
    with pytest.raises(CheckpointError, match="(?s)28 of.*and 8 more") as error:
        load_weights(Detector(), Detector("").state_dict(), "a.pth")
    assert str(error.value).count("not in the file") == 20


def test_another_depth_is_an_error_with_both():
    with torch.device("meta"):
        source, model = torchvision.models.resnet50(), torchvision.models.resnet101()
    text = "a.pth: .* The file holds a ResNet-50, the model a ResNet-101"
    with pytest.raises(CheckpointError, match=text):
        load_weights(model, source.state_dict(), "a.pth")


def test_a_tensor_or_two_may_lack():
    source = {
        n: t
        for n, t in Detector().state_dict().items()
        if n != "backbone.bottom_up.stem.conv1.weight"
    }
    report = load_weights(Detector(), source, "a.pth")
    assert report.missing == ["backbone.bottom_up.stem.conv1.weight"]


def test_old_detectron2_leftovers_are_no_news():
    source = Detector().state_dict()
    source["pixel_mean"] = torch.ones(3, 1, 1)
    source["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(3, 4)
    assert load_weights(Detector(), source, "a.pth").unexpected == []


def test_a_file_loads_into_a_torchvision_resnet(tmp_path):
    torch.manual_seed(0)
    source, model = torchvision.models.resnet18(), torchvision.models.resnet18(num_classes=7)
    save_checkpoint({"state_dict": source.state_dict()}, tmp_path / "a.pth")
    report = load_weights(model, load_checkpoint(tmp_path / "a.pth")["model"], "a.pth")
    assert [name for name, _, _ in report.shape_mismatch] == ["fc.weight", "fc.bias"]
    assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_detectron2_reads_what_is_saved(tmp_path, name):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer

    source, model = randomised(Detector("RefBN")), randomised(Detector("BN"), seed=2)
    save_checkpoint({"model": source.state_dict()}, tmp_path / name)
    DetectionCheckpointer(model).load(str(tmp_path / name))
    names = shared(model, source)
    assert_same(
        {n: model.state_dict()[n] for n in names}, {n: source.state_dict()[n] for n in names}
    )


@pytest.mark.detectron2
def test_detectron2s_frozen_norm_is_filled():
    frozen = pytest.importorskip("detectron2.layers").FrozenBatchNorm2d
    NORMS["detectron2"] = frozen
    source, model = randomised(Detector("RefBN")), Detector("detectron2")
    report = load_weights(model, source.state_dict(), "a.pth")
    names = shared(model, source)
    assert_same(
        {n: model.state_dict()[n] for n in names}, {n: source.state_dict()[n] for n in names}
    )
    assert report.missing == report.unexpected == []
