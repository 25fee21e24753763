"""The Detectron2 engine and Detectron2's own scripts, run as a user runs them."""

import argparse
import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.layers import refbn_layers
from refbn_d2.utils.errors import CheckpointError

detectron2 = pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytestmark = pytest.mark.detectron2

ROOT = Path(__file__).parents[2]
THEIRS = Path(detectron2.__file__).parent.parent / "tools"


def call(script, tmp_path, *arguments, **environment):
    """Run a script as a process; its output, both streams."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture
def config_file(tiny_cfg, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg.dump())
    return path


def train(config_file, tmp_path, *arguments):
    script = ROOT / "tools/train_net.py"
    return call(script, tmp_path, "--config-file", config_file, *arguments)


def weights(path):
    return load_checkpoint(path)["model"]


# ---- our script


def test_a_run_its_files_and_its_resumption(config_file, tmp_path):
    """`auto` is Detectron2, since it imports."""
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
    assert code == 1 and "holds a run already. Go on with it by --resume" in log
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
        except FileNotFoundError:  # it reads its annotations at once, and COCO is not here
            pass
    MetadataCatalog.get("odd").set(evaluator_type="smell")
    with pytest.raises(NotImplementedError, match="data set odd of evaluator_type 'smell'"):
        build_evaluator("odd", str(tmp_path))
    MetadataCatalog.remove("odd")


def test_auto_falls_back_where_refbn_cannot_be_registered(monkeypatch):
    from refbn_d2.engines.select import select_engine

    assert select_engine("auto").__name__ == "refbn_d2.engines.detectron2"
    monkeypatch.setitem(sys.modules, "refbn_d2.engines.detectron2", None)
    monkeypatch.delattr("refbn_d2.engines.detectron2")
    assert select_engine("auto").__name__ == "refbn_d2.engines.torchvision"
    with pytest.raises(ImportError, match="--engine detectron2: Detectron2 cannot be imported"):
        select_engine("detectron2")


# ---- Detectron2's own scripts, unmodified

needs_tools = pytest.mark.skipif(
    not (THEIRS / "train_net.py").is_file(), reason="Detectron2 is installed without its tools/"
)
CPU_WORKERS = """
def setup_environment():
    '''DistributedDataParallel takes no device_ids on the CPU, and Detectron2 gives some.'''
    import functools
    from detectron2.engine import defaults
    defaults.create_ddp_model = functools.partial(defaults.create_ddp_model, device_ids=None)
"""


@needs_tools
def test_train_net_with_the_environment_module(config_file, tmp_path):
    """Trains, evaluates, resumes; spawned workers know RefBN, and the module before is chained."""
    chained = tmp_path / "cpu_workers.py"
    chained.write_text(CPU_WORKERS)
    environment = {"DETECTRON2_ENV_MODULE": "refbn_d2.env", "REFBN_D2_ENV_MODULE": str(chained)}

    def stock(*arguments):
        script = THEIRS / "train_net.py"
        return call(script, tmp_path, "--config-file", config_file, *arguments, **environment)

    code, log = stock("SOLVER.MAX_ITER", 4)
    assert code == 0, log
    assert "Captured the reference batch" in log and "copypaste: Task: segm" in log
    code, log = stock("--resume", "SOLVER.MAX_ITER", 6)
    assert code == 0 and "from iteration 4" in log, log
    final = tmp_path / "output/model_final.pth"
    assert any("ref_mean" in name for name in weights(final))
    code, log = stock("--eval-only", "MODEL.WEIGHTS", final)
    assert code == 0 and "copypaste: Task: bbox" in log, log

    code, log = stock("--num-gpus", 2, "SOLVER.MAX_ITER", 4, "OUTPUT_DIR", tmp_path / "two")
    assert code == 0, log
    assert (tmp_path / "two/log.txt.rank1").is_file()
    with_one, with_two = (tmp_path / name / "model_final.pth" for name in ("output", "two"))
    assert weights(with_one).keys() == weights(with_two).keys()


@needs_tools
def test_a_config_of_detectron2s_and_no_keys_of_ours(tiny_shapes, tmp_path):
    """MODEL.RESNETS.NORM RefBN on the command line is all."""
    shapes = tiny_shapes / "shapes"
    chained = tmp_path / "data.py"
    chained.write_text(
        "def setup_environment():\n"
        "    from detectron2.data.datasets import register_coco_instances as register\n"
        f"    register('t', {{}}, '{shapes}/annotations/instances_train.json', '{shapes}/train')\n"
    )
    config = THEIRS.parent / "configs/COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
    code, log = call(
        THEIRS / "train_net.py", tmp_path, "--config-file", config,
        "MODEL.RESNETS.NORM", "RefBN", "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu",
        "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
        "DATASETS.TRAIN", "('t',)", "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)",
        "MODEL.ROI_HEADS.NUM_CLASSES", 12, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2,
        "MODEL.REFBN.NUM_IMAGES", 4, "MODEL.REFBN.SLICE_SIZE", 2, "DATALOADER.NUM_WORKERS", 0,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "OUTPUT_DIR", tmp_path / "output",
        DETECTRON2_ENV_MODULE="refbn_d2.env", REFBN_D2_ENV_MODULE=str(chained),
    )  # fmt: skip
    assert code == 0, log
    kinds = {name.split(".")[-1] for name in weights(tmp_path / "output/model_final.pth")}
    assert {"ref_mean", "ref_var", "ref_count"} <= kinds


LAZY = """
from detectron2 import model_zoo
from detectron2.data.datasets import register_coco_instances

