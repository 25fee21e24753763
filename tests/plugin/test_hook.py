"""The reference batch in Detectron2's own training loops, on real (generated) COCO files."""

import copy
import json
import logging
from itertools import pairwise

import pytest
import torch
from torch import nn

from refbn_d2.config import RefBNOptions, refbn_options
from refbn_d2.layers import RefBatchNorm2d, refbn_layers
from tests.plugin.hook_helpers import CHANGES, equal, hook_of, references, trainer_of

pytest.importorskip("detectron2.engine", reason="Detectron2 is not installed")
pytestmark = pytest.mark.detectron2


@pytest.mark.parametrize("refresh", CHANGES)
def test_default_trainer_in_all_modes(detectron2_cfg, refresh):
    """Nobody asked for a hook: the package is imported, and the model has RefBN."""
    detectron2_cfg.merge_from_list(["MODEL.REFBN.REFRESH", refresh, "SOLVER.MAX_ITER", 4])
    trainer = trainer_of(detectron2_cfg)
    rows = []
    trainer.model.backbone.bottom_up.stem.register_forward_pre_hook(
        lambda module, args: rows.append((len(args[0]), torch.is_grad_enabled()))
    )
    trainer.train()
    hook = hook_of(trainer)
    assert [type(h).__name__ for h in trainer._hooks][:2] == ["IterationTimer", type(hook).__name__]
    images = hook.reference.identity["images"]
    assert len(images) == 4 and hook.reference.identity["dataset"] == "tiny_train"
    changed = [not equal(x, y) for x, y in pairwise([*trainer.captured, *trainer.keep.seen])]
    assert changed == CHANGES[refresh]
    trained = {"concat": [4, 2, 2, 4]}.get(refresh, [2, 2, 2, 2])  # with a slice of 2 in it
    beside = {  # without gradient: the capture of 4 and what refreshes
        "static": [4], "full": [4, 4], "slice": [4, 2, 2],
        "concat": [4, 2, 2],  # the norms of the heads
    }[refresh]  # fmt: skip
    assert [n for n, gradient in rows if gradient] == trained
    assert [n for n, gradient in rows if not gradient] == beside


