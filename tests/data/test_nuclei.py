"""The converter of nuclei, on small folders made here."""

import json
import logging
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image
from pycocotools.coco import COCO

from refbn_d2.data.nuclei import convert, domain_of, main
from refbn_d2.utils.errors import DataError

COLORS = {  # domain -> color of a picture, its size (H, W)
    "fluorescence_small": ((20, 20, 20), (40, 30)),
    "fluorescence_large": ((20, 20, 20), (257, 300)),
    "stain_purple": ((150, 80, 170), (40, 50)),
    "stain_white": ((230, 200, 230), (40, 50)),
    "brightfield": ((180, 180, 180), (40, 50)),
}


def write(folder, name, color=(20, 20, 20), size=(40, 30), masks=2, mode="RGBA"):
    """Write a case in the public layout; mask number k is a rectangle of 3 + k rows, 4 columns."""
    (folder / name / "images").mkdir(parents=True)
    (folder / name / "masks").mkdir()
    picture = np.full((*size, 3), color, np.uint8)
    for k in range(masks):
        mask = np.zeros(size, np.uint8)
        mask[2 : 5 + k, 6 * k + 1 : 6 * k + 5] = 255
        picture[mask > 0] = 90
        Image.fromarray(mask).save(folder / name / "masks" / f"{k}.png")
    image = Image.fromarray(picture).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.arange(size[0] * size[1]).astype(np.uint8).reshape(size)))
    image.save(folder / name / "images" / f"{name}.png")
    return folder / name


@pytest.fixture
def folder(tmp_path):
    """Write eight pictures of each domain, four of brightfield."""
    root = tmp_path / "stage1_train"
    for domain, (color, size) in COLORS.items():
        for k in range(4 if domain == "brightfield" else 8):
            write(root, f"{domain[:13]}{domain[-5:]}{k}", color, size, masks=1 + k % 3)
    (root / "README.txt").write_text("not a picture")
    (root / "__MACOSX").mkdir()
    return root


def load(out, split):
    return json.loads((out / f"{split}.json").read_text())


def test_a_folder_becomes_coco(folder, tmp_path):
    out = tmp_path / "a" / "out"
    counts = convert(folder, out)
    expected = {d: 3 if d == "brightfield" else 6 for d in COLORS}
    assert counts["train"] == expected
    assert counts["val"] == {d: 1 if d == "brightfield" else 2 for d in COLORS}
    assert sorted(p.name for p in out.iterdir()) == ["images", "train.json", "val.json"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no temporary files are left
    seen = Counter()
    for split in ("train", "val"):
        coco = COCO(out / f"{split}.json")
        assert coco.loadCats(coco.getCatIds()) == [{"id": 1, "name": "nucleus"}]
        assert sorted(coco.anns) == list(range(1, 1 + len(coco.dataset["annotations"])))
        for image in coco.dataset["images"]:
            seen[image["file_name"]] += 1
            case = folder / image["file_name"].removesuffix(".png")
            source = case / "images" / image["file_name"]
            assert (out / "images" / image["file_name"]).read_bytes() == source.read_bytes()
            assert Image.open(source).size == (image["width"], image["height"])
            assert image["domain"][:13] + image["domain"][-5:] == case.name[:-1]
            annotations = coco.imgToAnns[image["id"]]
            assert len(annotations) == len(list((case / "masks").iterdir()))
            for k, annotation in enumerate(annotations):
                mask = np.asarray(Image.open(case / "masks" / f"{k}.png")) > 0
                np.testing.assert_array_equal(coco.annToMask(annotation), mask)
                assert annotation["bbox"] == [6 * k + 1, 2, 4, 3 + k]
                assert annotation["area"] == 4 * (3 + k)
                assert annotation["iscrowd"] == 0
                assert pycocotools.mask.area(annotation["segmentation"]) == annotation["area"]
    assert len(seen) == 36 and set(seen.values()) == {1}  # each picture in one split


def test_the_seed_decides_the_split(folder, tmp_path):
    convert(folder, tmp_path / "a", seed=1)
    convert(folder, tmp_path / "b", seed=1)
    convert(folder, tmp_path / "c", seed=2)
    a, b, c = (load(tmp_path / name, "val") for name in "abc")
    assert a == b and a["images"] != c["images"]


@pytest.mark.parametrize("domain", COLORS)
def test_domains(domain):
    color, size = COLORS[domain]
    assert domain_of(np.full((*size, 3), color, np.uint8)) == domain


def test_domains_at_their_bounds():
    """Saturation of a plain color: 255 (1 - min / max); value: max."""

    def of(color, size=(20, 20)):
        return domain_of(np.full((*size, 3), color, np.uint8))

    assert of((100, 100, 95)) == "stain_purple"  # saturation 13
    assert of((110, 110, 105)) == "fluorescence_small"  # saturation 12
    assert of((111, 111, 106)) == "brightfield"
    assert of((201, 201, 143)) == "stain_white"  # saturation 74
    assert of((201, 201, 142)) == "stain_purple"  # saturation 75
    assert of((200, 200, 150)) == "stain_purple"
    assert of((9, 9, 9), (256, 700)) == "fluorescence_small"
    assert of((9, 9, 9), (700, 257)) == "fluorescence_large"


def test_gray_and_rgb_pictures_and_masks_of_any_mode(tmp_path):
    for k, mode in enumerate(["L", "RGB", "RGBA", "P"]):
        case = write(tmp_path / "in", f"{k}", mode=mode)
        for path in (case / "masks").iterdir():
            Image.open(path).convert({"L": "1", "P": "LA"}.get(mode, mode)).save(path)
    convert(tmp_path / "in", tmp_path / "out")
    annotations = [*load(tmp_path / "out", "train")["annotations"]]
    annotations += load(tmp_path / "out", "val")["annotations"]
    assert sorted(a["area"] for a in annotations) == [12] * 4 + [16] * 4


def test_overlapping_and_empty_masks_are_repaired_with_one_warning(tmp_path, caplog):
    case = write(tmp_path / "in", "a")
    write(tmp_path / "in", "b")
    first = case / "masks" / "0.png"
    shutil.copy(first, case / "masks" / "2.png")  # the same nucleus again
    wide = np.zeros((40, 30), np.uint8)
    wide[2:5, 1:25] = 255
    Image.fromarray(wide).save(case / "masks" / "3.png")
    Image.fromarray(0 * wide).save(case / "masks" / "4.png")
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "in", tmp_path / "out")
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("2 masks overlap") and "2 masks had no pixels" in message
    assert str(case / "masks" / "2.png") in message
    areas = {}
    for split in ("train", "val"):
        data = load(tmp_path / "out", split)
        (image,) = data["images"]
        areas[image["file_name"]] = [a["area"] for a in data["annotations"]]
    assert areas == {"a.png": [12, 16, 3 * 24 - 2 * 12], "b.png": [12, 16]}


