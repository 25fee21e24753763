"""Errors of a run whose input does not fit."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import timm
from PIL import Image

from refbn_d2.checkpoint import load_checkpoint, save_checkpoint
from refbn_d2.pretrain.trainer import Trainer
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import DivergedError
from tests.pretrain.helpers import final, run, start


def test_output_dir_of_another_run_is_left_alone(cfg):
    run(cfg)
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(cfg.OUTPUT_DIR).iterdir())
    with pytest.raises(FileExistsError, match="holds a run already. Resume it with --resume"):
        run(cfg)
    with pytest.raises(ValueError, match="SOLVER.BASE_LR: 0.02 there, 0.1 now"):
        run(cfg, "SOLVER.BASE_LR", 0.1, resume=True)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in Path(cfg.OUTPUT_DIR).iterdir())


def test_resume_without_an_earlier_run_starts_anew(cfg):
    run(cfg, resume=True)
    log = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    assert "holds no checkpoint yet; starting from the beginning" in log


def fewer_classes(root, tiny_classes):
    shutil.copytree(tiny_classes, root)
    for split in ("train", "val"):
        shutil.rmtree(root / split / "ell")
    return str(root)


def test_class_count_that_differs_from_the_checkpoints(cfg, tmp_path, tiny_classes):
    run(cfg)
    root = fewer_classes(tmp_path / "fewer", tiny_classes)
    with pytest.raises(ValueError, match="run in .*output was trained on 12 classes, .* has 11"):
        run(cfg, "DATASETS.ROOT", root, "SOLVER.EPOCHS", 3, resume=True)
    weights = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    for eval_only in (True, False):
        with pytest.raises(ValueError, match="model_final.pth was trained on 12 .* has 11"):
            run(
                cfg, "DATASETS.ROOT", root, "MODEL.WEIGHTS", weights, "OUTPUT_DIR",
                str(tmp_path / "other"), eval_only=eval_only,
            )  # fmt: skip


@pytest.mark.parametrize("resume", [True, False])
def test_truncated_checkpoint(cfg, resume):
    run(cfg)
    path = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    path.write_bytes(path.read_bytes()[:5000])
    overrides = ["SOLVER.EPOCHS", 3] if resume else ["MODEL.WEIGHTS", str(path)]
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is cut off"):
        run(cfg, *overrides, resume=resume, eval_only=not resume)


def test_weights_of_another_model(cfg, tmp_path):
    state = timm.create_model("resnet18", num_classes=12).state_dict()
    save_checkpoint({"model": state}, tmp_path / "r18.pth")
    with pytest.raises(ValueError, match="r18.pth: "):
        run(cfg, "MODEL.WEIGHTS", str(tmp_path / "r18.pth"))
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        run(cfg, "MODEL.WEIGHTS", str(tmp_path / "nowhere.pth"))


def test_a_bn_checkpoint_starts_a_refbn_run(cfg, tmp_path):
    state = timm.create_model("test_resnet", num_classes=12).state_dict()
    save_checkpoint({"state_dict": state}, tmp_path / "bn.pth")
    results = run(cfg, "MODEL.WEIGHTS", str(tmp_path / "bn.pth"), "SOLVER.EPOCHS", 2)
    assert results["val/top1"] >= 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["SOLVER.IMS_PER_BATCH", 9, "SOLVER.GRAD_ACCUM_STEPS", 2], "1 worker.*allowed: 2, 4, 6"),
        (
            ["SOLVER.IMS_PER_BATCH", 7, "INPUT.MIXUP_ALPHA", 0.1],
            "in pairs for mixup; allowed: 2, 4",
        ),
        (["SOLVER.OPTIMIZER", "sgdd"], "SOLVER.OPTIMIZER = 'sgdd' .*not found"),
        (["SOLVER.OPT_KWARGS", (("betas", 1), ("epps", 2))], "OPT_KWARGS = .*epps"),
        (["SOLVER.OPT_KWARGS", ("eps", 1)], "OPT_KWARGS = "),
        (["MODEL.REFBN.NUM_IMAGES", 500], "NUM_IMAGES is 500, but the training set has 84"),
        (["MODEL.REFBN.REFERENCE", "checkpoint"], 'REFERENCE is "checkpoint", but no RefBN layer'),
    ],
)
def test_values_that_do_not_fit(cfg, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(cfg, *overrides)
    assert not (Path(cfg.OUTPUT_DIR) / "metrics.json").exists()


def test_nan_loss_names_the_iteration_and_keeps_the_checkpoint(cfg, monkeypatch):
    step = Trainer.step

    def poisoned(self, iteration, batch):
        if iteration == 9:
            self.model.fc.weight.data.fill_(float("nan"))
        return step(self, iteration, batch)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(
        FloatingPointError, match="at iteration 9: .*'total_loss': nan.*model_0000006.pth"
    ):
        run(cfg)
    weights = load_checkpoint(Path(cfg.OUTPUT_DIR) / "model_0000006.pth")["model"]
    assert all(value.isfinite().all() for value in weights.values())


def worker_1_diverges(cfg):
    """Run in two workers; in the step that ends with a checkpoint, one has a loss of NaN."""
    step = Trainer.step

    def poisoned(self, iteration, batch):
        if iteration + 1 == self.checkpoint_period:
            self.model.register_forward_hook(lambda module, args, out: out * float("nan"))
        try:
            return step(self, iteration, batch)
        except FloatingPointError:
            time.sleep(3)  # give worker 0 the time to write a checkpoint
            raise

    if distributed.rank() == 1:
        Trainer.step = poisoned
    run(cfg)


@pytest.mark.slow
def test_nan_on_worker_1_stops_worker_0_before_it_writes_weights(cfg):
    with pytest.raises(DivergedError, match="at iteration 6: .*none yet"):
        distributed.launch(worker_1_diverges, 2, 1, 0, "auto", "cpu", (cfg,))
    assert not list(Path(cfg.OUTPUT_DIR).glob("model_*.pth"))
    assert not (Path(cfg.OUTPUT_DIR) / "last_checkpoint").exists()


def test_resume_needs_the_same_reference_images(cfg, tmp_path, tiny_classes):
    root = tmp_path / "copy"
    shutil.copytree(tiny_classes, root)
    cfg.DATASETS.ROOT = str(root)
    run(cfg)
    name = final(cfg.OUTPUT_DIR, "refbn")["images"][2]["image_id"]
    Image.new("RGB", (32, 32)).save(root / "train" / name)
    with pytest.raises(ValueError, match=f"image {name} .* of train has changed"):
        run(cfg, "SOLVER.EPOCHS", 3, resume=True)


def test_too_many_unreadable_images_stop_the_run(cfg, tmp_path, tiny_classes):
    root = tmp_path / "copy"
    shutil.copytree(tiny_classes, root)
    cfg.merge_from_list(["DATASETS.ROOT", str(root), "TEST.VAL_INTERVAL", 1])
    (root / "train/arrow/000008_plain.png").write_bytes(b"no picture")
    with pytest.raises(
        ValueError, match="train: 1 of 84 images cannot be read.*arrow/000008_plain"
    ):
        run(cfg)
    overrides = ["DATALOADER.MAX_UNREADABLE", 0.02, "OUTPUT_DIR", str(tmp_path / "again")]
    run(cfg, *overrides)
    log = (tmp_path / "again/log.txt").read_text()
    assert log.count("Unreadable image number 1 is skipped: arrow/000008_plain.png (no image)") == 1


def test_command_line_errors_are_one_line(cfg, tmp_path):
    process = start(cfg, tmp_path, "SOLVER.BASE_LRR", "1", stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert "SOLVER.BASE_LRR: no such key; did you mean SOLVER.BASE_LR?" in err
    assert "docs/pretraining.md" in err and "detectron2" not in err
