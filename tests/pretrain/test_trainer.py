"""Real pretraining on generated pictures: the files of a run, and its steps."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.optim import muon

from refbn_d2.checkpoint import load_checkpoint, save_checkpoint
from refbn_d2.layers import refbn_layers
from tests.device import DEVICE
from tests.pretrain.helpers import final, metrics, run, trainer

# ---- the files of a run


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
    """The oracle is timm's BatchNorm model, and sorting by numpy."""
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


def colors(root):
    """Draw 12 classes that differ only in color, 8 + 2 pictures each."""
    rng = np.random.default_rng(0)
    for label in range(12):
        color = np.array([label % 3, label // 3 % 2, label // 6]) * [120, 240, 240]
        for split, number in (("train", 8), ("val", 2)):
            (root / split / f"{label:02d}").mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(color + rng.integers(-10, 11, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / f"{label:02d}/{i}.png")
    return root


@pytest.mark.parametrize("norm", ["RefBN", "RefIN", "BN"])
def test_it_learns(cfg, tmp_path, norm):
    results = run(
        cfg, "DATASETS.ROOT", str(colors(tmp_path / "colors")), "MODEL.NORM", norm,
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
    """The oracle averages parameters and statistics by hand during the run."""
    one = trainer(cfg, "MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.7)
    average = None
    for iteration, batch in zip(range(6), one.loader, strict=False):
        one.step(iteration, batch)
        state = {k: v.clone() for k, v in one.model.state_dict().items() if v.is_floating_point()}
        if iteration < 2:  # timm begins with the second step
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
    """Return the gradients of one step whose optimizer does nothing."""
    one.optimizer.step = lambda: None
    loss = one.step(iteration, batch)[1]["total_loss"]
    return loss, [p.grad.clone() for p in one.model.parameters()]


def test_accumulated_parts_are_one_batch(cfg):
    """With a norm that is not over the batch, one part and four give the same gradients."""
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
    """Record the first layer's inputs, slice included, in the order of the model's passes."""
    seen = []
    one.model.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    return seen


def test_a_slice_is_appended_once_a_step_and_is_not_mixed(cfg):
    one = trainer(
        cfg, "SOLVER.GRAD_ACCUM_STEPS", 2, "INPUT.MIXUP_ALPHA", 1.0, "INPUT.RANDOM_ERASING", 1.0
    )
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1)
    std = torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1)
    reference = [((image.float() - mean) / std).to(DEVICE) for image in one.reference.samples]
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
    plain = one.normalize(batch[0])
    assert [torch.equal(x, plain) for x in seen] == [False, False, True, True]


def test_channels_last(cfg):
    for on in (True, False):
        one = trainer(cfg, "MODEL.CHANNELS_LAST", on)
        seen = inputs_of(one)
        one.step(0, next(iter(one.loader)))  # with an appended slice
        tensors = [seen[0], one.model.layer1[0].conv1.weight]
        assert all(t.is_contiguous(memory_format=torch.channels_last) == on for t in tensors)


@pytest.mark.parametrize("lacks, dtype", [(False, torch.bfloat16), (True, torch.float32)])
def test_bfloat16_where_the_device_has_it(cfg, monkeypatch, lacks, dtype):
    """Forward passes and Muon's iterations."""
    monkeypatch.setattr("refbn_d2.utils.precision.lacks_bfloat16", lambda device: lacks)
    one = trainer(cfg, "SOLVER.AMP.ENABLED", True, "SOLVER.OPTIMIZER", "muon")
    dtypes, iterations = set(), set()
    one.model.layer1[0].conv1.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    newton_schulz = muon.zeropower_via_newtonschulz

    def watch(*args, **options):
        out = newton_schulz(*args, **options)
        iterations.add(out.dtype)
        return out

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", watch)
    one.step(0, next(iter(one.loader)))
    one.evaluate()
    assert dtypes == iterations == {dtype} and not one.scaler.is_enabled()


@pytest.mark.slow
def test_compiled_is_eager(cfg):
    """Capture, appended slices, validation and the moving average have one graph each."""
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
