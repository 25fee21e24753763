"""COCO files become dataset dicts, or are refused."""

import copy
import json
import logging

import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from refbn_d2.config import get_cfg
from refbn_d2.data import catalog
from refbn_d2.engines.torchvision.data import (
    load_coco_json,
    load_test_dicts,
    load_train_dicts,
)

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def annotation(id, image_id=7, category_id=18, bbox=(10, 10, 20, 20), **more):
    box = list(bbox)
    return {
        **{"id": id, "image_id": image_id, "category_id": category_id, "bbox": box, "area": 400},
        **{"iscrowd": 0, "segmentation": [list(SQUARE)], **more},
    }


def coco():
    """Return two images and two classes, with ids that are neither sorted nor contiguous."""
    return {
        "images": [
            {"id": 9, "file_name": "b.jpg", "height": 60, "width": 40, "domain": "fog"},
            {"id": 7, "file_name": "a.jpg", "height": 40, "width": 60},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [
            annotation(1),
            annotation(2, image_id=9, category_id=3),
            annotation(3, bbox=(0, 0, 60, 40)),
        ],
    }


def write(tmp_path, content, name="instances.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def load(tmp_path, content, **options):
    return load_coco_json(write(tmp_path, content), tmp_path / "images", "mine", **options)


def error_of(tmp_path, content, **options):
    with pytest.raises(ValueError) as error:
        load(tmp_path, content, **options)
    assert str(tmp_path / "instances.json") in str(error.value)
    assert "mine" in str(error.value)
    return str(error.value)


def changed(part, index, **values):
    content = coco()
    content[part][index].update(values)
    return content


def without(part, index, key):
    content = coco()
    del content[part][index][key]
    return content


def test_agrees_with_pycocotools(tmp_path):
    dicts, class_names, id_map = load(tmp_path, coco())
    oracle = COCO(str(tmp_path / "instances.json"))
    assert id_map == {3: 0, 18: 1}
    assert class_names == ["car", "dog"]
    assert [d["image_id"] for d in dicts] == sorted(oracle.getImgIds())
    for d in dicts:
        image = oracle.loadImgs(d["image_id"])[0]
        assert (d["height"], d["width"]) == (image["height"], image["width"])
        assert d["file_name"] == str(tmp_path / "images" / image["file_name"])
        assert d.get("domain") == image.get("domain")
        expected = oracle.loadAnns(oracle.getAnnIds(imgIds=d["image_id"]))
        assert [a["id"] for a in d["annotations"]] == [a["id"] for a in expected]
        for got, want in zip(d["annotations"], expected, strict=True):
            assert got["bbox"] == want["bbox"]
            assert class_names[got["category_id"]] == oracle.cats[want["category_id"]]["name"]
            assert got["segmentation"] == want["segmentation"]
            assert got["iscrowd"] == 0


@pytest.mark.detectron2
def test_agrees_with_detectron2(tmp_path):
    detectron2_coco = pytest.importorskip("detectron2.data.datasets.coco")
    content = coco()
    counts = [100, 20, 2280]
    rle = {"size": [40, 60], "counts": counts}
    content["annotations"] += [
        annotation(4, iscrowd=1, segmentation=rle),
        annotation(5, segmentation=[SQUARE, [1, 2, 3, 4]]),
        annotation(6, segmentation=[[1, 2, 3, 4]]),
        annotation(8, segmentation=[]),
    ]
    ours, class_names, _ = load(tmp_path, content)
    theirs = detectron2_coco.load_coco_json(
        str(tmp_path / "instances.json"), str(tmp_path / "images"), "mine_detectron2"
    )
    for d in ours:
        d.pop("domain", None)
        for ann in d["annotations"]:
            del ann["id"]
    for d in theirs:
        for ann in d["annotations"]:
            assert ann.pop("bbox_mode") == 1
    assert ours == theirs


def test_boxes_are_clipped(tmp_path, caplog):
    content = coco()
    content["annotations"] = [
        annotation(1, bbox=(-5, 10, 20, 20)),  # 5 px out
        annotation(2, bbox=(50.5, -0.5, 10, 41)),  # half a pixel out
    ]
    dicts, _, _ = load(tmp_path, content)
    assert [a["bbox"] for a in dicts[0]["annotations"]] == [[0, 10, 15, 20], [50.5, 0, 9.5, 40]]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "1 annotations reach more than a pixel out" in warnings[0] and "ids 1" in warnings[0]


def test_what_cannot_be_learned_is_dropped_with_one_warning(tmp_path, caplog):
    content = coco()
    content["annotations"] = [annotation(1)]
    content["annotations"] += [annotation(i, bbox=(1, 1, 0, 5)) for i in range(2, 9)]
    content["annotations"] += [annotation(9, bbox=(1, 1, 5, 0.0))]
    content["annotations"] += [annotation(10, segmentation=[[1, 2, 3, 4]])]
    content["annotations"] += [annotation(11, image_id=12345)]
    dicts, _, _ = load(tmp_path, content)
    assert [[a["id"] for a in d["annotations"]] for d in dicts] == [[1], []]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    flat, pointless, stray = warnings[0].split(";")[0::2]
    assert "8 annotations have a box without width or height" in flat
    assert "ids 2, 3, 4, 5, 6, ..." in warnings[0]
    assert "1 annotations have no polygon" in pointless and "(ids 10)" in warnings[0]
    assert "1 annotations belong to no image" in stray and "(ids 11)" in warnings[0]


def test_run_lengths_are_compressed(tmp_path):
    runs = {"size": [40, 60], "counts": [100, 20, 2280]}
    content = changed("annotations", 0, segmentation=runs, iscrowd=1)
    dicts, _, _ = load(tmp_path, content)
    ann = dicts[0]["annotations"][0]
    assert ann["iscrowd"] == 1
    mask = mask_util.decode(ann["segmentation"])
    assert mask.shape == (40, 60)
    assert mask.T.reshape(-1).nonzero()[0].tolist() == list(range(100, 120))
    counts = ann["segmentation"]["counts"].decode()
    content = changed("annotations", 0, segmentation={"size": [40, 60], "counts": counts})
    again, _, _ = load(tmp_path, content)
    assert (mask_util.decode(again[0]["annotations"][0]["segmentation"]) == mask).all()


def test_whole_floats_are_sizes_too(tmp_path):
    dicts, _, _ = load(tmp_path, changed("images", 1, height=40.0))
    assert dicts[0]["height"] == 40 and isinstance(dicts[0]["height"], int)


def test_missing_file_names_the_ways_out(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_coco_json(tmp_path / "gone.json", tmp_path, "mine")
    for part in ("mine", "gone.json", "DETECTRON2_DATASETS", "DATASETS.REGISTER"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{ not json", "is not JSON"),
        ("[]", "images and categories and annotations (it holds list)"),
        ({"images": [], "categories": []}, "the list annotations"),
        ({"annotations": [], "info": {}}, "the list images and categories"),
        ({**coco(), "images": {}}, "lacks the list images"),
        ({**coco(), "images": []}, "list of images is empty"),
        ({**coco(), "categories": []}, "list of categories is empty"),
        ({**coco(), "annotations": []}, "no usable annotation in 2 images"),
        (without("images", 0, "height"), "image number 0 is broken (KeyError: 'height')"),
        ({**coco(), "images": [None]}, "image number 0"),
        (changed("images", 0, height=0), "image 9 (b.jpg) has height 0"),
        (changed("images", 0, width="4o"), "width '4o'"),
        (changed("images", 0, width=40.5), "width 40.5"),
        (changed("images", 0, id=7), "image id 7 is given to"),
        (changed("images", 0, id="7b"), "some ids are numbers and some are words"),
        (without("categories", 1, "name"), "category number 1"),
        (changed("categories", 1, id=18), "category id 18 is given to dog and to car"),
        ({**coco(), "annotations": [None]}, "annotation number 0 is None"),
        (without("annotations", 1, "image_id"), "annotation 2 (number 1) has no image_id"),
        (changed("annotations", 1, image_id=[9]), "annotation 2 (number 1) has image_id [9]"),
        (changed("annotations", 2, id=1), "1 annotation ids are used more than once: 1."),
        (changed("categories", 0, name="car"), "categories 18 and 3 are all called 'car'"),
        (changed("annotations", 0, ignore=1), '"ignore"'),
    ],
)
def test_a_broken_file_is_refused(tmp_path, content, named):
    assert named in error_of(tmp_path, content)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"category_id": 4}, "category_id 4"),
        ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3]"),
        ({"bbox": [1, 2, 3, 4, 5]}, "4 finite numbers"),
        ({"bbox": [], "segmentation": []}, "bbox []"),
        ({"bbox": None, "segmentation": None}, "bbox None"),
        ({"bbox": [1, 2, 3, "4 px"]}, "4 finite numbers"),
        ({"bbox": {"x": 1}}, "4 finite numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "4 finite numbers"),
        ({"iscrowd": 2}, '"iscrowd" = 2; allowed: 0 or 1'),
        ({"iscrowd": "maybe"}, "'maybe'"),
        ({"segmentation": [[[[0, 0, 9, 0, 9, 9]]]]}, "list of polygons"),
        ({"segmentation": [[0, 0, 1e7, 0, 9, 9]]}, "far outside"),
        ({"segmentation": {"size": [40, 60], "counts": "zz"}}, "do not add up"),
        ({"bbox": [float("nan"), 2, 3, 4]}, "nan"),
        ({"bbox": [1, 2, float("inf"), 4]}, "inf"),
        ({"bbox": [float("inf"), -float("inf"), 1, 1]}, "inf"),
        ({"bbox": [1, 2, -3, 4]}, "not negative"),
        ({"bbox": [60, 0, 5, 5]}, "wholly outside its picture of 60 x 40"),
        ({"bbox": [0, 40, 5, 5]}, "wholly outside"),
        ({"bbox": [-5, 0, 5, 5]}, "wholly outside"),
        ({"bbox": [0, -6, 5, 5]}, "wholly outside"),
        ({"segmentation": "mask.png"}, "list of polygons"),
        ({"segmentation": [[0, 0, 5, 5, 0, float("nan")]]}, "finite"),
        ({"segmentation": {"size": [60, 40], "counts": [2400]}}, "[40, 60]"),
        ({"segmentation": {"size": [40, 60]}}, "counts"),
        ({"segmentation": {"size": [40, 60], "counts": [10, 10]}}, "do not add up"),
        ({"segmentation": {"size": [40, 60], "counts": [2500, -100]}}, "do not add up"),
    ],
)
def test_a_broken_annotation_is_named_with_its_image(tmp_path, values, named):
    message = error_of(tmp_path, changed("annotations", 0, **values))
    assert "annotation 1 of image 7" in message and "a.jpg" in message
    assert named in message