def test_the_capture_is_of_the_reference_images_and_touches_nothing_else(detectron2_cfg):
    """The stem's moments are those of the chosen images, through the loader's own mapper."""
    import numpy as np
    from detectron2.data import DatasetCatalog, DatasetMapper
    from detectron2.utils.events import EventStorage

    detectron2_cfg.merge_from_list(["MODEL.REFBN.REFRESH", "static", "INPUT.RANDOM_FLIP", "none"])
    trainer = trainer_of(detectron2_cfg)
    model = trainer.model
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist()
    torch.manual_seed(5)
    np.random.seed(5)
    with EventStorage(7) as trainer.storage:
        hook_of(trainer).before_train()
        assert trainer.storage.latest() == {}  # no losses of the capture
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == expected
    changed = {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    assert changed == set(references(model))

    ids = [image["image_id"] for image in hook_of(trainer).reference.identity["images"]]
    by_id = {d["image_id"]: d for d in DatasetCatalog.get("tiny_train")}
    mapper = DatasetMapper(detectron2_cfg, is_train=True)
    with torch.no_grad():
        batch = model.preprocess_image([mapper(by_id[i]) for i in ids]).tensor
        conv = model.backbone.bottom_up.stem.conv1
        y = nn.functional.conv2d(batch, conv.weight, stride=2, padding=3)
    torch.testing.assert_close(conv.norm.ref_mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        conv.norm.ref_var, y.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-3
    )


def test_a_resumed_run_goes_on_with_the_same_reference(detectron2_cfg, tmp_path):
    straight = trainer_of(detectron2_cfg)
    straight.train()
    state = torch.load(tmp_path / "output/model_0000003.pth", weights_only=True)
    saved = state["trainer"]["hooks"]["ReferenceBatchHook"]
    assert saved["dataset"] == "tiny_train" and len(saved["images"]) == 4
    assert saved["position"] == 0  # 2 slices of 2: 4 images, once around

    (tmp_path / "output/last_checkpoint").write_text("model_0000003.pth")
    resumed = trainer_of(detectron2_cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4
    loaded = references(resumed.model)
    resumed.train()
    reference = hook_of(resumed).reference
    assert reference.identity == hook_of(straight).reference.identity
    assert equal(loaded, straight.keep.seen[3])  # the checkpoint is written with the step's commit
    assert equal(resumed.keep.seen[0], loaded)  # and nothing is captured again


def test_a_resumed_run_whose_images_changed_stops(detectron2_cfg, tiny_shapes, tmp_path):
    trainer_of(detectron2_cfg).train()
    path = tmp_path / "output/model_final.pth"
    state = torch.load(path)
    image = state["trainer"]["hooks"]["ReferenceBatchHook"]["images"][1]
    image["fingerprint"] = "0" * 16
    torch.save(state, path)
    detectron2_cfg.SOLVER.MAX_ITER = 10
    resumed = trainer_of(detectron2_cfg)
    resumed.resume_or_load(resume=True)
    with pytest.raises(ValueError, match=rf"{image['file_name']}\) of tiny_train has changed"):
        resumed.train()


def test_a_checkpoint_of_bn_is_resumed_with_a_new_reference(detectron2_cfg, caplog, tmp_path):
    detectron2_cfg.merge_from_list(["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"])
    detectron2_cfg.merge_from_list(
        ["MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN"]
    )
    bn = trainer_of(detectron2_cfg)
    assert "ReferenceBatchHook" not in [type(hook).__name__ for hook in bn._hooks]
    bn.train()
    detectron2_cfg.merge_from_list(["MODEL.RESNETS.NORM", "RefBN", "SOLVER.MAX_ITER", 9])
    resumed = trainer_of(detectron2_cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert "names no reference batch; a new one is taken" in caplog.text
    assert len(hook_of(resumed).reference.identity["images"]) == 4


def test_ones_own_hook_takes_the_place_of_the_other(detectron2_cfg):
    from detectron2.data import DatasetCatalog, DatasetMapper

    from refbn_d2.plugin.hook import ReferenceBatchHook

    trainer = trainer_of(detectron2_cfg)
    automatic = hook_of(trainer)
    options = RefBNOptions(0.5, gradient="pooled", refresh="slice", num_images=3, slice_size=1)
    images = DatasetCatalog.get("tiny_val")
    mapper = DatasetMapper(detectron2_cfg, is_train=True)
    own = ReferenceBatchHook(options, images, mapper)
    trainer.register_hooks([own])
    assert hook_of(trainer) is own is not automatic
    trainer.train()
    names = {image["file_name"] for image in own.reference.identity["images"]}
    assert len(names) == 3 and names <= {d["file_name"].split("/")[-1] for d in images}
    assert {(m.reference_weight, m.gradient) for _, m in refbn_layers(trainer.model)} == {
        (0.5, "pooled")
    }
    with pytest.raises(ValueError, match="dataset and mapper together"):
        ReferenceBatchHook(dataset=images)


def test_a_plain_loop(detectron2_cfg):
    from detectron2.data import build_detection_train_loader
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    from refbn_d2.plugin.hook import reference_batch

    model = build_model(detectron2_cfg)
    loader = build_detection_train_loader(detectron2_cfg)
    reference = reference_batch(
        model, loader, refbn_options(detectron2_cfg), detectron2_cfg.DATASETS.TRAIN
    )
    reference.begin()
    first = references(model)
    with EventStorage() as storage:
        for data, iteration in zip(loader, range(2), strict=False):
            reference.before_step(iteration)
            sum(model(data).values()).backward()
            reference.after_step()
        assert "fast_rcnn/cls_accuracy" in storage.latest()
    assert reference.identity["dataset"] == "tiny_train"
    assert not equal(first, references(model))


def test_lazyconfigs_trainer(detectron2_cfg):
    """SimpleTrainer, without cfg: its defaults, and each layer's own weight and gradient."""
    from detectron2.data import build_detection_train_loader
    from detectron2.engine import SimpleTrainer, hooks
    from detectron2.modeling import build_model

    detectron2_cfg.merge_from_list(["MODEL.REFBN.REFERENCE_WEIGHT", 0.6])
    model = build_model(detectron2_cfg)
    loader = build_detection_train_loader(detectron2_cfg)
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), 0.001))
    trainer.register_hooks([hooks.IterationTimer()])
    hook = hook_of(trainer)
    with pytest.raises(ValueError, match="NUM_IMAGES is 32, but the training set has 24"):
        trainer.train(0, 1)
    hook.options = RefBNOptions(num_images=4, slice_size=2, reference_weight=0.6)
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), 0.001))
    trainer.register_hooks([hook])
    trainer.train(0, 2)
    assert hook.reference.position == 2
    assert {layer.reference_weight for _, layer in refbn_layers(model)} == {0.6}


def test_a_loader_of_streams_is_refused_with_the_way_out(detectron2_cfg):
    from refbn_d2.plugin.hook import reference_batch

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {}

    model = nn.Sequential(RefBatchNorm2d(3))
    for loader in (torch.utils.data.DataLoader(Stream()), iter([])):
        with pytest.raises(TypeError, match="ReferenceBatchHook.dataset=..., mapper=..."):
            reference_batch(model, loader, RefBNOptions())


