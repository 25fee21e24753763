import errno
import json
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from refbn_d2.data import shapes
from refbn_d2.data.shapes import CLASSES, DOMAINS, dataset
from refbn_d2.utils.errors import DataError
from tests.data.shapes.helpers import SIZE, SMALL, command, files, load

# ---- the COCO files


def test_files_hold_what_is_drawn(small):
    for image in load(small)["images"]:
        scene = shapes.draw_detection(3, "val", image["id"] - 1, SIZE)
        assert (cv2.imread(str(small / "val" / image["file_name"])) == scene.image).all()
        assert image["domain"] == scene.domain


def test_coco_loads_and_agrees_with_the_masks(small, capsys):
    path = small / "annotations" / "instances_val.json"
    coco = COCO(path)
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert coco.getCatIds() == list(range(1, len(CLASSES) + 1))
    assert len(coco.getImgIds()) == 14 and min(coco.getAnnIds()) == 1
    for image in coco.loadImgs(coco.getImgIds()):
        scene = shapes.draw_detection(3, "val", image["id"] - 1, SIZE)
        found = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert [a["category_id"] - 1 for a in found] == scene.labels
        for annotation, mask in zip(found, scene.masks, strict=True):
            rasterised = coco.annToMask(annotation).astype(bool)
            assert (rasterised & mask).sum() / (rasterised | mask).sum() == 1
            assert annotation["area"] == cv2.countNonZero(mask.astype(np.uint8))
            assert tuple(annotation["bbox"]) == cv2.boundingRect(mask.astype(np.uint8))
            assert annotation["iscrowd"] == 0
    info = coco.dataset["info"]
    assert (info["version"], info["seed"], info["size"]) == (shapes.VERSION, 3, [128, 128])


@pytest.mark.parametrize("split", ["train", "val"])
def test_domains_part_the_images(small, split):
    whole = load(small, split)
    parts = [load(small, f"{split}_{domain}") for domain in DOMAINS]
    for key in ("images", "annotations"):
        rows = sorted((row for part in parts for row in part[key]), key=lambda row: row["id"])
        assert rows == whole[key]
    for domain, part in zip(DOMAINS, parts, strict=True):
        assert {image["domain"] for image in part["images"]} == {domain}
        assert part["categories"] == whole["categories"]


def test_other_sizes(tmp_path):
    folder = shapes.make_detection(tmp_path, size=(64, 96), num_train=1, num_val=1)
    (image,) = load(folder)["images"]
    assert (image["height"], image["width"]) == (64, 96)
    assert cv2.imread(str(folder / "val" / image["file_name"])).shape == (64, 96, 3)


