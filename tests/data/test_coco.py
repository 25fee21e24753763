"""People's COCO files: what is repaired, what is refused, and what stays as it is."""

import json
import logging

import pycocotools.mask as mask_util
import pytest

from refbn_d2.data.coco import check_pictures, match_classes, read_class_names, read_coco
from refbn_d2.data.coco_annotations import _Repair
from refbn_d2.utils.errors import DataError
from tests.data.coco_files import coco, write

TRIANGLE = [10, 10, 30, 10, 30, 30]
AREA_OF_TRIANGLE = float(sum(range(20)))  # pixels


def read(tmp_path, content, **options):
    return read_coco(write(tmp_path, content), "mine", **options)


def changed(part="annotations", index=0, **values):
    content = coco()
    content[part][index].update(values)
    return content


def without(*keys):
    content = coco()
    for key in keys:
        del content["annotations"][0][key]
    return content


def test_a_correct_file_stays_as_it_is(tmp_path, caplog):
    content = coco()
    runs = {"size": [40, 60], "counts": [100, 20, 2280]}
    content["annotations"] += [
        {**content["annotations"][0], "id": 8, "iscrowd": 1, "segmentation": runs},
        {**content["annotations"][0], "id": 9, "bbox": [-0.5, 0, 61, 40.5], "score": "extra"},
    ]
    file = read(tmp_path, content)
    file.warn()
    assert file.content == content and file.repairs == {} and not caplog.records


def test_the_second_look_says_the_same_of_what_is_correct(tmp_path):
    content = coco()
    images = {image["id"]: image for image in content["images"]}
    for place, ann in enumerate(content["annotations"]):
        repairs = {}
        again = _Repair(place, ann, images, {3, 18}, "file", True, repairs).run()
        assert again == ann and repairs == {}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"iscrowd": "0"}, {"iscrowd": 0}),
        ({"iscrowd": "1"}, {"iscrowd": 1}),
        ({"iscrowd": False}, {"iscrowd": 0}),
        ({"iscrowd": None}, {"iscrowd": 0}),
        ({"iscrowd": 1.0}, {"iscrowd": 1}),
        ({"area": None}, {"area": AREA_OF_TRIANGLE}),
        ({"area": "400"}, {"area": 400}),
        ({"area": -1}, {"area": AREA_OF_TRIANGLE}),
        ({"area": [3]}, {"area": AREA_OF_TRIANGLE}),
        ({"area": None, "segmentation": None}, {"area": 400}),
        ({"bbox": ["10", 10, "20.5", 20]}, {"bbox": [10, 10, 20.5, 20]}),
        ({"bbox": None}, {"bbox": [10, 10, 20, 20]}),
        ({"bbox": [-5, 10, 20, 20]}, {"bbox": [0, 10, 15, 20]}),
        ({"segmentation": [[TRIANGLE]]}, {"segmentation": [TRIANGLE]}),
        ({"segmentation": TRIANGLE}, {"segmentation": [TRIANGLE]}),
        ({"segmentation": [[[10, 10], [30, 10], [30, 30]]]}, {"segmentation": [TRIANGLE]}),
        ({"segmentation": [[10, 10], [30, 10], [30, 30]]}, {"segmentation": [TRIANGLE]}),
        ({"segmentation": [TRIANGLE, [1, 2, 3, 4]]}, {"segmentation": [TRIANGLE]}),
        ({"segmentation": [list(map(str, TRIANGLE))]}, {"segmentation": [TRIANGLE]}),
        ({"id": "1"}, {"id": 1}),
        ({"id": None}, {"id": 4}),
        ({"id": 0}, {"id": 4}),
        ({"image_id": "7"}, {"image_id": 7}),
        ({"category_id": "18"}, {"category_id": 18}),
        ({"ignore": "0"}, {"ignore": 0}),
    ],
)
def test_what_can_be_understood_is_repaired(tmp_path, caplog, values, expected):
    file = read(tmp_path, changed(**values))
    got, original = file.content["annotations"][0], coco()["annotations"][0]
    for key, value in expected.items():
        assert got[key] == value and type(got[key]) is type(value)
    assert {k: got[k] for k in original if k not in {**values, **expected}} == {
        k: v for k, v in original.items() if k not in {**values, **expected}
    }
    file.warn()
    if values != {"ignore": "0"}:
        assert len(caplog.records) == 1 and "1 annotations" in caplog.records[0].getMessage()
    assert file.content["annotations"][1:] == coco()["annotations"][1:]


def test_fields_that_are_missing_are_filled_in(tmp_path):
    got = read(tmp_path, without("area", "iscrowd", "bbox", "id")).content["annotations"][0]
    oracle = mask_util.merge(mask_util.frPyObjects([TRIANGLE], 40, 60))
    assert got["area"] == mask_util.area(oracle) and got["iscrowd"] == 0
    assert got["bbox"] == [10, 10, 20, 20] and got["id"] == 4
    assert "segmentation" not in read(tmp_path, without("segmentation")).content["annotations"][0]