def test_an_image_that_the_mapper_drops_is_named(detectron2_cfg, monkeypatch):
    from detectron2.data import build_detection_train_loader

    from refbn_d2.plugin.hook import reference_batch

    loader = build_detection_train_loader(detectron2_cfg, mapper=lambda dataset_dict: None)
    with pytest.raises(ValueError, match=r"no sample for .*\.png, an image of the reference"):
        reference_batch(
            nn.Sequential(RefBatchNorm2d(3)), loader, RefBNOptions(num_images=3, slice_size=1)
        )


def test_beside_precise_bn_and_evaluation(detectron2_cfg, tmp_path):
    """All of Detectron2's hooks at once; running statistics are PreciseBN's at the end."""
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import COCOEvaluator

    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, name):
            return COCOEvaluator(name, output_dir=cfg.OUTPUT_DIR)

    detectron2_cfg.merge_from_list(
        ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3, "TEST.EVAL_PERIOD", 4]
    )
    trainer = Trainer(detectron2_cfg)
    seen = []
    precise = next(h for h in trainer._hooks if type(h).__name__ == "PreciseBN")
    update = precise.update_stats

    def watched():
        before = references(trainer.model)
        update()
        assert equal(before, references(trainer.model))  # its batches are no reference
        seen.append(trainer.iter)

    precise.update_stats = watched
    trainer.train()
    assert seen == [3, 7]
    lines = [json.loads(line) for line in open(tmp_path / "output/metrics.json")]
    assert any("bbox/AP" in line for line in lines) and any("total_loss" in line for line in lines)


def test_retinanet_keeps_its_loss_normaliser_in_a_capture(detectron2_cfg):
    """Its head passes over five levels, and its losses are divided by an average that it keeps."""
    detectron2_cfg.merge_from_list(
        [
            "MODEL.META_ARCHITECTURE", "RetinaNet",
            "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
            "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
            "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"],
            "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]],
            "MODEL.RETINANET.NORM", "RefBN", "MODEL.RETINANET.NUM_CLASSES", 12,
            "MODEL.RETINANET.NUM_CONVS", 1, "MODEL.MASK_ON", False, "SOLVER.MAX_ITER", 4,
        ]
    )  # fmt: skip
    trainer = trainer_of(detectron2_cfg)
    normalizers = []
    original = trainer.run_step

    def step():
        normalizers.append(getattr(trainer.model, "loss_normalizer", None))
        original()

    trainer.run_step = step
    trainer.train()
    assert normalizers[0] is None and len(set(normalizers)) == 4
    per_level = [m for n, m in refbn_layers(trainer.model) if n.startswith("head.")]
    assert len(per_level) == 2 * 5 and all(m.ref_count > 0 for m in per_level)
    counts = [int(m.ref_count) for m in per_level[:5]]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_a_head_without_rois_takes_its_first_batch_that_is_not_empty(detectron2_cfg, caplog):
    """Images of no object leave the mask head without RoIs."""
    from detectron2.data import DatasetCatalog, DatasetMapper

    from refbn_d2.plugin.hook import ReferenceBatchHook

    caplog.set_level(logging.WARNING)
    mapper = DatasetMapper(detectron2_cfg, is_train=True)
    empty = [{**d, "annotations": []} for d in DatasetCatalog.get("tiny_train")[:4]]
    trainer = trainer_of(detectron2_cfg)
    options = RefBNOptions(refresh="static", num_images=4)
    trainer.register_hooks([ReferenceBatchHook(options, empty, mapper)])
    trainer.train()
    assert "did not reach roi_heads.mask_head.mask_fcn1.norm" in caplog.text
    layer = trainer.model.roi_heads.mask_head.mask_fcn1.norm
    assert layer.ref_count > 0 and layer.ref_mean.any()


def test_a_line_is_logged_once_where_root_has_handlers_too(monkeypatch):
    from refbn_d2.plugin.hook import _log_as_detectron2

    lines = {"detectron2": [], "root": []}
    for name, seen in lines.items():
        handler = logging.Handler()
        handler.emit = lambda record, seen=seen: seen.append(record.getMessage())
        monkeypatch.setattr(
            logging.getLogger(name if name != "root" else None), "handlers", [handler]
        )
    ours = logging.getLogger("refbn_d2")
    monkeypatch.setattr(ours, "handlers", [])
    for logger in (ours, logging.getLogger("detectron2")):
        monkeypatch.setattr(logger, "propagate", logger is ours)
    monkeypatch.setattr(ours, "level", ours.level)
    _log_as_detectron2()
    logging.getLogger("refbn_d2.reference.batch").warning("once")
    assert lines == {"detectron2": ["once"], "root": []}