@pytest.mark.parametrize("bad", [{"size": 32}, {"size": (1, 2, 3)}, {"num_val": 0}, {"seed": -1}])
def test_bad_parameters(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        shapes.make_detection(tmp_path, **bad)
    assert not list(tmp_path.iterdir())


# ---- making the folder


def test_made_once(small):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    assert shapes.make_detection(small.parent, **SMALL) == small
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before


def test_default_is_what_shapes_train_means(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(dataset, "_make", lambda *args: seen.append(args))
    shapes.ensure_detection(tmp_path)
    shapes.make_classification(tmp_path)
    assert seen == [
        ("detection", tmp_path, 0, 128, 4000, 500),
        ("classification", tmp_path, 0, 64, 6000, 1200),
    ]


def test_two_makers_at_once(tmp_path, small):
    makers = [command(tmp_path), command(tmp_path)]
    for maker in makers:
        assert maker.wait() == 0, maker.stderr.read()
    made = files(tmp_path / "shapes")
    assert made.pop(Path("contact_sheet.png"))
    assert made == files(small)  # the same in any process
    assert os.listdir(tmp_path) == ["shapes"]


def test_the_later_maker_discards_its_own(tmp_path, monkeypatch):
    kind = folder, smallest, write, num_json = dataset._KINDS["detection"]
    first = []

    def overtaken(folder, info):
        monkeypatch.setitem(dataset._KINDS, "detection", kind)
        first.append(shapes.make_detection(tmp_path, **SMALL).stat().st_ino)
        write(folder, info)

    monkeypatch.setitem(dataset._KINDS, "detection", (folder, smallest, overtaken, num_json))
    folder = shapes.make_detection(tmp_path, **SMALL)
    assert [folder.stat().st_ino] == first
    assert os.listdir(tmp_path) == ["shapes"]


def test_interrupted_maker_leaves_nothing(tmp_path, monkeypatch):
    folder, smallest, write, num_json = dataset._KINDS["detection"]

    def fails(folder, info):
        write(folder, info)
        raise KeyboardInterrupt

    monkeypatch.setitem(dataset._KINDS, "detection", (folder, smallest, fails, num_json))
    with pytest.raises(KeyboardInterrupt):
        shapes.make_detection(tmp_path, **SMALL)
    assert not list(tmp_path.iterdir())


def drop_image(folder):
    (folder / "train" / "000005.png").unlink()


def drop_json(folder):
    (folder / "annotations" / "instances_val_noise.json").unlink()


def age(folder):
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps({**info, "version": "0"}))


@pytest.mark.parametrize("damage", [drop_image, drop_json, age])
def test_damaged_or_old_folder_is_made_anew(tmp_path, small, caplog, damage):
    folder = shapes.make_detection(tmp_path, **SMALL)
    damage(folder)
    assert files(folder) != files(small)
    assert shapes.make_detection(tmp_path, **SMALL) == folder
    assert files(folder) == files(small)
    assert os.listdir(tmp_path) == ["shapes"]
    assert "making it again" in caplog.text


def test_other_sets_are_not_replaced(small, tmp_path):
    before = files(small)
    with pytest.raises(FileExistsError, match=r"seed 3 \(asked for: 0\), .*num_train 28 "):
        shapes.ensure_detection(small.parent)
    assert files(small) == before
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="did not make it"):
        shapes.make_detection(tmp_path, **SMALL)
    assert (tmp_path / "shapes" / "mine.txt").read_text() == "precious"
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "shapes").write_text("a file")
    with pytest.raises(FileExistsError, match="did not make it"):
        shapes.make_detection(tmp_path / "file", **SMALL)


@pytest.mark.parametrize("make", [shapes.make_detection, shapes.make_classification])
@pytest.mark.parametrize("missing", ["root", "permission", "folder"])
def test_a_folder_of_data_sets_that_cannot_be_written(missing, make, tmp_path, monkeypatch):
    root = tmp_path / "datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    if missing == "folder":
        root.write_text("a file")
    elif missing == "permission":  # root may write everywhere, so that permissions do not matter
        root.mkdir()
        monkeypatch.setattr(tempfile, "mkdtemp", denied)
    else:
        monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(DataError, match=r"datasets \((Permission denied|File exists)\)") as error:
        make()
    assert str(root) in str(error.value) and "DETECTRON2_DATASETS to a folder" in str(error.value)
    assert "\n" not in str(error.value)


def denied(*arguments, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# ---- classification


def test_classification_folder(tmp_path):
    folder = shapes.make_classification(tmp_path, num_train=84, num_val=12)
    assert folder == tmp_path / "shapes_cls"
    found = sorted((folder / "train").glob("*/*.png"), key=lambda p: p.name)
    assert [p.name[:6] for p in found] == [f"{i:06d}" for i in range(84)]
    assert sorted(os.listdir(folder / "val")) == sorted(CLASSES)
    pairs = {(p.parent.name, p.stem[7:]) for p in found}
    assert pairs == {(name, domain) for name in CLASSES for domain in DOMAINS}
    for index in (0, 29, 83):
        name, domain = found[index].parent.name, found[index].stem[7:]
        scene = shapes.draw_classification(0, "train", index, (64, 64), domain=domain)
        assert (cv2.imread(str(found[index])) == scene.image).all()
        assert [CLASSES[label] for label in scene.labels] == [name]
    found[0].unlink()
    shapes.make_classification(tmp_path, num_train=84, num_val=12)
    assert found[0].exists()


def test_a_classification_files_name_tells_its_domain(tmp_path):
    folder = shapes.make_classification(tmp_path, size=32, num_train=84, num_val=1)
    names = sorted(path.name for path in folder.glob("train/*/*"))
    turns = [shapes.domain_of(f"some/where/{name}") for name in names[::12]]
    assert turns == list(shapes.DOMAINS)
    for other in ("n01440764_10026.JPEG", "plain_7.png", "a_plains.png"):
        assert shapes.domain_of(other) is None
