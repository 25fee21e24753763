"""Real training on generated pictures: a run's files, and its resumption."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.engines.torchvision.trainer import Trainer
from tests.device import on_cpu
from tests.engines.torchvision.helpers import run


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


@on_cpu
@pytest.mark.parametrize("lacks, dtype", [(False, torch.bfloat16), (True, torch.float32)])
def test_bfloat16_where_the_device_has_it(tiny_cfg, monkeypatch, lacks, dtype):
    """In the capture of the reference batch and in a training step."""
    monkeypatch.setattr("refbn_d2.utils.precision.lacks_bfloat16", lambda device: lacks)
    dtypes = []
    conv = torch.nn.functional.conv2d

    def watch(*args, **options):
        out = conv(*args, **options)
        dtypes.append(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "conv2d", watch)
    tiny_cfg.SOLVER.AMP.ENABLED = True
    trainer = Trainer(tiny_cfg, Path(tiny_cfg.OUTPUT_DIR))
    captured = len(dtypes)
    trainer.step(0, next(iter(trainer.loader)))
    assert 0 < captured < len(dtypes) and set(dtypes) == {dtype}


def test_resume_without_an_earlier_run_starts_anew(tiny_cfg):
    run(tiny_cfg, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", [], resume=True)
    out = Path(tiny_cfg.OUTPUT_DIR)
    assert "holds no checkpoint yet; starting from the beginning" in (out / "log.txt").read_text()


def test_expected_results(tiny_cfg):
    expected = [["bbox", "AP", 99.0, 0.5]]
    with pytest.raises(SystemExit) as error:
        run(tiny_cfg, "SOLVER.MAX_ITER", 1, "TEST.EXPECTED_RESULTS", expected)
    assert error.value.code == 1
    out = Path(tiny_cfg.OUTPUT_DIR)
    weights_file = str(out / "model_final.pth")
    expected = [["bbox", "AP", 0.0, 50.0]]
    run(tiny_cfg, "MODEL.WEIGHTS", weights_file, "TEST.EXPECTED_RESULTS", expected, eval_only=True)
