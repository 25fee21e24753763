"""Parts, sets without a domain, and corrupted copies of a study's sets."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from refbn_d2.config import get_cfg
from refbn_d2.config.pretrain import get_pretrain_cfg
from refbn_d2.data.corruptions import corrupt
from refbn_d2.study.data import sets_of
from refbn_d2.study.sampling import stratified
from refbn_d2.study.spec import load_study
from refbn_d2.utils.errors import ConfigError, DataError


def detection(content, written, folder, **data):
    content["data"] |= data
    study, cfg = load_study(written(content)), get_cfg()
    cfg.merge_from_list([item for pair in study.overrides.items() for item in pair])
    return sets_of(study, cfg, folder)


def ids(dataset):
    return [image["id"] for image in json.loads(dataset.json_file.read_text())["images"]]


def test_stratified():
    groups = list("a" * 60 + "b" * 30 + "c" * 10)
    chosen = stratified(groups, 20)
    assert Counter(groups[i] for i in chosen) == {"a": 12, "b": 6, "c": 2}
    assert chosen == sorted(set(chosen)) == stratified(groups, 20) != stratified(groups, 20, 1)
    assert stratified(groups, 0) == stratified(groups, 500) == list(range(100))


def test_whole_sets_are_used_as_they_are(coco, content, written, tmp_path):
    sets = detection(content, written, tmp_path / "out")
    sets.make([None])
    assert not (tmp_path / "out").exists()
    assert sets.train_set(None).json_file == coco / "train.json"
    assert sets.test.json_file == coco / "val.json"


def test_a_domain_held_out(coco, content, written, tmp_path):
    sets = detection(content, written, tmp_path / "out")
    sets.make([None, "night"])
    held = sets.train_set("night")
    assert ids(held) == [10, 11, 14, 15, 18, 19]
    content_of = json.loads(held.json_file.read_text())
    assert {a["image_id"] for a in content_of["annotations"]} == set(ids(held))
    with pytest.raises(ConfigError, match="hold_out 'nigth' is not a domain.*mean 'night'"):
        sets.make(["nigth"])


def test_a_set_that_is_registered_in_vain(content, written, tmp_path):
    content["overrides"] |= {"DATASETS.TRAIN": ["shapes_train"], "DATASETS.TEST": ["shapes_val"]}
    with pytest.raises(
        ConfigError, match=r"register\.mine(_val)?: .* DATASETS\.TRAIN .*shapes_train"
    ):
        detection(content, written, tmp_path / "out").make([None])


def test_data_that_is_not_there(coco, content, written, tmp_path):
    (coco / "val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.json does not exist; .*DETECTRON2_DATASETS"):
        detection(content, written, tmp_path / "out").digests()


def test_tuning_leaves_the_test_set_alone(coco, content, written, tmp_path):
    sets = detection(content, written, tmp_path / "out", tuning=0.25, train_images=6)
    sets.make([None])
    train, test = ids(sets.train_set(None)), ids(sets.test)
    assert (len(train), len(test)) == (6, 3) and not set(train) & set(test)
    assert set(train + test) <= set(range(10, 22))
    assert sets.test.image_root == coco / "train"
    sets = detection(content, written, tmp_path / "all", tuning=0.25, train_images=0)
    sets.make([None])
    assert sorted(ids(sets.train_set(None)) + ids(sets.test)) == list(range(10, 22))


def test_corrupted_pictures_without_an_object(coco, content, written, tmp_path):
    file = coco / "val.json"
    empty = json.loads(file.read_text()) | {"annotations": []}
    file.write_text(json.dumps(empty))
    content["evaluate"] = {"corruptions": {"names": ["fog"], "severities": [1], "images": 4}}
    with pytest.raises(DataError, match="val.json: the 4 pictures for the corruptions have no obj"):
        detection(content, written, tmp_path / "out").make([None])


def test_corrupted_pictures(coco, content, written, tmp_path):
    content["evaluate"] = {
        "corruptions": {"names": ["fog", "contrast"], "severities": [2, 4], "images": 4}
    }
    sets = detection(content, written, tmp_path / "out")
    sets.make([None])
    assert list(sets.corrupted) == ["fog/2", "fog/4", "contrast/2", "contrast/4"]
    made = json.loads(sets.corrupted["fog/4"].json_file.read_text())
    assert len(made["images"]) == 4 and len(made["annotations"]) == 4
    for place, image in enumerate(made["images"]):
        source = np.asarray(Image.open(coco / "val" / f"{image['id'] - 10}.png"))
        path = sets.corrupted["fog/4"].image_root / image["file_name"]
        want = corrupt(source, "fog", 4, [0, place])
        assert np.array_equal(np.asarray(Image.open(path)), want)
        assert not np.array_equal(want, source)
    before = path.stat().st_mtime_ns
    sets.make([None])
    assert path.stat().st_mtime_ns == before


def test_bad_data(coco, content, written, tmp_path):
    content["evaluate"] = {"domains": True}
    sets = detection(content, written, tmp_path / "out")
    for part in ("train", "val"):
        (coco / part / "5.png").rename(coco / "away.png")
        with pytest.raises(FileNotFoundError, match=rf"{part}.json: 1 of \d+ pictures .*5.png"):
            sets.make([None])
        sets.make([])  # no run needs them
        (coco / "away.png").rename(coco / part / "5.png")
    whole = json.loads((coco / "train.json").read_text())
    train = json.loads((coco / "train.json").read_text())
    del train["images"][3]["domain"]
    (coco / "train.json").write_text(json.dumps(train))
    with pytest.raises(DataError, match=r"image 13 \(3.png\) has no 'domain'"):
        sets.make([None])
    val = json.loads((coco / "val.json").read_text())
    val["images"][1]["domain"] = ["night"]
    (coco / "train.json").write_text(json.dumps(whole))
    (coco / "val.json").write_text(json.dumps(val))
    with pytest.raises(DataError, match=r"val.json: image 11 \(1.png\) has no 'domain'; eval"):
        sets.make([None])
    (coco / "train.json").write_text(json.dumps(train | {"images": []}))
    with pytest.raises(DataError, match="train.json.* list of images is empty"):
        sets.make([None])
    (coco / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match="DETECTRON2_DATASETS"):
        sets.make([None])
    content["overrides"]["DATASETS.TRAIN"] = ["nowhere"]
    with pytest.raises(ConfigError, match="DATASETS.TRAIN: no data set is called 'nowhere'"):
        detection(content, written, tmp_path / "out").train_set(None)


@pytest.fixture
def classification(tmp_path, written, request, monkeypatch):
    """Return a study of 24 + 8 pictures in 2 classes and 2 domains."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 24), ("val", 8)):
        for i in range(number):
            path = tmp_path / part / "ab"[i % 2] / f"{i}_{('plain', 'noise')[i // 2 % 2]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path.parent))

    def make(**more):
        config = request.config.rootpath / "configs/pretrain/shapes_resnet18_bn.yaml"
        content = {"task": "classification", "config": str(config), "seeds": [1],
                   "norms": {"BN": {}}, **more}  # fmt: skip
        cfg = get_pretrain_cfg()
        cfg.DATASETS.ROOT = tmp_path.name
        return sets_of(load_study(written(content)), cfg, tmp_path / "out")

    return make


