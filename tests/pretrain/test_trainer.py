"""Real pretraining on generated pictures: what a run leaves, and that it can be taken up again."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from refbn_d2.checkpoint import load_checkpoint, save_checkpoint
from refbn_d2.layers import refbn_layers
from refbn_d2.pretrain.trainer import Trainer, main

ROOT = Path(__file__).parents[2]
ALL_AT_ONCE = [
    "MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.8, "MODEL.DROP_PATH_RATE", 0.2,
    "INPUT.MIXUP_ALPHA", 0.4, "INPUT.CUTMIX_ALPHA", 1.0, "INPUT.RANDOM_ERASING", 0.5,
    "INPUT.AUTO_AUGMENT", "rand-m7-mstd0.5-inc1", "SOLVER.GRAD_ACCUM_STEPS", 2,
    "SOLVER.LABEL_SMOOTHING", 0.1, "SOLVER.AMP.ENABLED", True,
]  # fmt: skip


def run(cfg, *overrides, resume=False, eval_only=False):
    cfg = cfg.clone()
    cfg.merge_from_list(list(overrides))
    return main(cfg, resume, eval_only)


def trainer(cfg, *overrides):
    cfg.merge_from_list([*overrides])
    out = Path(cfg.OUTPUT_DIR)
    out.mkdir(exist_ok=True)
    return Trainer(cfg, out, resume=False, training=True)


def final(output_dir, key="model"):
    return load_checkpoint(Path(output_dir) / "model_final.pth")[key]


def metrics(cfg):
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


class Killed(BaseException):
    pass


def kill_at(monkeypatch, iteration):
    """As SIGKILL does: nothing is written any more."""
    step = Trainer.step

    def dying_step(self, i, batch):
        if i == iteration:
            raise Killed
        return step(self, i, batch)

    monkeypatch.setattr(Trainer, "step", dying_step)


# ---- what a run leaves


def test_a_run_leaves_what_imagenet_people_expect(cfg):
    results = run(cfg, "TEST.VAL_INTERVAL", 1, "MODEL.EMA.ENABLED", True)
    out = Path(cfg.OUTPUT_DIR)
    names = {p.name for p in out.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1 and names - events == {
        "config.yaml", "log.txt", "metrics.json", "curves.png", "last_checkpoint",
        "model_final.pth", "model_best.pth",
    }  # fmt: skip
    (training,) = [m for m in metrics(cfg) if "lr" in m]
    assert {"total_loss", "train/top1", "train/top5", "time", "eta_seconds"} <= training.keys()
    validated = [m for m in metrics(cfg) if "val/top1" in m]
    assert [m["iteration"] for m in validated] == [9, 19]
    for name in ("val", "ema"):
        assert {f"{name}/top1", f"{name}/top5", f"{name}/loss"} <= results.keys()
    assert results.items() <= validated[-1].items()
    log = (out / "log.txt").read_text()
    assert re.search(r"iter: 19  total_loss: [\d.]+  train/top1: [\d.]+", log)
    assert "Captured the reference batch in 15 of 15 layers: 6 images of train, seed 0" in log
    assert "train: 84 images of 12 classes" in log


def test_validation_measures_what_it_says(cfg, tiny_classes):
    """Against timm's BatchNorm model, and sorting by numpy."""
    results = run(cfg, "INPUT.CROP_PCT", 1.0)
    model = timm.create_model("test_resnet", num_classes=12).eval()
    missing, unexpected = model.load_state_dict(final(cfg.OUTPUT_DIR), strict=False)
    assert not missing and {name.rpartition(".")[2] for name in unexpected} == {
        "ref_mean", "ref_var", "ref_count"
    }  # fmt: skip
    files = sorted((tiny_classes / "val").glob("*/*.png"))
    classes = sorted({f.parent.name for f in files})
    labels = np.array([classes.index(f.parent.name) for f in files])
    images = np.stack([np.asarray(Image.open(f).convert("RGB"), np.float32) for f in files])
    images = (images - cfg.MODEL.PIXEL_MEAN) / cfg.MODEL.PIXEL_STD
    with torch.no_grad():
        logits = model(torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32)).numpy()
    ranks = (-logits).argsort(axis=1)
    for k in (1, 5):
        hits = (ranks[:, :k] == labels[:, None]).any(axis=1)
        assert results[f"val/top{k}"] == pytest.approx(100 * hits.mean())
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert results["val/loss"] == pytest.approx(-log_p[range(24), labels].mean(), rel=1e-4)