def break_picture(case):
    path = case / "images" / f"{case.name}.png"
    path.write_bytes(path.read_bytes()[:60])
    return path


def break_mask(case):
    path = case / "masks" / "1.png"
    path.write_text("no picture")
    return path


def resize_mask(case):
    path = case / "masks" / "1.png"
    Image.open(path).resize((30, 41)).save(path)
    return f"{path} has 30 x 41 pixels, its picture has 30 x 40"


def remove_masks(case):
    shutil.rmtree(case / "masks")
    return f"{case / 'images' / case.name}.png has no masks"


def remove_picture(case):
    path = case / "images" / f"{case.name}.png"
    path.rename(path.with_name("other.png"))
    return f"{path} is missing"


@pytest.mark.parametrize(
    "damage", [break_picture, break_mask, resize_mask, remove_masks, remove_picture]
)
def test_bad_files_are_named_and_nothing_is_written(tmp_path, damage):
    write(tmp_path / "in", "a")
    expected = damage(write(tmp_path / "in", "b"))
    with pytest.raises(DataError) as error:
        convert(tmp_path / "in", tmp_path / "out")
    assert str(expected) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="in has no <image id>/images/<image id>.png"):
        convert(tmp_path / "in", tmp_path / "out")
    write(tmp_path / "in" / "stage1_train", "a")  # one level too high
    with pytest.raises(DataError, match="in has no <image id>/images"):
        convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="1 pictures, no two of one domain, are too few"):
        convert(tmp_path / "in" / "stage1_train", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out exists: remove it"):
        convert(tmp_path / "in" / "stage1_train", tmp_path / "out")


def test_command(tmp_path, capsys):
    for name in "abcd":
        write(tmp_path / "in", name)
    command = [sys.executable, "-m", "refbn_d2.data.nuclei", tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{tmp_path}/out/train.json: 3 pictures (3 fluorescence_small)",
        f"{tmp_path}/out/val.json: 1 pictures (1 fluorescence_small)",
    ]
    assert load(tmp_path / "out", "val")["info"]["generator"] == "refbn_d2.data.nuclei"
    with pytest.raises(SystemExit, match="error: .*out exists"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="error: .*out/train.json"):
        main([str(tmp_path / "in"), str(tmp_path / "out/train.json/out")])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "in"), str(tmp_path / "new"), "--seed", "-1"])
    assert "--seed is -1" in capsys.readouterr().err
