import os
import pickle
import re
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.utils.errors import CheckpointError
from tests.checkpoint.helpers import assert_same, state, write

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
    with pytest.raises(ValueError, match="b.pkl: .*numpy has no bfloat16.*.pth"):
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
    with pytest.raises(ValueError, match="b.safetensors: .*only tensors, not model, iteration"):
        save_checkpoint({"model": state(), "iteration": 3}, tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, name):
    save_checkpoint({"model": state(0)}, tmp_path / name)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint({"model": state(1), "hook": lambda: None}, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert_same(load_checkpoint(tmp_path / name)["model"], state(0))


# ---- reading


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrapper", ["model", "state_dict", "model_state_dict", "params", "weights", None]
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
        names = "model, state_dict_ema, iteration"
        text = f"{name} has no weights under '{key}'. Choose from: .*{names}"
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


def test_what_is_not_a_tensor_is_ignored_with_a_warning(tmp_path, caplog):
    save_checkpoint({"model": {**state(), "note": "hello"}}, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth")["model"], state())
    assert "a.pth" in caplog.text and "note" in caplog.text


# ---- refusing


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
    with pytest.raises(CheckpointError, match="R-50.pkl.*Caffe2.*only the Detectron2 engine"):
        load_checkpoint(tmp_path / "R-50.pkl")


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # new versions: TorchScript is deprecated
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt is a TorchScript"):
        load_checkpoint(tmp_path / "a.pt")
