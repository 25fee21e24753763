"""The Detectron2 engine, run as a user runs it."""

import argparse
import json

import pytest

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.utils.errors import ConfigError
from tests.detectron2_scripts import ROOT, call
from tests.device import two_devices

pytestmark = pytest.mark.detectron2


def train(config_file, tmp_path, *arguments):
    script = ROOT / "tools/train_net.py"
    return call(script, tmp_path, "--config-file", config_file, *arguments)


def test_a_run_its_files_and_its_resumption(config_file, tmp_path):
    """`auto` is Detectron2, because it imports."""
    code, log = train(config_file, tmp_path, "--num-gpus", 1, "SOLVER.MAX_ITER", 4)
    assert code == 0, log
    assert "d2.engine.train_loop" in log
    assert "Captured the reference batch in 32 of 32 layers: 4 images of tiny_train" in log
    out = tmp_path / "output"
    left = {path.name for path in out.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "last_checkpoint"} < left
    assert {"curves.png", "samples.png", "inference"} < left
    assert (out / "inference/coco_instances_results.json").is_file()
    assert "bbox/AP" in json.loads((out / "metrics.json").read_text().splitlines()[-1])

    code, log = train(config_file, tmp_path, "SOLVER.MAX_ITER", 6)
    assert code == 1 and "holds a run already. Resume it with --resume" in log
    code, log = train(config_file, tmp_path, "--resume", "SOLVER.BASE_LR", 0.5)
    assert code == 1 and "SOLVER.BASE_LR: 0.002 there, 0.5 now" in log

    code, log = train(config_file, tmp_path, "--resume", "SOLVER.MAX_ITER", 6)
    assert code == 0, log
    assert "Starting training from iteration 4" in log and "Captured" not in log
    state = load_checkpoint(out / "model_final.pth")
    assert state["iteration"] == 5
    assert state["trainer"]["hooks"]["ReferenceBatchHook"]["dataset"] == "tiny_train"

    final = out / "model_final.pth"
    code, log = train(config_file, tmp_path, "--eval-only", "MODEL.WEIGHTS", final)
    assert code == 0 and "copypaste: Task: bbox" in log, log


@two_devices
def test_two_workers(config_file, tmp_path):
    code, log = train(config_file, tmp_path, "--engine", "detectron2", "--num-gpus", 2)
    assert code == 0, log
    assert (tmp_path / "output/log.txt.rank1").is_file()
    assert "copypaste: Task: segm" in log


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.NO_SUCH_KEY", 1], "config.yaml, overridden by .*NO_SUCH_KEY"),
        (["MODEL.REFBN.SLICE_SIZE", 5], r"MODEL.REFBN.SLICE_SIZE = 5; allowed: at most"),
        (["MODEL.REFBN.NUM_IMAGES", 25], "NUM_IMAGES is 25, but the training set has 24"),
        (["MODEL.WEIGHTS", "gone.pth"], "gone.pth: there is no such checkpoint file"),
        (["SOLVER.BASE_LR", 1e12, "SOLVER.WARMUP_ITERS", 0], "Training diverged: .*none yet"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(detectron2_cfg, config_file, tmp_path, overrides, message):
    from refbn_d2.engines import detectron2 as engine

    args = argparse.Namespace(
        config_file=str(config_file), opts=[*overrides], resume=False, eval_only=False,
        num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto", allow_partial_weights=False,
    )  # fmt: skip
    with pytest.raises((ValueError, OSError), match=message):
        engine.run(args)


def test_the_type_of_a_test_set_chooses_the_evaluator(tmp_path):
    from detectron2.data import MetadataCatalog

    from refbn_d2.engines.detectron2.trainer import build_evaluator

    for name, kind in (
        ("coco_2017_val_panoptic_separated", "DatasetEvaluators"),
        ("voc_2007_val", "PascalVOCDetectionEvaluator"),
        ("ade20k_sem_seg_val", "SemSegEvaluator"),
    ):
        try:
            assert type(build_evaluator(name, str(tmp_path))).__name__ == kind
        except (
            FileNotFoundError
        ):  # this evaluator reads its annotations at once, but there is no COCO here
            pass
    MetadataCatalog.get("odd").set(evaluator_type="smell")
    with pytest.raises(ConfigError, match="data set odd of evaluator_type 'smell'"):
        build_evaluator("odd", str(tmp_path))
    MetadataCatalog.remove("odd")


@pytest.mark.parametrize("number", [1, 2])
def test_several_test_sets_keep_their_files_apart(detectron2_cfg, number):
    from refbn_d2.engines.detectron2.trainer import Trainer
    from refbn_d2.plugin.registration import register_datasets

    register_datasets(detectron2_cfg)
    detectron2_cfg.DATASETS.TEST = ("tiny_val", "tiny_train")[:number]
    folders = [
        Trainer.build_evaluator(detectron2_cfg, name)._output_dir
        for name in detectron2_cfg.DATASETS.TEST
    ]
    inference = f"{detectron2_cfg.OUTPUT_DIR}/inference"
    alone, apart = [inference], [f"{inference}/tiny_val", f"{inference}/tiny_train"]
    assert folders == (alone if number == 1 else apart)
