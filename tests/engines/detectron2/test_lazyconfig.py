"""LazyConfig, run by our script and by Detectron2's."""

import pytest

from tests.detectron2_scripts import ROOT, THEIRS, call, needs_tools

pytestmark = pytest.mark.detectron2

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
