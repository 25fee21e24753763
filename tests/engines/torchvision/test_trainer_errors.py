"""Input that a run refuses, and losses that end it."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import torchvision

from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.engines.torchvision import trainer as trainer_module
from refbn_d2.engines.torchvision.trainer import Trainer
from refbn_d2.utils.errors import CheckpointError, ConfigError
from tests.engines.torchvision.helpers import run, start, weights


def test_nan_loss_names_iteration_and_loss_and_keeps_the_checkpoint(tiny_cfg, monkeypatch):
    step = Trainer.step

    def poisoned(self, iteration, samples):
        if iteration == 5:
            self.model.proposal_generator.rpn_head.conv.weight.data.fill_(float("nan"))
        return step(self, iteration, samples)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(FloatingPointError, match="at iteration 5: .*model_0000003.pth"):
        run(tiny_cfg)
    out = Path(tiny_cfg.OUTPUT_DIR)
    assert (out / "last_checkpoint").read_text() == "model_0000003.pth"
    assert all(value.isfinite().all() for value in weights(out, "model_0000003").values())


def test_nan_in_a_loss_alone(tiny_cfg, monkeypatch):
    forward = trainer_module.build_model(tiny_cfg).__class__.forward

    def poisoned(self, samples):
        output = forward(self, samples)
        if self.training and torch.is_grad_enabled():
            output["loss_mask"] = output["loss_mask"] * float("nan")
        return output

    monkeypatch.setattr(trainer_module.build_model(tiny_cfg).__class__, "forward", poisoned)
    with pytest.raises(FloatingPointError, match="at iteration 0: .*'loss_mask': nan.*none yet"):
        run(tiny_cfg)


def test_output_dir_of_another_run_is_left_alone(tiny_cfg):
    run(tiny_cfg, "DATASETS.TEST", [])
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(tiny_cfg.OUTPUT_DIR).iterdir())
    with pytest.raises(FileExistsError, match="holds a run already. Resume it with --resume"):
        run(tiny_cfg)
    with pytest.raises(ValueError, match="MODEL.REFBN.SEED: 0 there, 5 now"):
        run(tiny_cfg, "MODEL.REFBN.SEED", 5, resume=True)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in Path(tiny_cfg.OUTPUT_DIR).iterdir())


def test_resume_needs_the_same_reference_images(tiny_cfg, tmp_path):
    run(tiny_cfg, "DATASETS.TEST", [])
    path = Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth"
    checkpoint = load_checkpoint(path)
    image = checkpoint["refbn"]["images"][2]
    image["fingerprint"] = "0" * 16
    save_checkpoint(checkpoint, path)
    with pytest.raises(ValueError, match=rf"image {image['image_id']} .* has changed"):
        run(tiny_cfg, "SOLVER.MAX_ITER", 9, resume=True)


def test_reference_larger_than_the_dataset(tiny_cfg):
    with pytest.raises(ValueError, match="MODEL.REFBN.NUM_IMAGES is 500, .* 24 usable"):
        run(tiny_cfg, "MODEL.REFBN.NUM_IMAGES", 500)


def test_resume_from_a_file_that_is_no_run(tiny_cfg, tmp_path):
    run(tiny_cfg, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", [])
    path = Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth"
    save_checkpoint({"model": load_checkpoint(path)["model"]}, path)
    with pytest.raises(ValueError, match="it has no grad_scaler, iteration, optimizer, seed"):
        run(tiny_cfg, "SOLVER.MAX_ITER", 2, resume=True)


@pytest.mark.parametrize("harm", ["missing", "truncated", "other architecture", "nothing fits"])
def test_weights_that_cannot_be_used(tiny_cfg, tmp_path, harm):
    path = tmp_path / "weights.pth"
    state = trainer_module.build_model(tiny_cfg).state_dict()
    if harm == "other architecture":
        state = {k: v.repeat(2, *[1] * (v.ndim - 1)) if v.ndim else v for k, v in state.items()}
    elif harm == "nothing fits":
        state = {f"encoder.{i}": v for i, v in enumerate(state.values())}
    if harm != "missing":
        save_checkpoint({"model": state}, path)
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    error = FileNotFoundError if harm == "missing" else ValueError
    with pytest.raises(error, match=re.escape(str(path))):
        run(tiny_cfg, "MODEL.WEIGHTS", str(path))
    assert not (Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth").exists()


def test_eval_only_without_a_dataset(tiny_cfg):
    with pytest.raises(ValueError, match="DATASETS.TEST is empty"):
        run(tiny_cfg, "DATASETS.TEST", [], eval_only=True)


def test_a_test_set_is_looked_for_before_training(tiny_cfg):
    with pytest.raises(ConfigError, match="shapes_vall"):
        run(tiny_cfg, "DATASETS.TEST", ["shapes_vall"])
    assert not (Path(tiny_cfg.OUTPUT_DIR) / "metrics.json").exists()


def test_command_line_errors_are_one_line(tiny_cfg, tmp_path):
    process = start(tiny_cfg, tmp_path, "SOLVER.BASE_LRR", "1", stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert "SOLVER.BASE_LRR: no such key; did you mean SOLVER.BASE_LR?" in err


@pytest.mark.parametrize("weights", ["detectron2://ImageNetPretrained/R-50.pkl", "https://h/a.pth"])
def test_urls_are_for_the_other_engine(tiny_cfg, weights):
    with pytest.raises(CheckpointError, match="is a URL.*--engine detectron2"):
        run(tiny_cfg, "MODEL.WEIGHTS", weights)


def test_another_architecture_is_refused_by_name(tiny_cfg, tmp_path):
    state = torchvision.models.resnet18().state_dict()
    state |= {"layer1.0.se.fc1.weight": torch.ones(4, 64, 1, 1)}
    save_checkpoint({"state_dict": state}, tmp_path / "se.pth")
    with pytest.raises(
        CheckpointError, match="se.pth is a ResNet with attention.*the model is a ResNet-18"
    ):
        run(tiny_cfg, "MODEL.WEIGHTS", str(tmp_path / "se.pth"))
    del state["layer1.0.se.fc1.weight"]
    save_checkpoint({"state_dict": state, "arch": "resnetaa18"}, tmp_path / "aa.pth")
    with pytest.raises(CheckpointError, match="aa.pth is an anti-aliased ResNet"):
        run(tiny_cfg, "MODEL.WEIGHTS", str(tmp_path / "aa.pth"))
