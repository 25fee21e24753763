"""What ends a run on the Detectron2 engine, and what it leaves."""

import argparse
import errno
import importlib
import math
import os
from pathlib import Path

import pytest
import torch

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import DivergedError
from refbn_d2.utils.lock import locked
from tests.detectron2_scripts import ROOT, call

pytestmark = pytest.mark.detectron2


def train(config_file, tmp_path, *arguments):
    tool = ROOT / "tools/train_net.py"
    return call(tool, tmp_path, "--engine", "detectron2", "--config-file", config_file, *arguments)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["SOLVER.MAX_ITER", 0], "SOLVER.MAX_ITER = 0; allowed: a number above 0"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD = 0; allowed: a number above"),
        (["SOLVER.BASE_LR", 0.0, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"],
         "SOLVER.BASE_LR = 0.0; allowed: a number above 0"),
        (["SOLVER.BASE_LR_END", 0.5, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"],
         "SOLVER.BASE_LR_END = 0.5; allowed: 0 to SOLVER.BASE_LR = 0.002"),
    ],
)  # fmt: skip
def test_a_config_that_trains_nothing(detectron2_cfg, tmp_path, overrides, message):
    from refbn_d2.config.checks import check_solver

    check_solver(detectron2_cfg)
    detectron2_cfg.merge_from_list(overrides)
    with pytest.raises(ValueError, match=message):
        check_solver(detectron2_cfg)


def test_it_is_refused_before_anything_is_built(config_file, tmp_path):
    code, log = train(config_file, tmp_path, "SOLVER.MAX_ITER", 0)
    assert code == 1 and "ConfigError: This config cannot be trained: SOLVER.MAX_ITER = 0" in log
    assert not (tmp_path / "output").exists()


def test_a_second_run_in_the_folder_is_refused(config_file, tmp_path):
    with locked(tmp_path / "output"):
        code, log = train(config_file, tmp_path, "--resume")
    assert code == 1 and f"is in use by process {os.getpid()} on host" in log
    assert "Traceback" not in log


def broken_weights(cfg):
    """Run; in the step that ends with a checkpoint, a gradient is infinite, but no loss."""
    from refbn_d2.engines.detectron2.processes import errors_explained
    from refbn_d2.engines.detectron2.trainer import Trainer

    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = Trainer(cfg)
    run_step = trainer._trainer.run_step

    def poisoned():
        if trainer.iter == 3:
            parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * math.inf)
        run_step()

    trainer._trainer.run_step = poisoned
    with errors_explained(cfg.OUTPUT_DIR):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(detectron2_cfg):
    detectron2_cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", ()])
    with pytest.raises(DivergedError, match="weight is infinite or NaN.*model_0000001.pth"):
        broken_weights(detectron2_cfg)
    out = Path(detectron2_cfg.OUTPUT_DIR)
    assert [path.name for path in out.glob("*.pth")] == ["model_0000001.pth"]
    state = load_checkpoint(out / (out / "last_checkpoint").read_text())["model"]
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())


def nan_on_worker_1(dumped):
    """Run in two workers; the loss of one is NaN in the step that ends with a checkpoint."""
    from detectron2.config import get_cfg
    from detectron2.utils import comm

    import refbn_d2  # noqa: F401  registers the config keys
    from refbn_d2.engines.detectron2.processes import errors_explained, join_workers
    from refbn_d2.engines.detectron2.trainer import Trainer
    from refbn_d2.plugin.registration import register_datasets

    cfg = get_cfg()
    cfg.merge_from_other_cfg(type(cfg).load_cfg(dumped))
    register_datasets(cfg)
    join_workers("cpu", argparse.Namespace(num_gpus=2))
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = Trainer(cfg)
    if comm.get_rank() == 1:

        def times_nan(module, args, losses):
            factor = math.nan if trainer.iter == 3 else 1.0
            return {name: loss * factor for name, loss in losses.items()}

        trainer.model.register_forward_hook(times_nan)
    with errors_explained(cfg.OUTPUT_DIR):
        trainer.train()


@pytest.mark.slow
def test_nan_on_worker_1_saves_no_weights(detectron2_cfg):
    detectron2_cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", ()])
    dumped = detectron2_cfg.dump()
    with pytest.raises(DivergedError, match="model_0000001.pth"):
        distributed.launch(nan_on_worker_1, 2, 1, 0, "auto", "cpu", (dumped,))
    out = Path(detectron2_cfg.OUTPUT_DIR)
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    weights = load_checkpoint(out / "model_0000001.pth")["model"].values()
    assert all(torch.isfinite(t).all() for t in weights if t.is_floating_point())


def test_a_run_that_ended_as_it_wrote_its_last_file_gets_it(detectron2_cfg):
    from refbn_d2.engines.detectron2.trainer import Trainer

    detectron2_cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 4, "DATASETS.TEST", ()])
    Path(detectron2_cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = Trainer(detectron2_cfg)
    final = Path(detectron2_cfg.OUTPUT_DIR, "model_final.pth")
    trainer.checkpointer.save_missing_final(3, 4)  # the run is not at its end
    assert not final.exists()
    trainer.checkpointer.save_missing_final(4, 4)
    assert load_checkpoint(final)["iteration"] == 3
    before = final.read_bytes()
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    trainer.checkpointer.save_missing_final(4, 4)  # there is one
    assert final.read_bytes() == before


@pytest.mark.parametrize("tool", ["trainer", "lazyconfig"])
def test_a_full_disk_at_the_start_names_the_folder(tool, monkeypatch, tmp_path):
    """Detectron2's own set-up writes the log and config.yaml first."""
    from omegaconf import OmegaConf

    module = importlib.import_module(f"refbn_d2.engines.detectron2.{tool}")

    def default_setup(cfg, args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cfg = OmegaConf.create({"train": {"output_dir": str(tmp_path), "device": "cpu"}})
    cfg.OUTPUT_DIR, cfg.MODEL = str(tmp_path), {"DEVICE": "cpu"}
    monkeypatch.setattr(module, "default_setup", default_setup)
    monkeypatch.setattr(module, "join_workers", lambda device, args: None)
    monkeypatch.setattr(module, "_config", lambda file, opts: cfg, raising=False)
    args = argparse.Namespace(config_file="", opts=[], resume=True, eval_only=True)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        module._main(*([cfg] if tool == "trainer" else []), args)
