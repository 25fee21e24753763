"""The examples run, train, and resume, each on tiny data."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from refbn_d2.data.shapes import make_classification
from refbn_d2.layers import refbn_layers
from tests.versions import needs

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = re.compile(r"loss (\d+\.\d+) at first, (\d+\.\d+) at last")


@pytest.fixture
def steps_seen(monkeypatch):
    """Record each step: (iteration, slice appended, next position, all layers have it)."""
    from refbn_d2 import ReferenceBatch

    seen, after_step = [], ReferenceBatch.after_step

    def watched(self):
        was_appended = bool(self._appended)
        after_step(self)
        complete = all(layer.has_reference() for _, layer in refbn_layers(self.model))
        seen.append((self.iteration - 1, was_appended, self.position, complete))

    monkeypatch.setattr(ReferenceBatch, "after_step", watched)
    return seen


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(capsys):
    return [float(loss) for loss in SAID.search(capsys.readouterr().out).groups()]


def expected_steps(steps, images, slice_size=8):
    """Return the steps with a slice every fourth step, which cycles through the images."""
    return [(i, i % 4 == 0, (i // 4 + 1) * slice_size % images, True) for i in range(steps)]


def test_plain_pytorch(tmp_path, capsys, steps_seen):
    """A resumed run continues the count, and finds the same reference images."""
    make_classification(tmp_path, num_train=48, num_val=1)
    args = ["--epochs", "1", "--num-train", "48", "--root", str(tmp_path)]
    args += ["--checkpoint", str(tmp_path / "checkpoint.pth")]
    main = load("plain_pytorch").main
    main(args)
    first, _ = losses(capsys)
    assert first == pytest.approx(2.5, abs=1)  # log(12) = 2.48
    main(args)
    assert steps_seen == expected_steps(6, 32)
    assert "Resumed after 3 steps." in capsys.readouterr().out


def test_timm_model(tmp_path, capsys, steps_seen):
    """The saved file is timm's model, without a trace of this package."""
    import timm

    output = tmp_path / "resnet10t.pth"
    load("timm_model").main(["resnet10t", "--steps", "2", "--output", str(output)])
    first, _ = losses(capsys)
    assert first == pytest.approx(2.3, abs=1)  # log(10)
    assert steps_seen == expected_steps(2, 16)
    timm.create_model("resnet10t", num_classes=10).load_state_dict(torch.load(output))


@needs("torchvision", 0, 16, "wrap_dataset_for_transforms_v2 with target_keys")
def test_torchvision_maskrcnn(tiny_shapes, capsys, steps_seen):
    """The data are the six images of the validation split, at 64 pixels."""
    shapes = tiny_shapes / "shapes"
    json_file = shapes / "annotations/instances_val.json"
    load("torchvision_maskrcnn").main([str(json_file), str(shapes / "val"), "--size", "64"])
    assert all(0 < loss < 100 for loss in losses(capsys))
    assert steps_seen == expected_steps(3, 6, slice_size=6)


def test_lightning(tmp_path, capsys, steps_seen, monkeypatch):
    pytest.importorskip(
        "lightning", reason='Lightning is not installed: pip install -e ".[lightning]"'
    )
    monkeypatch.chdir(tmp_path)
    main = load("lightning_classifier").main
    main(["--steps", "2"])
    first, _ = losses(capsys)
    assert first == pytest.approx(1.4, abs=1)  # log(4)
    [checkpoint] = tmp_path.rglob("*.ckpt")
    main(["--steps", "6", "--resume", str(checkpoint)])
    assert steps_seen == expected_steps(6, 32)


@pytest.mark.detectron2
def test_plain_detectron2(detectron2_cfg, tmp_path, capsys, steps_seen):
    """REFRESH_PERIOD is 3; the config comes from its file and KEY VALUE pairs."""
    pytest.importorskip("detectron2.engine", reason="Detectron2 is not installed")
    config_file = tmp_path / "config.yaml"
    config_file.write_text(detectron2_cfg.dump())
    main = load("plain_detectron2").main
    main(["--config-file", str(config_file), "SOLVER.MAX_ITER", "2"])
    assert all(0 < loss < 100 for loss in losses(capsys))
    main(["--config-file", str(config_file), "--resume", "SOLVER.MAX_ITER", "4"])
    assert [step[:3] for step in steps_seen] == [
        (0, True, 2), (1, False, 2), (2, False, 2), (3, True, 0)  # slices of 2 of 4 images
    ]  # fmt: skip
    assert "From iteration 2: loss" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_uses_public_names(path):
    assert 20 <= len(path.read_text().splitlines()) <= 60
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("refbn_d2"):
            if node.module == "refbn_d2.plugin":
                pytest.importorskip("detectron2.engine", reason="Detectron2 is not installed")
            public = importlib.import_module(node.module).__all__
            assert {alias.name for alias in node.names} <= set(public)