for split in ("train", "val"):
    json_file = f"SHAPES/annotations/instances_{split}.json"
    register_coco_instances(split, {}, json_file, f"SHAPES/{split}")
model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up.stem.norm = "RefBN"
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1  # its block has none
model.backbone.bottom_up.stages.norm = "RefBN"
model.backbone.out_channels = 32
model.proposal_generator.head.in_channels = 32
model.proposal_generator.post_nms_topk = (50, 50)
model.roi_heads.num_classes = 12
model.roi_heads.box_head.input_shape.channels = 32
model.roi_heads.box_head.fc_dims = [32]
model.roi_heads.box_predictor.input_shape.channels = 32
model.roi_heads.mask_head.input_shape.channels = 32
model.roi_heads.mask_head.conv_dims = [32, 32]
train = model_zoo.get_config("common/train.py").train
train.device, train.max_iter, train.output_dir, train.eval_period = "cpu", 4, "lazy", 0
train.init_checkpoint = ""
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.002
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names, dataloader.test.dataset.names = "train", "val"
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.train.mapper.augmentations[0].short_edge_length = (64,)
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.evaluator.output_dir = "lazy/inference"
refbn = dict(refresh="slice", num_images=4, slice_size=2, refresh_period=2)
"""


@pytest.fixture
def lazy_config(tiny_shapes, tmp_path):
    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="model_zoo does not import")
    try:
        model_zoo.get_config("common/train.py")
    except RuntimeError as error:
        pytest.skip(f"Detectron2 is installed without its configs: {error}")
    path = tmp_path / "lazy.py"
    path.write_text(LAZY.replace("SHAPES", str(tiny_shapes / "shapes")))
    return path


def test_lazyconfig_script(lazy_config, tmp_path):
    def lazy(*arguments):
        script = ROOT / "tools/lazyconfig_train_net.py"
        return call(script, tmp_path, "--config-file", lazy_config, *arguments)

    code, log = lazy()
    assert code == 0, log
    assert "4 images of the training set" in log and "copypaste: Task: segm" in log
    left = {path.name for path in (tmp_path / "lazy").iterdir()}
    assert {"curves.png", "samples.png", "model_final.pth", "metrics.json"} < left
    code, log = lazy("--resume", "train.max_iter=6")
    assert code == 0 and "from iteration 4" in log, log
    code, log = lazy("--eval-only", "train.init_checkpoint=lazy/model_final.pth")
    assert code == 0 and "copypaste: Task: bbox" in log, log
    code, log = lazy("refbn.refresh=never")
    assert code == 1 and "ValueError: MODEL.REFBN.REFRESH = 'never'; allowed" in log


@needs_tools
def test_detectron2s_lazyconfig_script(lazy_config, tmp_path):
    code, log = call(
        THEIRS / "lazyconfig_train_net.py", tmp_path, "--config-file", lazy_config,
        DETECTRON2_ENV_MODULE="refbn_d2.env",
    )  # fmt: skip
    assert code == 1 and "NUM_IMAGES is 32, but the training set has 24" in log  # the defaults


# ---- weights


def small(**changes):
    """A Detectron2 Faster R-CNN R-18-FPN of the norm in `changes`."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
            "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
            "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
            "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
            "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
            "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
            "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
            "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
            *[part for key, value in changes.items() for part in (f"MODEL.{key}", value)],
        ]
    )  # fmt: skip
    return build_model(cfg)


def randomized(model):
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "var" in name else value.normal_()
            elif name.endswith("ref_count"):
                value.fill_(7)
    return model


def with_norm(norm):
    return small(**{"RESNETS.NORM": norm, "FPN.NORM": "" if norm == "FrozenBN" else norm})


def load(model, path, allow_partial=False):
    from refbn_d2.engines.detectron2.trainer import Checkpointer

    checkpointer = Checkpointer(model, "", allow_partial)
    checkpointer.load(str(path))


@pytest.fixture
def log(caplog):
    """Warnings of Detectron2, fvcore and this package."""
    names = ("detectron2", "fvcore", "refbn_d2")
    before = {name: logging.getLogger(name).propagate for name in names}
    for name in names:
        logging.getLogger(name).propagate = True
    caplog.set_level(logging.WARNING)
    yield caplog
    for name, value in before.items():
        logging.getLogger(name).propagate = value


def test_a_refbn_checkpoint_loads_complete_and_silent(tmp_path, log):
    """In Detectron2's own checkpointer: with the plugin nothing else is needed."""
    from detectron2.checkpoint import DetectionCheckpointer

    saved = randomized(with_norm("RefBN"))
    DetectionCheckpointer(saved, str(tmp_path)).save("model")
    log.clear()
    model = with_norm("RefBN")
    DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert log.text == ""
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(layer.has_reference() for _, layer in refbn_layers(model))


