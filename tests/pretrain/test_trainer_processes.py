"""Runs that are killed and resumed, and runs of several workers."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from refbn_d2.checkpoint import load_checkpoint
from refbn_d2.pretrain.trainer import Trainer
from refbn_d2.utils.lock import locked
from tests.device import two_devices
from tests.pretrain.helpers import ALL_AT_ONCE, final, metrics, run, start
from tests.trainers import Killed, assert_same, kill_at

# ---- resumption


@pytest.mark.parametrize(
    "refresh",
    ["static", "concat", *(pytest.param(r, marks=pytest.mark.slow) for r in ("full", "slice"))],
)
def test_killed_and_resumed_equals_straight(cfg, tmp_path, monkeypatch, refresh):
    cfg.merge_from_list(["MODEL.REFBN.REFRESH", refresh, *ALL_AT_ONCE])
    run(cfg, "OUTPUT_DIR", str(tmp_path / "straight"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, Trainer, 11)
        run(cfg)
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000006.pth"
    run(cfg, "DATALOADER.NUM_WORKERS", 2, resume=True)
    for key in ("model", "model_ema"):
        assert_same(final(tmp_path / "straight", key), final(cfg.OUTPUT_DIR, key))


def test_only_the_last_checkpoint_is_kept(cfg, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, Trainer, 15)
        run(cfg)
    assert [p.name for p in Path(cfg.OUTPUT_DIR).glob("model_0*.pth")] == ["model_0000013.pth"]


def test_half_written_files_of_a_killed_run(cfg, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, Trainer, 9)
        run(cfg)
    out = Path(cfg.OUTPUT_DIR)
    whole = (out / "model_0000006.pth").read_bytes()
    for name in (".model_0000013.pth.4711.tmp", ".last_checkpoint.4711.tmp", ".curves.png.7.tmp"):
        (out / name).write_bytes(whole[:1000])
    (out / "metrics.json").write_text('{"iteration": 0, "total_l')
    run(cfg, resume=True)
    assert not list(out.glob(".*"))
    assert metrics(cfg)[-1]["iteration"] == 19


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.returncode
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_40_iterations_straight_or_killed_at_20(cfg, tmp_path):
    """A real process gets a SIGKILL."""
    cfg.merge_from_list(["SOLVER.EPOCHS", 8, "SOLVER.CHECKPOINT_PERIOD", 20, *ALL_AT_ONCE])
    process = start(cfg, tmp_path)
    checkpoint = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    wait_for(checkpoint.exists, process)
    process.kill()
    process.wait()
    assert checkpoint.read_text() in ("model_0000019.pth", "model_0000039.pth")
    assert start(cfg, tmp_path, "--resume").wait() == 0
    assert start(cfg, tmp_path, "OUTPUT_DIR", str(tmp_path / "straight")).wait() == 0
    for key in ("model", "model_ema"):
        assert_same(final(tmp_path / "straight", key), final(cfg.OUTPUT_DIR, key))


def test_signal_writes_a_checkpoint_and_resume_goes_on(cfg, tmp_path):
    cfg.merge_from_list(["SOLVER.EPOCHS", 1000, "SOLVER.CHECKPOINT_PERIOD", 10000])
    process = start(cfg, tmp_path, stderr=subprocess.PIPE)
    file = Path(cfg.OUTPUT_DIR) / "metrics.json"
    wait_for(lambda: file.exists() and file.read_text(), process)  # 20 iterations are done
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, err
    assert "its checkpoint is written. Resume with --resume" in err
    (saved,) = Path(cfg.OUTPUT_DIR).glob("model_0*.pth")
    done = load_checkpoint(saved)["iteration"]
    run(cfg, "SOLVER.EPOCHS", done // 10 + 2, resume=True)
    resumed = load_checkpoint(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    assert resumed["iteration"] == 10 * (done // 10 + 2) - 1


def test_a_second_run_in_the_folder_is_refused_by_one_line(cfg, tmp_path):
    with locked(cfg.OUTPUT_DIR):
        process = start(cfg, tmp_path, "--resume", stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{cfg.OUTPUT_DIR} is in use by process {os.getpid()} on host" in err.splitlines()[-1]


# ---- several workers


def in_workers(cfg, tmp_path, launcher=(), *arguments):
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = start(cfg, tmp_path, *arguments, launcher=launcher, **pipes)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out + err


@two_devices
def test_two_workers_by_torchrun_train_as_one(cfg, tmp_path):
    """With a norm that is not over the batch, any split gives the same gradients."""
    cfg.merge_from_list(
        ["MODEL.NAME", "resnet18", "MODEL.NORM", "GN", "SOLVER.EPOCHS", 1,
         "SOLVER.WARMUP_EPOCHS", 0, "SOLVER.IMS_PER_BATCH", 28, "SOLVER.BASE_LR", 0.01]
    )  # fmt: skip
    one = run(cfg, "OUTPUT_DIR", str(tmp_path / "one"))
    cfg.SOLVER.GRAD_ACCUM_STEPS = 2
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    in_workers(cfg, tmp_path, (*torchrun, "--nproc-per-node", "2"))
    a, b = final(tmp_path / "one"), final(cfg.OUTPUT_DIR)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-2, atol=1e-4)
    assert len(metrics(cfg)) == 2  # written only by worker 0
    assert metrics(cfg)[-1]["val/loss"] == pytest.approx(one["val/loss"], rel=1e-3)
    assert (Path(cfg.OUTPUT_DIR) / "backbone.pkl").exists()


@two_devices
def test_two_workers_by_num_gpus_with_refbn_evaluate_every_picture_once(
    cfg, tmp_path, tiny_classes
):
    root = tmp_path / "copy"
    shutil.copytree(tiny_classes, root)
    for file in list((root / "val").glob("*/*.png"))[:5]:  # 19 are left: not a multiple of 2
        file.unlink() if len(list(file.parent.iterdir())) > 1 else None
    cfg.merge_from_list(["DATASETS.ROOT", str(root), "MODEL.EMA.ENABLED", True])
    in_workers(cfg, tmp_path, (), "--num-gpus", "2")
    weights = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    alone = run(cfg, "MODEL.WEIGHTS", weights, eval_only=True)
    together = metrics(cfg)[-1]
    for key, value in alone.items():
        assert together[key] == pytest.approx(value, rel=1e-4), key
