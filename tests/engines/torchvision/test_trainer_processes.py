"""Runs that are killed or stopped and resumed, and runs of several workers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.engines.torchvision.trainer import Trainer
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import DivergedError
from refbn_d2.utils.lock import locked
from tests.device import on_cpu, two_devices
from tests.engines.torchvision.helpers import run, start, weights
from tests.trainers import Killed, assert_same, kill_at

# ---- resumption


@on_cpu
@pytest.mark.parametrize("refresh", ["static", "full", "slice", "concat"])
def test_killed_and_resumed_equals_straight(tiny_cfg, tmp_path, monkeypatch, refresh):
    tiny_cfg.merge_from_list(["MODEL.REFBN.REFRESH", refresh, "DATASETS.TEST", []])
    run(tiny_cfg, "OUTPUT_DIR", str(tmp_path / "straight"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, Trainer, 6)
        run(tiny_cfg)
    assert (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000003.pth"
    run(tiny_cfg, "DATALOADER.NUM_WORKERS", 2, resume=True)
    assert_same(weights(tmp_path / "straight"), weights(tiny_cfg.OUTPUT_DIR))


def test_a_run_killed_in_its_last_evaluation_evaluates_on_resume(tiny_cfg, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "evaluate", lambda self: (_ for _ in ()).throw(Killed))
        run(tiny_cfg, "SOLVER.MAX_ITER", 1)
    results = run(tiny_cfg, "SOLVER.MAX_ITER", 1, resume=True)
    assert results["tiny_val"]["bbox"]["AP"] >= 0
    metrics = (Path(tiny_cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    assert "bbox/AP" in json.loads(metrics[-1])


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["static", "full", "slice", "concat"])
def test_40_iterations_straight_or_killed_at_20(tiny_cfg, tmp_path, refresh):
    """A real process gets a SIGKILL."""
    tiny_cfg.merge_from_list(
        ["MODEL.REFBN.REFRESH", refresh, "DATASETS.TEST", [], "SOLVER.MAX_ITER", 40,
         "SOLVER.CHECKPOINT_PERIOD", 20]
    )  # fmt: skip
    process = start(tiny_cfg, tmp_path)
    checkpoint = Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint"
    wait_for(checkpoint.exists, process)
    process.kill()
    process.wait()
    assert checkpoint.read_text() == "model_0000019.pth"
    assert start(tiny_cfg, tmp_path, "--resume").wait() == 0
    assert start(tiny_cfg, tmp_path, "OUTPUT_DIR", str(tmp_path / "straight")).wait() == 0
    assert_same(weights(tmp_path / "straight"), weights(tiny_cfg.OUTPUT_DIR))


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.returncode
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "number, workers, to_all",
    [
        (signal.SIGTERM, 2, False),
        pytest.param(signal.SIGINT, 1, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, True, marks=pytest.mark.slow),
    ],
)
def test_signal_writes_a_checkpoint_and_resume_goes_on(tiny_cfg, tmp_path, number, workers, to_all):
    """Some batch systems send SIGTERM to all processes, those that load data included."""
    tiny_cfg.merge_from_list(
        ["DATASETS.TEST", [], "SOLVER.MAX_ITER", 1000, "SOLVER.CHECKPOINT_PERIOD", 1000,
         "DATALOADER.NUM_WORKERS", 1]
    )  # fmt: skip
    process = start(
        tiny_cfg, tmp_path, "--num-gpus", str(workers), stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    metrics = Path(tiny_cfg.OUTPUT_DIR) / "metrics.json"
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)  # 20 iterations are done
    (os.killpg if to_all else os.kill)(process.pid, number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert "its checkpoint is written. Resume with --resume" in err
    (saved,) = Path(tiny_cfg.OUTPUT_DIR).glob("model_*.pth")
    done = load_checkpoint(saved)["iteration"]
    run(tiny_cfg, "SOLVER.MAX_ITER", done + 2, resume=True)
    final = load_checkpoint(Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth")
    assert final["iteration"] == done + 1


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_other_with_a_sentence(tiny_cfg, tmp_path):
    tiny_cfg.merge_from_list(["DATASETS.TEST", [], "SOLVER.MAX_ITER", 1000])
    process = start(tiny_cfg, tmp_path, "--num-gpus", "2", stderr=subprocess.PIPE)
    metrics = Path(tiny_cfg.OUTPUT_DIR) / "metrics.json"
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)
    killed = session_leaders(process.pid)[-1]
    os.kill(killed, signal.SIGKILL)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    said = "WorkerKilledError: Worker 1 was killed by SIGKILL, so the others were ended."
    assert sum(line.startswith(said) for line in err.splitlines()) == 1, err
    assert "Traceback" not in err, err
    assert not (metrics.parent / "run.lock").exists()
    checkpoint = (metrics.parent / "last_checkpoint").read_text()
    assert load_checkpoint(metrics.parent / checkpoint)["iteration"] >= 3


def session_leaders(parent):
    """Return the workers that `parent` has started, in their order."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return sorted(int(pid) for pid in children if os.getsid(int(pid)) == int(pid))