def test_minival_may_repeat_annotation_ids(tmp_path):
    path = write(tmp_path, changed("annotations", 2, id=1), "instances_minival2014.json")
    dicts, _, _ = load_coco_json(path, tmp_path, "mine")
    assert len(dicts[0]["annotations"]) == 2


def test_a_test_set_needs_no_annotations(tmp_path, caplog):
    content = coco()
    del content["annotations"]
    dicts, class_names, _ = load(tmp_path, content, require_annotations=False)
    assert [d["annotations"] for d in dicts] == [[], []]
    assert "not scored" in caplog.text


@pytest.fixture
def cfg(tmp_path):
    """Return a config with the data sets one, two (the same) and other (a class renamed)."""
    other = coco()
    other["categories"][0]["name"] = "wolf"
    register = []
    for name, content in (("one", coco()), ("two", coco()), ("other", other)):
        path = write(tmp_path, content, f"{name}.json")
        register.append((f"{tmp_path.name}_{name}", str(path), str(tmp_path)))
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.REGISTER", register, "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    return cfg


def names(cfg, *which):
    return tuple(name for name, _, _ in cfg.DATASETS.REGISTER if name.rsplit("_")[-1] in which)


def test_training_sets_are_joined(cfg, tmp_path):
    cfg.DATASETS.TRAIN = names(cfg, "one", "two")
    data = load_train_dicts(cfg)
    assert [d["image_id"] for d in data.dicts] == [7, 9, 7, 9]
    assert data.class_names == ["car", "dog"] and data.id_map == {3: 0, 18: 1}
    assert data.json_file == tmp_path / "one.json"
    assert data.name == "+".join(cfg.DATASETS.TRAIN)