def test_what_is_left_out_is_not_in_the_truth(tmp_path):
    thin = {"bbox": [1, 1, 5, 1e-30]}
    for values in (
        {"bbox": [1, 1, 0, 5]},
        thin,
        {"segmentation": [[1, 2, 3, 4]]},
        {"image_id": 99},
    ):
        file = read(tmp_path, changed(**values))
        assert [ann["id"] for ann in file.content["annotations"]] == [2, 3]
        assert list(file.repairs.values()) == [[1]]


def test_masks_are_needed_where_they_are_trained(tmp_path):
    with pytest.raises(DataError, match=r"instances.json.*annotation 1 of image 7.*MASK_ON False"):
        read(tmp_path, without("segmentation"), masks=True)
    crowd = changed(iscrowd=1, segmentation=None)
    box = read(tmp_path, crowd, masks=True).content["annotations"][0]["segmentation"]
    assert box == [[10, 10, 30, 10, 30, 30, 10, 30]]


def test_sizes_as_text_and_extra_fields(tmp_path, caplog):
    content = changed("images", 0, height="60", width="40")
    file = read(tmp_path, content)
    assert file.content["images"][0] == coco()["images"][0]  # with its domain
    file.warn()
    assert "1 images had their size as text" in caplog.text and "(ids 9)" in caplog.text


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (changed("images", 0, id=None), "image number 0 ('b.jpg') has id None"),
        (changed("images", 0, file_name=None), "file_name None"),
        (changed("images", 0, height=10**9, width=10**9), "at most 2147483648"),
        (changed("categories", 0, name=None), "category 18 has name None"),
        (changed("categories", 0, id=[1]), "category number 0 ('dog') has id [1]"),
        (changed(image_id=None), "annotation 1 (number 0) has image_id None"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_cannot_be_understood_is_named(tmp_path, content, named):
    with pytest.raises(DataError) as error:
        read(tmp_path, content)
    assert named in str(error.value) and "instances.json" in str(error.value)


# ---- classes


def with_classes(*categories, used=None):
    content = coco()
    content["categories"] = [{"id": id, "name": name} for id, name in categories]
    for ann in content["annotations"]:
        ann["category_id"] = categories[0][0] if used is None else used
    return content


def test_classes_are_matched_by_name(tmp_path, caplog):
    file = read(tmp_path, coco())  # car 3, dog 18
    assert not match_classes(file, ["car", "dog"]) and file.content == coco()
    assert match_classes(file, ["dog", "cat", "car"])
    assert file.class_names() == ["dog", "cat", "car"] and file.id_map() == {1: 0, 2: 1, 3: 2}
    assert [ann["category_id"] for ann in file.content["annotations"]] == [1, 3, 1]
    assert "no objects of 'cat'" in caplog.text
    assert read_class_names(tmp_path / "instances.json", "mine") == ["car", "dog"]


def test_a_class_that_is_not_trained(tmp_path):
    file = read(tmp_path, coco())
    with pytest.raises(DataError, match=r"has objects of 'car'.*It has 'dog', 'cat'.*rename"):
        match_classes(file, ["dog", "cat"])
    unused = read(tmp_path, with_classes((5, "dog"), (0, "animals")))
    assert match_classes(unused, ["cat", "dog"])  # as some tools write a class of all classes
    assert {ann["category_id"] for ann in unused.content["annotations"]} == {2}


# ---- pictures


def test_missing_pictures_are_counted_and_named(tmp_path):
    (tmp_path / "here.png").touch()
    paths = [str(tmp_path / name) for name in ("here.png", "a.png", "b.png")]
    check_pictures([*paths[:1], "s3://bucket/c.png"], "set")
    with pytest.raises(FileNotFoundError, match=r"^set: 2 of 3 pictures do not exist: .*a\.png"):
        check_pictures(paths, "set")
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere does not exist"):
        check_pictures([str(tmp_path / "nowhere/a.png")], "set")
    with pytest.raises(FileNotFoundError):
        check_pictures([str(tmp_path / "a\0b/c.png")], "set")


def test_one_warning_counts_and_names(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    content = coco()
    first = content["annotations"][0]
    content["annotations"] += [{**first, "id": i, "area": None} for i in range(5, 15)]
    content["annotations"] += [{**first, "id": 20, "iscrowd": "1"}]
    file = read(tmp_path, content)
    file.warn()
    (message,) = caplog.messages
    assert "10 annotations had no usable" in message and "ids 5, 6, 7, 8, 9, ..." in message
    assert "1 annotations had numbers as text" in message and "(ids 20)" in message
    assert json.loads((tmp_path / "instances.json").read_text()) == content
