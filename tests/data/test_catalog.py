from pathlib import Path

import pytest

from refbn_d2.config import get_cfg
from refbn_d2.data import catalog, shapes
from refbn_d2.utils.errors import ConfigError


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty registry, and a root of datasets that nothing has been put into."""
    monkeypatch.setattr(catalog, "_registered", {})
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))


@pytest.mark.parametrize(
    "name, json_file, image_root",
    [
        ("coco_2014_train", "instances_train2014.json", "train2014"),
        ("coco_2014_val", "instances_val2014.json", "val2014"),
        ("coco_2014_minival", "instances_minival2014.json", "val2014"),
        ("coco_2014_minival_100", "instances_minival2014_100.json", "val2014"),
        ("coco_2014_valminusminival", "instances_valminusminival2014.json", "val2014"),
        ("coco_2017_train", "instances_train2017.json", "train2017"),
        ("coco_2017_val", "instances_val2017.json", "val2017"),
        ("coco_2017_val_100", "instances_val2017_100.json", "val2017"),
        ("coco_2017_test", "image_info_test2017.json", "test2017"),
        ("coco_2017_test-dev", "image_info_test-dev2017.json", "test2017"),
    ],
)
def test_coco_names(tmp_path, name, json_file, image_root):
    dataset = catalog.get(name)
    assert dataset.name == name
    assert dataset.json_file == tmp_path / "coco" / "annotations" / json_file
    assert dataset.image_root == tmp_path / "coco" / image_root
    assert not list(tmp_path.iterdir())


def test_root_is_read_when_asked(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    assert catalog.get("coco_2017_val").image_root == Path("elsewhere/coco/val2017")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert catalog.get("coco_2017_val").image_root == Path("datasets/coco/val2017")


@pytest.mark.parametrize("part", ["train", "val", "train_noise", "val_plain"])
def test_shapes_are_made_on_first_use(tmp_path, monkeypatch, part):
    made = []

    def ensure(root):
        made.append(root)
        return shapes.make_detection(root, num_train=7, num_val=7)

    monkeypatch.setattr(shapes, "ensure_detection", ensure)
    dataset = catalog.get(f"shapes_{part}")
    assert made == [tmp_path]
    assert dataset.json_file.is_file() and dataset.json_file.name == f"instances_{part}.json"
    assert len(list(dataset.image_root.glob("*.png"))) == 7
    assert dataset.image_root == tmp_path / "shapes" / part.split("_")[0]


def test_shapes_names():
    found = [name for name in catalog.names() if name.startswith("shapes_")]
    assert len(found) == 2 * (1 + len(shapes.DOMAINS))
    assert {f"shapes_val_{domain}" for domain in shapes.DOMAINS} < set(found)


def test_unknown_name():
    with pytest.raises(ConfigError) as error:
        catalog.get("coco_2017_trian")
    for part in ("coco_2017_trian", "coco_2017_train", "shapes_val_noise", "DATASETS.REGISTER"):
        assert part in str(error.value)


def test_own_data():
    catalog.register_coco_instances("mine", "a/b.json", Path("a/images"))
    catalog.register_coco_instances("mine", Path("a/b.json"), "a/images")
    assert catalog.get("mine") == catalog.Dataset("mine", Path("a/b.json"), Path("a/images"))
    assert "mine" in catalog.names()
    for other in (("a/c.json", "a/images"), ("a/b.json", "elsewhere")):
        with pytest.raises(ValueError, match="'mine' is already"):
            catalog.register_coco_instances("mine", *other)
    assert catalog.get("mine").json_file == Path("a/b.json")


def test_builtin_names_are_taken(tmp_path):
    own = catalog.get("coco_2017_val")
    catalog.register_coco_instances("coco_2017_val", own.json_file, own.image_root)
    for name in ("coco_2017_val", "shapes_train"):
        with pytest.raises(ValueError, match=f"{name}.* is already"):
            catalog.register_coco_instances(name, "a.json", "a")
    with pytest.raises(ValueError, match="non-empty"):
        catalog.register_coco_instances("", "a.json", "a")


def test_dataset_is_frozen():
    with pytest.raises(AttributeError):
        catalog.get("coco_2017_val").name = "other"


@pytest.mark.parametrize(
    "entry", ["name", ("name", "a.json"), ("name", 1, "images"), ("", "a", "b")]
)
def test_register_entries_are_checked(entry):
    cfg = get_cfg()
    cfg.DATASETS.REGISTER = (entry,)
    with pytest.raises(ValueError, match=r"DATASETS\.REGISTER holds"):
        catalog.register_from_config(cfg)