def test_a_second_run_in_the_folder_is_refused_by_one_line(tiny_cfg, tmp_path):
    out = Path(tiny_cfg.OUTPUT_DIR)
    with locked(out):
        for tool in ((), ("--resume",)):
            process = start(tiny_cfg, tmp_path, *tool, stderr=subprocess.PIPE)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1
            assert f"{out} is in use by process {os.getpid()} on host" in err.splitlines()[-1]
        assert [path.name for path in out.iterdir()] == ["run.lock"]


# ---- several workers


def two_workers(cfg, tmp_path, launcher=(), *arguments):
    process = start(
        cfg, tmp_path, *arguments, launcher=launcher, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out + err


@two_devices
def test_two_workers_train_as_one_by_num_gpus_and_by_torchrun(tiny_cfg, tmp_path):
    """Without norms over the batch and random sampling, any split gives the same gradients."""
    tiny_cfg.merge_from_list(
        ["MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", "",
         "MODEL.ROI_BOX_HEAD.NORM", "",
         "INPUT.RANDOM_FLIP", "none", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4096,
         "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100000, "SOLVER.MAX_ITER", 2, "MODEL.MASK_ON", False]
    )  # fmt: skip
    results = {}
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "one")
    results["one"] = run(tiny_cfg)["tiny_val"]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    torchrun += ("--nproc-per-node", "2")
    for name, launcher, arguments in (
        ("spawned", (), ("--num-gpus", "2")), ("torchrun", torchrun, ())
    ):  # fmt: skip
        tiny_cfg.OUTPUT_DIR = str(tmp_path / name)
        two_workers(tiny_cfg, tmp_path, launcher, *arguments)
        one, two = weights(tmp_path / "one"), weights(tmp_path / name)
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)
        metrics = (tmp_path / name / "metrics.json").read_text().splitlines()
        assert len(metrics) == 2  # written only by worker 0
        assert json.loads(metrics[-1])["bbox/AP"] == pytest.approx(
            results["one"]["bbox"]["AP"], abs=0.5
        )


@two_devices
def test_two_workers_with_refbn_and_every_picture_evaluated_once(tiny_cfg, tmp_path):
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 4])
    two_workers(tiny_cfg, tmp_path, (), "--num-gpus", "2")
    out = Path(tiny_cfg.OUTPUT_DIR)
    detections = json.loads((out / "inference/coco_instances_results.json").read_text())
    again = run(
        tiny_cfg, "MODEL.WEIGHTS", str(out / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "e"),
        eval_only=True,
    )  # fmt: skip
    alone = json.loads((tmp_path / "e/inference/coco_instances_results.json").read_text())
    key = lambda d: (d["image_id"], d["category_id"], -d["score"])  # noqa: E731
    assert len(detections) == len(alone) > 0
    for a, b in zip(sorted(detections, key=key), sorted(alone, key=key), strict=True):
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-2)
    assert again["tiny_val"]["bbox"]["AP"] >= 0


def _times_nan(module, args, losses):
    return {name: loss * float("nan") for name, loss in losses.items()}


def worker_1_diverges(cfg):
    """Run in two workers; in the step that ends with a checkpoint, one has a loss of NaN."""
    step = Trainer.step

    def poisoned(self, iteration, batch):
        if iteration + 1 == self.checkpoint_period:
            self.model.register_forward_hook(_times_nan)
        try:
            return step(self, iteration, batch)
        except FloatingPointError:
            time.sleep(3)  # give worker 0 the time to write a checkpoint
            raise

    if distributed.rank() == 1:
        Trainer.step = poisoned
    run(cfg)


@pytest.mark.slow
def test_nan_on_worker_1_stops_worker_0_before_it_writes_weights(tiny_cfg):
    with pytest.raises(DivergedError, match="at iteration 3: .*none yet"):
        distributed.launch(worker_1_diverges, 2, 1, 0, "auto", "cpu", (tiny_cfg,))
    assert not list(Path(tiny_cfg.OUTPUT_DIR).glob("model_*.pth"))
    assert not (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").exists()
