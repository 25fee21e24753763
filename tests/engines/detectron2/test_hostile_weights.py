"""MODEL.WEIGHTS on Detectron2's engine: no code is run, and only known queries are allowed."""

import contextlib
import pickle

import numpy as np
import pytest
import torch

from refbn_d2.checkpoint.files import save_checkpoint
from refbn_d2.utils.errors import CheckpointError
from tests.engines.detectron2.test_trainer_weights import load, randomized, small

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "beside", [{}, {"__author__": "x"}, {"conv1_w": np.ones(2)}, {"blobs": {}}]
)
@pytest.mark.parametrize("query", ["", "?matching_heuristics=True", "?key=evil"])
@pytest.mark.parametrize("suffix", ["pkl", "pyth", "pth"])
def test_code_is_not_run_however_it_is_asked_for(tmp_path, suffix, query, beside):
    """Detectron2 itself would run it."""
    from detectron2.checkpoint import DetectionCheckpointer

    path = tmp_path / f"evil.{suffix}"
    path.write_bytes(pickle.dumps({"model": {}, "evil": Evil(tmp_path / "ran"), **beside}))
    with pytest.raises(CheckpointError, match="evil.* holds code or objects"):
        load(small(), f"{path}{query}")
    assert not (tmp_path / "ran").exists()
    if suffix == "pkl" and not query:
        with contextlib.suppress(Exception):
            DetectionCheckpointer(torch.nn.Linear(1, 1)).load(str(path))
        assert (tmp_path / "ran").exists()  # the trap works


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_a_query_chooses_the_weights_and_how_they_are_matched(tmp_path, suffix):
    saved, other = (randomized(small(**{"RESNETS.NORM": "RefBN"})) for _ in range(2))
    own = saved.backbone.bottom_up.state_dict()
    data = {
        "model": other.state_dict(),
        "teacher": {f"deep.inside.{name}": tensor for name, tensor in own.items()},
    }
    path = tmp_path / f"a.{suffix}"
    save_checkpoint(data, path)
    for query in ("?key=teacher&matching_heuristics=True", "?key=teacher"):
        model = small(**{"RESNETS.NORM": "RefBN"})
        load(model, f"{path}{query}")
        loaded = model.backbone.bottom_up.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())
    with pytest.raises(CheckpointError, match=r"MODEL.WEIGHTS .*\?kay=x: .*key=KEY"):
        load(small(), f"{path}?kay=x")


def test_a_file_of_pycls(tmp_path):
    saved = randomized(small())
    torch.save({"model_state": saved.state_dict(), "epoch": 3}, tmp_path / "a.pyth")
    model = small()
    load(model, tmp_path / "a.pyth")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.state_dict().items())


def test_another_architecture_is_refused_by_name(tmp_path):
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    state |= {"layer1.0.se.fc1.weight": torch.ones(4, 64, 1, 1)}
    torch.save({"state_dict": state}, tmp_path / "se.pth")
    for query in ("", "?matching_heuristics=True"):
        with pytest.raises(CheckpointError, match="se.pth is a ResNet with attention.*ResNet-18"):
            load(small(), f"{tmp_path}/se.pth{query}")


def test_a_failed_load_can_be_followed_by_another(tmp_path):
    from refbn_d2.engines.detectron2.trainer import Checkpointer

    model, saved = small(), randomized(small())
    checkpointer = Checkpointer(model, "", False)
    (tmp_path / "bad.pth").write_bytes(b"bad")
    with pytest.raises(CheckpointError, match="bad.pth is cut off"):
        checkpointer.load(str(tmp_path / "bad.pth"))
    torch.save({"model": saved.state_dict()}, tmp_path / "a.pth")
    checkpointer.load(str(tmp_path / "a.pth"))
    assert torch.equal(
        model.backbone.bottom_up.stem.conv1.weight, saved.backbone.bottom_up.stem.conv1.weight
    )