def test_a_bn_checkpoint_loads_and_its_statistics_are_the_reference(tmp_path, log):
    from detectron2.checkpoint import DetectionCheckpointer

    saved = randomized(with_norm("BN"))
    DetectionCheckpointer(saved, str(tmp_path)).save("model")
    log.clear()
    model = with_norm("RefBN")
    DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert log.text == ""
    for name, layer in refbn_layers(model):
        mean = saved.state_dict()[f"{name}.running_mean"]
        assert torch.equal(layer.ref_mean, mean) and torch.equal(layer.running_mean, mean)
        assert layer.ref_count == 1


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torchvisions_resnet_fills_the_backbone(tmp_path, suffix):
    import torchvision
    from safetensors.torch import save_file

    theirs = randomized(torchvision.models.resnet18())
    path = tmp_path / f"resnet18.{suffix}"
    if suffix == "pth":
        torch.save(theirs.state_dict(), path)
    else:
        save_file(theirs.state_dict(), path)
    model = small(**{"RESNETS.NORM": "RefBN", "RESNETS.STRIDE_IN_1X1": False})
    load(model, path)
    theirs.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        stage = theirs.layer2(theirs.layer1(y))
        ours = model.backbone.bottom_up.eval()(x)["res3"]
    torch.testing.assert_close(ours, stage, rtol=1e-4, atol=1e-3 * float(stage.abs().max()))


def as_caffe2(backbone):
    """MSRA's names: weights of convolutions, and scale and bias of norms, folded statistics."""
    state, blobs = backbone.state_dict(), {}
    for name, value in state.items():
        if "norm" in name and name.rpartition(".")[2] not in ("weight", "bias"):
            continue
        *path, kind = name.split(".")
        norm = "norm" in path
        layer = [part for part in path if part != "norm"]
        if layer == ["stem", "conv1"]:
            blob = "res_conv1_bn" if norm else "conv1"
        else:
            stage, block, conv = layer
            branch = "1" if conv == "shortcut" else f"2{'abc'[int(conv[-1]) - 1]}"
            blob = f"{stage}_{block}_branch{branch}{'_bn' if norm else ''}"
        blobs[f"{blob}_{ {'weight': 's', 'bias': 'b'}[kind] if norm else 'w' }"] = value.numpy()
    return blobs


@pytest.mark.parametrize("norm", ["FrozenBN", "RefBN"])
def test_detectrons_caffe2_weights(tmp_path, norm):
    """R-50.pkl and its like, which Detectron2's configs name."""
    changes = {"RESNETS.NORM": norm, "RESNETS.DEPTH": 50, "RESNETS.RES2_OUT_CHANNELS": 256}
    saved = randomized(small(**changes)).backbone.bottom_up
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(as_caffe2(saved)))
    model = small(**changes)
    load(model, path)
    loaded = model.backbone.bottom_up.state_dict()
    for name, value in saved.state_dict().items():
        if name.endswith((".weight", ".bias")):
            assert torch.equal(loaded[name], value), name
        elif name.endswith("running_mean"):
            assert not loaded[name].any(), name
        elif name.endswith("running_var"):
            assert loaded[name].eq(1).all(), name


def test_weights_that_do_not_fit_stop_the_run(tmp_path, log):
    """Detectron2 warns, and trains from noise."""
    saved = randomized(small(**{"RESNETS.NORM": "RefBN"}))
    save_checkpoint({"model": saved.backbone.bottom_up.state_dict()}, tmp_path / "r18.pth")
    deeper = {"RESNETS.NORM": "RefBN", "RESNETS.DEPTH": 34}
    with pytest.raises(
        CheckpointError, match=r"(?s)r18.pth: .*res2.2.conv1.weight not in the file"
    ):
        load(small(**deeper), tmp_path / "r18.pth")
    load(small(**deeper), tmp_path / "r18.pth", allow_partial=True)
    assert "do not fit" in log.text
    np.savez(tmp_path / "odd.npz", a=1)
    with pytest.raises(CheckpointError, match="odd.npz is cut off or no checkpoint"):
        load(small(), tmp_path / "odd.npz")


def test_a_checkpoint_of_either_engine_loads_in_the_other(detectron2_cfg, tiny_cfg, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    from refbn_d2.engines.torchvision.modeling import build_model as build_ours
    from refbn_d2.engines.torchvision.trainer import main

    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "DATASETS.TEST", []])
    main(copy.deepcopy(tiny_cfg), resume=False, eval_only=False)
    path = tmp_path / "output/model_final.pth"
    theirs = build_model(detectron2_cfg)
    DetectionCheckpointer(theirs).load(str(path))
    DetectionCheckpointer(theirs, str(tmp_path)).save("theirs")
    ours = build_ours(tiny_cfg)
    ours.load_state_dict(weights(tmp_path / "theirs.pth"), strict=True)
    expected = weights(path)
    assert list(expected) == list(ours.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name
