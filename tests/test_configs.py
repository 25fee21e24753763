"""Every config of the repository: it loads, differs from others as it says, and trains a step."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from refbn_d2.config import ConfigError, get_cfg
from refbn_d2.engines.torchvision.supported import check_supported

CONFIGS = Path(__file__).parents[1] / "configs"
YAMLS = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith("Base-") and path.parent.name not in ("pretrain", "studies")
)
DETECTRON2_ALONE = [name for name in YAMLS if "retinanet" in name]
COCO = [name for name in YAMLS if name.startswith("COCO-")]
SMALL = [  # a step in a second; the model keeps its depth and width
    "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8,
]  # fmt: skip


def load(name, cfg=None):
    cfg = get_cfg() if cfg is None else cfg
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def flat(cfg):
    def leaves(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(leaves(yaml.safe_load(cfg.dump())))


def samples(cfg, count=2, side=64):
    """Pictures of noise with two triangles each."""
    rng = np.random.default_rng(0)
    boxes = torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 60]])
    return [
        {
            "image": torch.from_numpy(rng.integers(0, 255, (3, side, side), dtype=np.uint8)),
            "height": side, "width": side, "file_name": f"{i}.png", "image_id": i,
            "gt_boxes": boxes, "gt_classes": torch.tensor([0, 1]),
            "gt_masks": [[np.array([a, b, c, b, a, d])] for a, b, c, d in boxes.double().numpy()],
        }
        for i in range(count)
    ]  # fmt: skip


def check_step(model, batch):
    losses = model(batch)
    assert losses and all(torch.isfinite(value) for value in losses.values()), losses
    sum(losses.values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert sum(p.grad.abs().sum() > 0 for p in trained) > 0.9 * len(trained)


def models():
    """The configs without those that build the model of another (longer schedules, batches)."""
    seen = {}
    for name in YAMLS:
        keys = flat(load(name))
        model = {k: v for k, v in keys.items() if k.startswith("MODEL.") and "WEIGHTS" not in k}
        seen.setdefault(repr(model), name)
    return list(seen.values())


MODELS = models()


@pytest.mark.parametrize("name", [n for n in MODELS if n not in DETECTRON2_ALONE])
def test_one_step_on_torchvisions_operators(name):
    from refbn_d2.engines.torchvision.modeling import build_model

    cfg = load(name)
    check_supported(cfg)
    cfg.merge_from_list(SMALL)
    torch.manual_seed(0)
    check_step(build_model(cfg), samples(cfg))


@pytest.mark.parametrize("name", DETECTRON2_ALONE)
def test_retinanet_is_refused_without_detectron2(name):
    with pytest.raises(ConfigError) as error:
        check_supported(load(name))
    for part in ("MODEL.META_ARCHITECTURE = 'RetinaNet'", "--engine detectron2"):
        assert part in str(error.value)


@pytest.mark.detectron2
@pytest.mark.parametrize("name", YAMLS)
def test_detectron2_reads_the_same(name):
    detectron2 = pytest.importorskip("detectron2.config")
    assert flat(load(name, detectron2.get_cfg())) == flat(load(name))


@pytest.mark.detectron2
@pytest.mark.parametrize("name", MODELS)
def test_one_step_on_detectron2(name):
    detectron2 = pytest.importorskip("detectron2.config")
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances, PolygonMasks
    from detectron2.utils.events import EventStorage

    cfg = load(name, detectron2.get_cfg())
    cfg.merge_from_list(SMALL)
    batch = samples(cfg)
    for sample in batch:
        instances = sample["instances"] = Instances(sample["image"].shape[1:])
        instances.gt_boxes = Boxes(sample["gt_boxes"])
        instances.gt_classes = sample["gt_classes"]
        instances.gt_masks = PolygonMasks(sample["gt_masks"])
    torch.manual_seed(0)
    model = build_model(cfg)
    if "SyncBN" in cfg.MODEL.RESNETS.NORM:  # torch has none on the CPU
        assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        return
    with EventStorage():
        check_step(model, batch)


@pytest.mark.detectron2
@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_the_lazy_form_is_the_yaml(kind):
    """The same model, by names and shapes; the same pictures, solver and schedule."""
    detectron2 = pytest.importorskip("detectron2.config")
    from detectron2.modeling import build_model

    folder = {"faster": "COCO-Detection", "mask": "COCO-InstanceSegmentation"}[kind]
    name = f"{kind}_rcnn_R_50_FPN_1x_refbn"
    try:
        lazy = detectron2.LazyConfig.load(str(CONFIGS / f"LazyConfig/{name}.py"))
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"Detectron2's model_zoo has no configs: {error}")
    cfg = load(f"{folder}/{name}.yaml", detectron2.get_cfg())
    cfg.MODEL.DEVICE = "cpu"
    ours, theirs = build_model(cfg), detectron2.instantiate(lazy.model)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for model in (ours, theirs):
        assert model.pixel_mean.flatten().tolist() == pytest.approx(cfg.MODEL.PIXEL_MEAN)
        assert model.pixel_std.flatten().tolist() == pytest.approx(cfg.MODEL.PIXEL_STD)
        assert model.input_format == "RGB" and all(p.requires_grad for p in model.parameters())
    strides = [
        [m.stride for m in model.modules() if hasattr(m, "stride")] for model in (ours, theirs)
    ]
    assert strides[0] == strides[1]
    train = lazy.dataloader.train
    assert tuple(train.mapper.augmentations[0].short_edge_length) == tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    assert train.mapper.use_instance_mask == cfg.MODEL.MASK_ON
    assert (train.total_batch_size, train.mapper.image_format) == (16, "RGB")
    assert (lazy.optimizer.lr, lazy.train.max_iter) == (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER)
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.output_dir == cfg.OUTPUT_DIR


# ---- how configs differ

NORM_KEYS = {f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}


def difference(first, second):
    a, b = flat(load(first)), flat(load(second))
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def names(pattern):
    return [name for name in YAMLS if re.fullmatch(pattern, name)]


@pytest.mark.parametrize("kind", ["mask_rcnn", "faster_rcnn"])
@pytest.mark.parametrize("scratch", [False, True])
def test_norm_variants_differ_in_the_norm_alone(kind, scratch):
    prefix = f"scratch_{kind}_R_50_FPN_4conv1fc_3x" if scratch else f"{kind}_R_50_FPN_4conv1fc_1x"
    compared = names(rf"COCO-Norms/{prefix}_\w+\.yaml")
    expected = {"refbn", "bn", "syncbn", "gn", "refbn_backbone", "refin_backbone"}
    expected |= set() if scratch else {"frozenbn_backbone"}
    assert {Path(name).stem.removeprefix(f"{prefix}_") for name in compared} == expected
    norms = {}
    for name in compared:
        cfg = load(name)
        norms[name] = (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM)
        own = difference(compared[0], name) - {"OUTPUT_DIR"}
        assert own <= NORM_KEYS | (set() if scratch else {"MODEL.WEIGHTS"}), name
        heads = {cfg.MODEL.FPN.NORM, cfg.MODEL.ROI_BOX_HEAD.NORM}
        heads |= {cfg.MODEL.ROI_MASK_HEAD.NORM} if cfg.MODEL.MASK_ON else set()
        assert heads == ({""} if name.endswith("_backbone.yaml") else {cfg.MODEL.RESNETS.NORM})
        assert (cfg.MODEL.WEIGHTS == "") == scratch
    assert len(set(norms.values())) == len(norms)


@pytest.mark.parametrize("norm", ["refbn", "refin_backbone", "bn", "gn"])
def test_batch_sizes_see_the_same_images(norm):
    for images in (1, 2, 4):
        cfg = load(f"COCO-BatchSize/mask_rcnn_R_50_FPN_4conv1fc_1x_{norm}_{images}im.yaml")
        solver = cfg.SOLVER
        assert solver.IMS_PER_BATCH == 8 * images
        assert solver.BASE_LR == pytest.approx(0.02 * images / 2)
        assert solver.IMS_PER_BATCH * solver.MAX_ITER == 16 * 90000
        assert [solver.IMS_PER_BATCH * step for step in solver.STEPS] == [16 * 60000, 16 * 80000]
        assert solver.IMS_PER_BATCH * solver.WARMUP_ITERS == 16 * 1000
    others = difference(
        f"COCO-BatchSize/mask_rcnn_R_50_FPN_4conv1fc_1x_{norm}_1im.yaml",
        f"COCO-BatchSize/mask_rcnn_R_50_FPN_4conv1fc_1x_{norm}_4im.yaml",
    )
    assert all(key.startswith("SOLVER.") or key == "OUTPUT_DIR" for key in others)


def test_3x_is_three_times_1x():
    longer = names(r"COCO-(Detection|InstanceSegmentation)/\w+_3x_refbn\.yaml")
    assert len(longer) == 11
    for name in longer:
        assert difference(name.replace("_3x_", "_1x_"), name) == {
            "SOLVER.MAX_ITER", "SOLVER.STEPS", "OUTPUT_DIR"
        }  # fmt: skip
        assert load(name).SOLVER.MAX_ITER == 3 * load(name.replace("_3x_", "_1x_")).SOLVER.MAX_ITER


def test_every_config_has_a_folder_of_its_own_and_refbn_trains_everywhere():
    folders = [load(name).OUTPUT_DIR for name in YAMLS]
    assert len(set(folders)) == len(folders)
    for name in COCO:
        cfg = load(name)
        assert cfg.OUTPUT_DIR == f"./output/{Path(name).stem}"
        assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
        assert cfg.DATASETS.TRAIN == ["coco_2017_train"] or cfg.DATASETS.TRAIN == (
            "coco_2017_train",
        )
