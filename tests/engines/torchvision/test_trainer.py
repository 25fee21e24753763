"""Real training on generated pictures: a run's files, and its resumption."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision

from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.config.resume import FREE_IN_DETECTION
from refbn_d2.engines.torchvision import trainer as trainer_module
from refbn_d2.engines.torchvision.trainer import Trainer, evaluate, train
from refbn_d2.training.main import run_training
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import CheckpointError, ConfigError, DivergedError

ROOT = Path(__file__).parents[3]


def run(cfg, *overrides, resume=False, eval_only=False):
    cfg = cfg.clone()
    cfg.merge_from_list(list(overrides))
    return run_training(cfg, train, evaluate, FREE_IN_DETECTION, resume, eval_only)


def weights(output_dir, name="model_final"):
    return load_checkpoint(Path(output_dir) / f"{name}.pth")["model"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


class Killed(BaseException):
    pass


def kill_at(monkeypatch, iteration):
    """End the run as SIGKILL does: nothing is written afterwards."""
    step = Trainer.step

    def dying_step(self, i, samples):
        if i == iteration:
            raise Killed
        return step(self, i, samples)

    monkeypatch.setattr(Trainer, "step", dying_step)


def test_a_run_leaves_what_detectron2_users_expect(tiny_cfg):
    results = run(tiny_cfg, "TEST.EVAL_PERIOD", 4)
    out = Path(tiny_cfg.OUTPUT_DIR)
    names = {p.name for p in out.iterdir()}
    assert {
        "config.yaml", "log.txt", "metrics.json", "model_0000003.pth", "model_final.pth",
        "last_checkpoint", "inference", "curves.png", "samples.png",
    } <= names  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    losses = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "total_loss"}
    (last,) = [m for m in metrics if "lr" in m]
    assert losses <= last.keys() and last["iteration"] == 7
    assert [m["iteration"] for m in metrics if "segm/AP" in m] == [3, 7]
    assert results["tiny_val"]["bbox"]["AP"] == metrics[-1]["bbox/AP"]
    detections = json.loads((out / "inference/coco_instances_results.json").read_text())
    assert isinstance(detections, list)
    checkpoint = load_checkpoint(out / "model_final.pth")
    assert checkpoint["iteration"] == 7
    assert checkpoint["refbn"]["dataset"] == "tiny_train"
    assert len(checkpoint["refbn"]["images"]) == 4
    log = (out / "log.txt").read_text()
    assert re.search(r"eta: 0:00:00  iter: 7  total_loss: [\d.]+", log)
    assert "Captured the reference batch in 32 of 32 layers: 4 images of tiny_train, seed 0" in log


def test_eval_only_gives_the_same_results_and_keeps_the_run(tiny_cfg, tmp_path):
    trained = run(tiny_cfg)
    out = Path(tiny_cfg.OUTPUT_DIR)
    before = {p: p.read_bytes() for p in out.glob("*.*") if p.suffix in (".pth", ".yaml", ".json")}
    again = run(tiny_cfg, "MODEL.WEIGHTS", str(out / "model_final.pth"), eval_only=True)
    assert json.dumps(again) == json.dumps(trained)
    assert all(p.read_bytes() == content for p, content in before.items())


@pytest.mark.parametrize("refresh", ["static", "full", "slice", "concat"])
def test_killed_and_resumed_equals_straight(tiny_cfg, tmp_path, monkeypatch, refresh):
    tiny_cfg.merge_from_list(["MODEL.REFBN.REFRESH", refresh, "DATASETS.TEST", []])
    run(tiny_cfg, "OUTPUT_DIR", str(tmp_path / "straight"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 6)
        run(tiny_cfg)
    assert (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000003.pth"
    run(tiny_cfg, "DATALOADER.NUM_WORKERS", 2, resume=True)
    assert_same(weights(tmp_path / "straight"), weights(tiny_cfg.OUTPUT_DIR))


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


def start(cfg, tmp_path, *arguments, launcher=(), **options):
    config_file = tmp_path / "config.yaml"
    config_file.write_text(cfg.dump())
    command = [*(launcher or [sys.executable]), str(ROOT / "tools/train_net.py")]
    command += ["--config-file", str(config_file), "--engine", "torchvision", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, **options)


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.returncode
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_signal_writes_a_checkpoint_and_resume_goes_on(tiny_cfg, tmp_path, number, workers):
    tiny_cfg.merge_from_list(
        ["DATASETS.TEST", [], "SOLVER.MAX_ITER", 1000, "SOLVER.CHECKPOINT_PERIOD", 1000,
         "DATALOADER.NUM_WORKERS", 1]
    )  # fmt: skip
    process = start(tiny_cfg, tmp_path, "--num-gpus", str(workers), stderr=subprocess.PIPE)
    metrics = Path(tiny_cfg.OUTPUT_DIR) / "metrics.json"
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)  # 20 iterations are done
    process.send_signal(number)
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


def test_a_run_killed_in_its_last_evaluation_evaluates_on_resume(tiny_cfg, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "evaluate", lambda self: (_ for _ in ()).throw(Killed))
        run(tiny_cfg, "SOLVER.MAX_ITER", 1)
    results = run(tiny_cfg, "SOLVER.MAX_ITER", 1, resume=True)
    assert results["tiny_val"]["bbox"]["AP"] >= 0
    metrics = (Path(tiny_cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    assert "bbox/AP" in json.loads(metrics[-1])


def test_a_metrics_line_that_was_cut_off_is_dropped_on_resume(tiny_cfg):
    run(tiny_cfg, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", [])
    metrics = Path(tiny_cfg.OUTPUT_DIR) / "metrics.json"
    metrics.write_text(metrics.read_text() + '{"iteration": 1, "total_l')
    run(tiny_cfg, "SOLVER.MAX_ITER", 2, resume=True)
    assert [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()] == [0, 1, 1]


def test_random_numbers_differ_by_seed(tiny_cfg, tmp_path):
    """With the same weights and pictures, another seed gives other losses, by its samples."""
    losses = {}
    for seed in (3, 4):
        out = tmp_path / str(seed)
        tiny_cfg.merge_from_list(["SEED", seed, "OUTPUT_DIR", str(out)])
        trainer = Trainer(tiny_cfg, out)
        weights = losses.setdefault("weights", copy.deepcopy(trainer.model.state_dict()))
        trainer.model.load_state_dict(weights)
        samples = losses.setdefault("samples", next(iter(trainer.loader)))
        losses[seed] = trainer.step(0, samples)[1]["loss_rpn_cls"]
    assert losses[3] != losses[4]


# -- bad input -------------------------------------------------------------------------------------


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


def test_output_dir_of_another_run_is_left_alone(tiny_cfg):
    run(tiny_cfg, "DATASETS.TEST", [])
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(tiny_cfg.OUTPUT_DIR).iterdir())
    with pytest.raises(FileExistsError, match="holds a run already. Resume it with --resume"):
        run(tiny_cfg)
    with pytest.raises(ValueError, match="MODEL.REFBN.SEED: 0 there, 5 now"):
        run(tiny_cfg, "MODEL.REFBN.SEED", 5, resume=True)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in Path(tiny_cfg.OUTPUT_DIR).iterdir())


def test_resume_without_an_earlier_run_starts_anew(tiny_cfg):
    run(tiny_cfg, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", [], resume=True)
    out = Path(tiny_cfg.OUTPUT_DIR)
    assert "holds no checkpoint yet; starting from the beginning" in (out / "log.txt").read_text()


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


def test_expected_results(tiny_cfg):
    expected = [["bbox", "AP", 99.0, 0.5]]
    with pytest.raises(SystemExit) as error:
        run(tiny_cfg, "SOLVER.MAX_ITER", 1, "TEST.EXPECTED_RESULTS", expected)
    assert error.value.code == 1
    out = Path(tiny_cfg.OUTPUT_DIR)
    weights_file = str(out / "model_final.pth")
    expected = [["bbox", "AP", 0.0, 50.0]]
    run(tiny_cfg, "MODEL.WEIGHTS", weights_file, "TEST.EXPECTED_RESULTS", expected, eval_only=True)


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
