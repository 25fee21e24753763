"""RefBN in Detectron2: registered everywhere, or nowhere."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from refbn_d2.layers import RefBatchNorm2d

detectron2 = pytest.importorskip("detectron2.layers", reason="Detectron2 is not installed")
pytestmark = pytest.mark.detectron2

HOLDERS = (
    "detectron2.layers", "detectron2.layers.batch_norm", "detectron2.layers.aspp",
    "detectron2.layers.blocks", "detectron2.modeling.backbone.resnet",
    "detectron2.modeling.backbone.fpn", "detectron2.modeling.backbone.regnet",
    "detectron2.modeling.backbone.vit", "detectron2.modeling.meta_arch.retinanet",
    "detectron2.modeling.meta_arch.semantic_seg", "detectron2.modeling.roi_heads.box_head",
    "detectron2.modeling.roi_heads.mask_head",
)  # fmt: skip


@pytest.fixture
def plugin():
    from refbn_d2.plugin import registration as plugin

    yield plugin
    plugin.register()


def test_everyone_who_imported_get_norm_knows_it():
    for name in filter(importlib.util.find_spec, HOLDERS):  # release 0.6 has no vit
        norm = importlib.import_module(name).get_norm("RefBN", 6)
        assert type(norm) is RefBatchNorm2d and norm.num_features == 6, name
    assert type(detectron2.get_norm("BN", 6)).__name__ == "BatchNorm2d"
    assert isinstance(detectron2.get_norm("GN", 64), nn.GroupNorm)
    assert detectron2.get_norm("", 6) is detectron2.get_norm(None, 6) is None
    assert detectron2.get_norm(partial(RefBatchNorm2d, eps=0.1), 6).eps == 0.1
    with pytest.raises(KeyError, match="NoSuchNorm"):
        detectron2.get_norm("NoSuchNorm", 6)


def state_of_detectron2():
    """What registration changes."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog
    from detectron2.engine.train_loop import TrainerBase
    from detectron2.modeling import build_model
    from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

    return (
        detectron2.get_norm.__code__, build_model.__code__, RetinaNetHead.__init__,
        TrainerBase.register_hooks, get_cfg().dump(), DatasetCatalog.list(),
    )  # fmt: skip


def test_registration_is_done_once_and_undone_whole(plugin):
    registered = state_of_detectron2()
    plugin.register()
    assert state_of_detectron2() == registered
    plugin.unregister()
    original = state_of_detectron2()
    assert all(a != b for a, b in zip(registered, original, strict=True))
    with pytest.raises(KeyError, match="RefBN"):
        detectron2.get_norm("RefBN", 6)
    plugin.unregister()
    assert state_of_detectron2() == original
    plugin.register()
    assert isinstance(detectron2.get_norm("RefBN", 6), RefBatchNorm2d)


def other_arguments(norm, channels, device):
    return nn.BatchNorm2d(channels, device=device)


def no_dict(norm, out_channels):
    return nn.BatchNorm2d(out_channels)


def no_batch_norm(norm, out_channels):
    return {"BN": nn.Identity()}[norm]


@pytest.mark.parametrize(
    ("get_norm", "expected"),
    [
        (other_arguments, r"get_norm\(norm, out_channels\)"),
        (partial(no_dict), r"get_norm\(norm, out_channels\)"),
        (no_dict, "no 'RefBN' of its own"),
        (no_batch_norm, "to be a BatchNorm2d"),
    ],
)
def test_another_get_norm_is_refused_whole(plugin, monkeypatch, get_norm, expected):
    from detectron2.layers import batch_norm

    plugin.unregister()
    before = state_of_detectron2()
    monkeypatch.setattr(batch_norm, "get_norm", get_norm)
    with pytest.raises(plugin.PluginError, match=rf"Detectron2 \d.* expected .*{expected}"):
        plugin.register()
    assert state_of_detectron2() == before


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("detectron2.layers.batch_norm", "get_norm", r"get_norm\(norm, out_channels\)"),
        ("detectron2.modeling.meta_arch.build", "build_model", r"build_model\(cfg\)"),
        ("detectron2.data.build", "_train_loader_from_config", "_train_loader_from_config"),
        ("detectron2.engine.train_loop.TrainerBase", "register_hooks", r"register_hooks\(hooks\)"),
    ],
)
def test_a_detectron2_without_a_part_is_refused_whole(plugin, monkeypatch, module, name, expected):
    plugin.unregister()
    monkeypatch.delattr(f"{module}.{name}")
    with pytest.raises(plugin.PluginError, match=rf"expected .*{expected}.*Use Detectron2 0.6"):
        plugin.register()
    assert plugin._undo == []


def test_a_failure_half_way_leaves_nothing(plugin, monkeypatch):
    plugin.unregister()
    before = state_of_detectron2()
    monkeypatch.setattr(plugin, "_add_dataset", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plugin.register()
    assert state_of_detectron2() == before


# ---- data


def test_the_shapes_are_in_detectron2s_catalog(plugin, monkeypatch, tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from refbn_d2.data import shapes

    plugin.unregister()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(
        shapes, "ensure_detection",
        lambda root: shapes.make_detection(root, size=64, num_train=3, num_val=2),
    )  # fmt: skip
    plugin.register()
    assert not (tmp_path / "shapes").exists()  # made on first use
    dicts = DatasetCatalog.get("shapes_val")
    json_file = tmp_path / "shapes/annotations/instances_val.json"
    metadata = MetadataCatalog.get("shapes_val")
    assert metadata.evaluator_type == "coco" and metadata.json_file == str(json_file)
    assert metadata.thing_classes == list(shapes.CLASSES)
    assert [Path(d["file_name"]).parent for d in dicts] == [tmp_path / "shapes/val"] * 2
    plugin.unregister()


def test_registered_data_may_not_change_its_files(detectron2_cfg, tiny_shapes):
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    from refbn_d2.plugin import registration as plugin

    val = tiny_shapes / "shapes/annotations/instances_val.json"
    register_coco_instances("theirs", {}, str(val), str(tiny_shapes / "shapes/val"))
    detectron2_cfg.DATASETS.REGISTER = (("theirs", str(val), str(tiny_shapes / "shapes/val")),)
    try:
        plugin.register_datasets(detectron2_cfg)
        register_coco_instances("taken", {}, "elsewhere.json", "elsewhere")
        detectron2_cfg.DATASETS.REGISTER = (("taken", str(val), str(val.parent)),)
        with pytest.raises(ValueError, match="'taken' is a dataset of Detectron2's already .elsew"):
            plugin.register_datasets(detectron2_cfg)
    finally:
        for name in ("theirs", "taken"):
            DatasetCatalog.remove(name)
    assert Path(val).is_file()