def colours(root):
    """12 classes that differ in colour alone: 8 + 2 pictures each."""
    rng = np.random.default_rng(0)
    for label in range(12):
        colour = np.array([label % 3, label // 3 % 2, label // 6]) * [120, 240, 240]
        for split, number in (("train", 8), ("val", 2)):
            (root / split / f"{label:02d}").mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(colour + rng.integers(-10, 11, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / f"{label:02d}/{i}.png")
    return root


@pytest.mark.parametrize("norm", ["RefBN", "BN"])
def test_it_learns(cfg, tmp_path, norm):
    results = run(
        cfg, "DATASETS.ROOT", str(colours(tmp_path / "colours")), "MODEL.NORM", norm,
        "SOLVER.EPOCHS", 12, "SOLVER.OPTIMIZER", "adamw", "SOLVER.BASE_LR", 0.003,
    )  # fmt: skip
    assert results["val/top1"] > 80
    assert metrics(cfg)[-2]["train/top1"] > 60


def test_the_best_weights_are_kept(cfg):
    run(cfg, "TEST.VAL_INTERVAL", 1, "SOLVER.EPOCHS", 5)
    best = load_checkpoint(Path(cfg.OUTPUT_DIR) / "model_best.pth")
    validated = {m["iteration"]: m["val/top1"] for m in metrics(cfg) if "val/top1" in m}
    assert best["top1"] == max(validated.values()) == validated[best["iteration"]]
    again = run(cfg, "MODEL.WEIGHTS", str(Path(cfg.OUTPUT_DIR) / "model_best.pth"), eval_only=True)
    assert again["val/top1"] == best["top1"]


def test_a_resumed_run_does_not_forget_the_best(cfg):
    run(cfg, "SOLVER.EPOCHS", 2)
    path = Path(cfg.OUTPUT_DIR) / "model_best.pth"
    save_checkpoint({**load_checkpoint(path), "top1": 100.0}, path)
    run(cfg, "SOLVER.EPOCHS", 3, "TEST.VAL_INTERVAL", 1, resume=True)
    assert load_checkpoint(path)["top1"] == 100.0


def test_the_moving_average(cfg):
    """Weights that are averaged by hand along the run, of parameters and statistics alike."""
    one = trainer(cfg, "MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.7)
    average = None
    for iteration, batch in zip(range(6), one.loader, strict=False):
        one.step(iteration, batch)
        state = {k: v.clone() for k, v in one.model.state_dict().items() if v.is_floating_point()}
        if iteration < 2:  # timm's begins with the second step
            average = state
        average = {k: 0.7 * average[k] + 0.3 * v for k, v in state.items()}
    got = one.ema.module.state_dict()
    assert {"layer1.0.bn1.ref_mean", "layer1.0.bn1.running_var"} <= average.keys()
    for name, value in average.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


def test_eval_only_gives_the_same_results_and_keeps_the_run(cfg):
    trained = run(cfg, "MODEL.EMA.ENABLED", True)
    out = Path(cfg.OUTPUT_DIR)
    before = {p: p.read_bytes() for p in out.glob("*.*") if p.suffix in (".pth", ".yaml", ".json")}
    overrides = ["MODEL.WEIGHTS", str(out / "model_final.pth"), "MODEL.EMA.ENABLED", True]
    assert run(cfg, *overrides, eval_only=True) == trained
    assert all(p.read_bytes() == content for p, content in before.items())


# ---- the step


def test_learning_rate(cfg):
    cfg.merge_from_list(
        ["SOLVER.EPOCHS", 9, "SOLVER.BASE_LR", 0.4, "SOLVER.BASE_LR_END", 0.01,
         "SOLVER.WARMUP_EPOCHS", 2, "SOLVER.WARMUP_LR", 0.1]
    )  # fmt: skip

    def rates(*overrides):
        one = trainer(cfg, *overrides)
        for i in range(90):
            one.schedule.step_update(i)
            yield one.optimizer.param_groups[0]["lr"]

    warmup = [0.1 + 0.3 * i / 20 for i in range(20)]
    cosine = [0.01 + 0.39 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(20, 90)]
    assert list(rates()) == pytest.approx(warmup + cosine)
    steps = [0.4 * 0.1 ** ((i + 1 >= 30) + (i + 1 >= 60)) for i in range(20, 90)]
    multistep = ["SOLVER.LR_SCHEDULER_NAME", "multistep", "SOLVER.DECAY_MILESTONES", (3, 6)]
    assert list(rates(*multistep)) == pytest.approx(warmup + steps)


def test_weight_decay_leaves_norms_and_biases(cfg):
    one = trainer(cfg, "SOLVER.WEIGHT_DECAY", 0.03)
    for group in one.optimizer.param_groups:
        matrices = {parameter.ndim > 1 for parameter in group["params"]}
        assert matrices == {group["weight_decay"] == 0.03}


def gradients(one, iteration, batch):
    """Of one step whose optimizer does nothing."""
    one.optimizer.step = lambda: None
    loss = one.step(iteration, batch)[1]["total_loss"]
    return loss, [p.grad.clone() for p in one.model.parameters()]


def test_accumulated_parts_are_one_batch(cfg):
    """A norm that does not see the batch: the same gradients in one part or in four."""
    cfg.merge_from_list(["MODEL.NAME", "resnet18", "MODEL.NORM", "GN"])
    results = []
    for parts in (1, 4):
        one = trainer(cfg, "SOLVER.GRAD_ACCUM_STEPS", parts)
        results.append(gradients(one, 0, next(iter(one.loader))))
    (loss, whole), (summed_loss, summed) = results
    assert loss == pytest.approx(summed_loss, rel=1e-5)
    for a, b in zip(whole, summed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def inputs_of(one):
    """What the model gets, slice included, in the order of its passes."""
    seen = []
    one.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    return seen


def test_a_slice_is_appended_once_a_step_and_is_not_mixed(cfg):
    one = trainer(
        cfg, "SOLVER.GRAD_ACCUM_STEPS", 2, "INPUT.MIXUP_ALPHA", 1.0, "INPUT.RANDOM_ERASING", 1.0
    )
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1)
    std = torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1)
    reference = [(image.float() - mean) / std for image in one.reference.samples]
    seen = inputs_of(one)
    before = {name: m.ref_mean.clone() for name, m in refbn_layers(one.model)}
    for iteration, batch in zip(range(7), one.loader, strict=False):
        one.step(iteration, batch)
        changed = {n for n, m in refbn_layers(one.model) if not torch.equal(m.ref_mean, before[n])}
        assert changed == (before.keys() if iteration % 3 == 0 else set())
        before = {name: m.ref_mean.clone() for name, m in refbn_layers(one.model)}
    assert [len(x) for x in seen] == [6, 4, 4, 4, 4, 4] * 2 + [6, 4]
    for k, x in enumerate(x for x in seen if len(x) == 6):
        torch.testing.assert_close(x[4:], torch.stack(reference[2 * k : 2 * k + 2]))


@pytest.mark.parametrize("refresh, passes", [("static", 0), ("full", 1), ("slice", 2)])
def test_refreshes_beside_the_batch(cfg, refresh, passes):
    one = trainer(cfg, "MODEL.REFBN.REFRESH", refresh, "MODEL.REFBN.REFRESH_PERIOD", 2)
    seen = inputs_of(one)
    for iteration, batch in zip(range(4), one.loader, strict=False):
        one.step(iteration, batch)
    beside = {"full": 6, "slice": 2}.get(refresh)
    assert sorted(len(x) for x in seen) == [beside] * passes + [8] * 4


def test_mixup_ends_with_its_epoch(cfg):
    one = trainer(cfg, "INPUT.CUTMIX_ALPHA", 1.0, "INPUT.MIXUP_OFF_EPOCH", 1, "MODEL.NORM", "BN")
    seen = inputs_of(one)
    batch = next(iter(one.loader))
    for iteration in (0, 9, 10, 15):
        one.step(iteration, batch)
    plain = one._normalize(batch[0])
    assert [torch.equal(x, plain) for x in seen] == [False, False, True, True]


def test_channels_last(cfg):
    for on in (True, False):
        one = trainer(cfg, "MODEL.CHANNELS_LAST", on)
        seen = inputs_of(one)
        one.step(0, next(iter(one.loader)))  # with a slice on it
        tensors = [seen[0], one.model.layer1[0].conv1.weight]
        assert all(t.is_contiguous(memory_format=torch.channels_last) == on for t in tensors)


def test_bfloat16(cfg):
    one = trainer(cfg, "SOLVER.AMP.ENABLED", True)
    dtypes = set()
    one.model.layer1[0].conv1.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    one.step(0, next(iter(one.loader)))
    one.evaluate()
    assert dtypes == {torch.bfloat16} and not one.scaler.is_enabled()


@pytest.mark.slow
def test_compiled_is_eager(cfg):
    """With a capture, appended slices, validation and the moving average: one graph for each."""
    torch._dynamo.reset()
    measured = []
    for compiled in (False, True):
        one = trainer(cfg, "MODEL.COMPILE", compiled, "MODEL.EMA.ENABLED", True)
        steps = [one.step(i, batch)[1] for i, batch in zip(range(8), one.loader, strict=False)]
        measured.append([step["total_loss"] for step in steps] + list(one.evaluate().values()))
    assert measured[1] == pytest.approx(measured[0], rel=1e-4)
    assert not any("_orig_mod" in name for name in one.state_dict()["model"])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]


# ---- resumption


@pytest.mark.parametrize("refresh", ["static", "full", "slice", "concat"])
def test_killed_and_resumed_equals_straight(cfg, tmp_path, monkeypatch, refresh):
    cfg.merge_from_list(["MODEL.REFBN.REFRESH", refresh, *ALL_AT_ONCE])
    run(cfg, "OUTPUT_DIR", str(tmp_path / "straight"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 11)
        run(cfg)
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000006.pth"
    run(cfg, "DATALOADER.NUM_WORKERS", 2, resume=True)
    for key in ("model", "model_ema"):
        assert_same(final(tmp_path / "straight", key), final(cfg.OUTPUT_DIR, key))


def test_only_the_last_checkpoint_is_kept(cfg, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 15)
        run(cfg)
    assert [p.name for p in Path(cfg.OUTPUT_DIR).glob("model_0*.pth")] == ["model_0000013.pth"]


def test_half_written_files_of_a_killed_run(cfg, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 9)
        run(cfg)
    out = Path(cfg.OUTPUT_DIR)
    whole = (out / "model_0000006.pth").read_bytes()
    for name in (".model_0000013.pth.4711.tmp", ".last_checkpoint.4711.tmp", ".curves.png.7.tmp"):
        (out / name).write_bytes(whole[:1000])
    (out / "metrics.json").write_text('{"iteration": 0, "total_l')
    run(cfg, resume=True)
    assert not list(out.glob(".*"))
    assert metrics(cfg)[-1]["iteration"] == 19


def start(cfg, tmp_path, *arguments, launcher=(), **options):
    config_file = tmp_path / "config.yaml"
    config_file.write_text(cfg.dump())
    command = [*(launcher or [sys.executable]), str(ROOT / "tools/pretrain_imagenet.py")]
    command += ["--config-file", str(config_file), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, **options)


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.returncode
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_40_iterations_straight_or_killed_at_20(cfg, tmp_path):
    """The real thing: a process that is sent SIGKILL."""
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
    assert "its checkpoint is written. Go on with --resume" in err
    (saved,) = Path(cfg.OUTPUT_DIR).glob("model_0*.pth")
    done = load_checkpoint(saved)["iteration"]
    run(cfg, "SOLVER.EPOCHS", done // 10 + 2, resume=True)
    resumed = load_checkpoint(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    assert resumed["iteration"] == 10 * (done // 10 + 2) - 1


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


def test_two_workers_by_torchrun_train_as_one(cfg, tmp_path):
    """A norm that does not see the batch: the same gradients, however it is split."""
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
    assert len(metrics(cfg)) == 2  # written by worker 0 alone
    assert metrics(cfg)[-1]["val/loss"] == pytest.approx(one["val/loss"], rel=1e-3)
    assert (Path(cfg.OUTPUT_DIR) / "backbone.pkl").exists()


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


# ---- bad input


def test_output_dir_of_another_run_is_left_alone(cfg):
    run(cfg)
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(cfg.OUTPUT_DIR).iterdir())
    with pytest.raises(FileExistsError, match="holds a run already. Go on with it by --resume"):
        run(cfg)
    with pytest.raises(ValueError, match="SOLVER.BASE_LR: 0.02 there, 0.1 now"):
        run(cfg, "SOLVER.BASE_LR", 0.1, resume=True)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in Path(cfg.OUTPUT_DIR).iterdir())


def test_resume_without_an_earlier_run_starts_anew(cfg):
    run(cfg, resume=True)
    log = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    assert "holds no checkpoint yet; starting anew" in log


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
    with pytest.raises(FloatingPointError, match="at iteration 9: loss nan.*model_0000006.pth"):
        run(cfg)
    weights = load_checkpoint(Path(cfg.OUTPUT_DIR) / "model_0000006.pth")["model"]
    assert all(value.isfinite().all() for value in weights.values())


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
    assert (
        log.count("Image 1 that cannot be read, and is skipped: arrow/000008_plain.png (no image)")
        == 1
    )


def test_command_line_errors_are_one_line(cfg, tmp_path):
    process = start(cfg, tmp_path, "SOLVER.BASE_LRR", "1", stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert "SOLVER.BASE_LRR: no such key; did you mean SOLVER.BASE_LR?" in err
    assert "docs/pretraining.md" in err and "detectron2" not in err
