"""How Detectron2 comes to know RefBN: by import, and by DETECTRON2_ENV_MODULE."""

import os
import subprocess
import sys

import pytest

from tests.detectron2_scripts import THEIRS, call, needs_tools, weights

pytestmark = pytest.mark.detectron2

CHECK = "assert type(get_norm('RefBN', 4)).__name__ == 'RefBatchNorm2d'"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "code",
    [
        f"import refbn_d2; from detectron2.modeling.backbone.fpn import get_norm; {CHECK}",
        f"from detectron2.modeling.backbone.fpn import get_norm; import refbn_d2; {CHECK}",
    ],
    ids=["early", "late"],
)
def test_importing_the_package_registers(code):
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["detectron2", "refbn_d2", "refbn_d2.plugin"])
def test_environment_module_and_the_one_before_it(tmp_path, first):
    chained = tmp_path / "mine.py"
    chained.write_text(f"def setup_environment():\n    open({str(tmp_path / 'ran')!r}, 'w')\n")
    code = f"import {first}; from detectron2.layers import get_norm; {CHECK}"
    done = run(code, DETECTRON2_ENV_MODULE="refbn_d2.env", REFBN_D2_ENV_MODULE=str(chained))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").exists()


def test_a_detectron2_that_lacks_parts_is_named(tmp_path):
    """The package works without it; the environment module, which is asked for, stops."""
    fake = tmp_path / "detectron2"
    (fake / "layers").mkdir(parents=True)
    (fake / "__init__.py").write_text("__version__ = '0.1'")
    (fake / "layers/__init__.py").write_text("def get_norm(norm, out_channels): ...")
    code = "import refbn_d2.layers; print('works'); from refbn_d2 import plugin"
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = run(code, PYTHONPATH=path)
    assert done.stdout == "works\n"
    assert "RefBN is not registered with Detectron2: Detectron2 0.1 lacks what" in done.stderr
    assert "ImportError: Detectron2 0.1 lacks what RefBN needs" in done.stderr


def test_a_folder_called_detectron2_is_not_detectron2(tmp_path):
    (tmp_path / "detectron2").mkdir()
    done = run("import refbn_d2; print(refbn_d2.RefBatchNorm2d(3))", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "RefBatchNorm2d(3" in done.stdout, done.stderr


# ---- Detectron2's own scripts, unmodified


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