def test_a_test_set_is_loaded_by_name(cfg, tmp_path):
    data = load_test_dicts(cfg, names(cfg, "other")[0])
    assert data.json_file == tmp_path / "other.json" and data.class_names == ["car", "wolf"]
    assert [d["image_id"] for d in data.dicts] == [7, 9]


def test_joined_sets_need_the_same_classes(cfg):
    cfg.DATASETS.TRAIN = names(cfg, "one", "other")
    with pytest.raises(ValueError, match="(?s)_one and .*_other.*car, dog.*car, wolf"):
        load_train_dicts(cfg)


@pytest.mark.parametrize("train", [True, False])
def test_number_of_classes_must_agree(cfg, train):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.DATASETS.TRAIN = names(cfg, "one")
    with pytest.raises(ValueError, match=r"NUM_CLASSES = 80.*2 classes: car, dog.*NUM_CLASSES 2"):
        load_train_dicts(cfg) if train else load_test_dicts(cfg, cfg.DATASETS.TRAIN[0])


def test_masks_must_be_there_to_be_learned(cfg, tmp_path):
    content = coco()
    content["annotations"][0].update(iscrowd=1, segmentation=[])
    del content["annotations"][1]["segmentation"]
    write(tmp_path, content, "one.json")
    cfg.DATASETS.TRAIN = names(cfg, "one")
    load_train_dicts(cfg)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match=r"one\.json.*annotation 2 of image 9 .*MASK_ON False"):
        load_train_dicts(cfg)


def test_no_training_set_is_an_error():
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN"):
        load_train_dicts(get_cfg())


def test_registering_twice_is_harmless_and_takes_lists(cfg):
    again = copy.deepcopy(cfg)
    again.DATASETS.REGISTER = [list(entry) for entry in cfg.DATASETS.REGISTER]
    for each in (cfg, again, again):
        catalog.register_from_config(each)
    assert len(load_test_dicts(again, names(cfg, "one")[0]).dicts) == 2
