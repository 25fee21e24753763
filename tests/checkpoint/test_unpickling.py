import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.utils.errors import CheckpointError
from tests.checkpoint.helpers import assert_same, state, write


class Code:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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
    pickle.loads(pickle.dumps(data["more"]))[0].close()  # the trap works
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("thing", [nn.Linear(2, 2)])
def test_objects_are_refused(tmp_path, thing):
    torch.save({"model": state(), "thing": thing}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=rf"a.pth holds code or objects \(.*{type(thing).__name__}"
    ):
        load_checkpoint(tmp_path / "a.pth")


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