def names(folder):
    return sorted(path.parent.name + "/" + path.name for path in folder.rglob("*.png"))


def test_classification_sets(classification, tmp_path):
    sets = classification(
        data={"train_images": 12},
        evaluate={
            "domains": True,
            "corruptions": {"names": ["contrast"], "severities": [5], "images": 4},
        },
    )
    sets.make([None, "noise"])
    data = tmp_path / "out" / "data"
    assert len(names(data / "train")) == 12
    assert {name[0] for name in names(data / "train")} == set("ab")
    assert all("plain" in name for name in names(data / "train_without_noise"))
    assert len(names(data / "clean")) == 4
    assert list(sets.evaluation()) == ["clean", "contrast/5", "domains"]
    assert sets.evaluation()["domains"] == str(tmp_path / "val")
    for clean, corrupted in zip(names(data / "clean"), names(data / "contrast_5"), strict=True):
        assert clean == corrupted
        pixels = [np.asarray(Image.open(data / s / clean), float) for s in ("clean", "contrast_5")]
        assert pixels[1].std() < 0.5 * pixels[0].std()
    overrides = sets.training("noise")
    assert overrides[overrides.index("DATASETS.TRAIN") + 1] == str(data / "train_without_noise")
    assert overrides[overrides.index("DATASETS.TEST") + 1] == "val"


def test_a_broken_picture_is_named_when_it_is_corrupted(classification, tmp_path):
    for path in (tmp_path / "val").glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"val: a/0_plain.png cannot be read: .*truncated"):
        classification(evaluate={"corruptions": {"names": ["fog"], "severities": [1]}}).make([None])


def test_fewer_corrupted_pictures_than_classes(classification):
    with pytest.raises(ConfigError, match="images: is 1; allowed: 0, or at least .* classes, 2"):
        classification(evaluate={"corruptions": {"images": 1}}).make([None])


def test_a_folder_without_pictures(classification, tmp_path):
    for path in (tmp_path / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(ConfigError, match="val holds no images"):
        classification(evaluate={"domains": True}).make([None])


def test_names_without_domains(classification, tmp_path):
    for path in (tmp_path / "val").rglob("*plain.png"):
        path.rename(path.with_name(path.name.replace("plain", "other")))
    with pytest.raises(DataError, match="the name of .*other.png has no domain"):
        classification(evaluate={"domains": True}).make([None])
