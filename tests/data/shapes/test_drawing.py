import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

import refbn_d2
from refbn_d2.data import shapes
from refbn_d2.data.shapes import CLASSES, DOMAINS, dataset, drawing
from refbn_d2.data.shapes.__main__ import main

SIZE = (128, 128)
SMALL = {"seed": 3, "num_train": 28, "num_val": 14}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return shapes.make_detection(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture(scope="module")
def scenes():
    return [shapes.draw_detection(7, "train", i, SIZE) for i in range(140)]


def load(folder, name="val"):
    return json.loads((folder / "annotations" / f"instances_{name}.json").read_text())


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(root, *more):
    env = {**os.environ, "PYTHONPATH": str(Path(refbn_d2.__file__).parents[1])}
    argv = [sys.executable, "-m", "refbn_d2.data.shapes", "--root", str(root), "--seed", "3"]
    argv += ["--train", "28", "--val", "14", *more]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# Equal on every machine


def test_fingerprint():
    """Compare pixels and annotations with these hashes, made on another machine.

    If you change the generator, they change: raise shapes.VERSION too.
    """
    digest = {"detection": hashlib.sha256(), "classification": hashlib.sha256()}
    for i in range(2 * len(DOMAINS)):
        for kind, draw in (
            ("detection", shapes.draw_detection(0, "val", i, SIZE)),
            ("classification", shapes.draw_classification(0, "train", 13 * i, (64, 64))),
        ):
            polygons = [shapes.polygons(m) for m in draw.masks]
            digest[kind].update(draw.image.tobytes())
            digest[kind].update(json.dumps([draw.domain, draw.labels, polygons]).encode())
    assert shapes.VERSION == "1"
    assert digest["detection"].hexdigest()[:16] == "896a77b8fed4daaf"
    assert digest["classification"].hexdigest()[:16] == "e3c96569ed1d9a8f"


def test_tables_are_far_from_rounding_ties():
    """The last digit of a libm cannot change a rounded sine or vertex."""
    sines = np.sin(np.deg2rad(np.arange(360))) * 2**14
    sines = sines[np.abs(sines - np.rint(sines)) > 1e-6]  # 0, 1/2 and 1 are whole
    points = [10 * np.array(c).ravel() for contours in shapes.OUTLINES.values() for c in contours]
    values = np.concatenate([sines, *points])
    assert np.abs(values - np.floor(values) - 0.5).min() > 1e-6


def test_files_hold_what_is_drawn(small):
    for image in load(small)["images"]:
        scene = shapes.draw_detection(3, "val", image["id"] - 1, SIZE)
        assert (cv2.imread(str(small / "val" / image["file_name"])) == scene.image).all()
        assert image["domain"] == scene.domain


def test_seeds_splits_and_images_differ():
    draws = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 7)]
    images = [shapes.draw_detection(*d, SIZE).image for d in draws]
    images += [shapes.draw_classification(*d, SIZE).image for d in draws]
    assert len({image.tobytes() for image in images}) == 8


# Rasterizing and tracing


@pytest.mark.parametrize("degrees", [0, 30, 135])
@pytest.mark.parametrize("diameter", [24, 80])
def test_areas_of_drawn_shapes(diameter, degrees):
    want = {"circle": math.pi / 4, "ring": math.pi / 4 * 0.64, "square": 0.78**2}
    want["triangle"] = 3 * 3**0.5 / 16
    for name, share in want.items():
        contours = drawing._pose(CLASSES.index(name), diameter, 256, degrees)
        mask = drawing._fill(np.zeros((100, 100), np.uint8), contours, 1, 800, 800)
        assert mask.sum() == pytest.approx(share * diameter**2, rel=2.5 / diameter)
        assert mask[50, 50] == (name != "ring")
        narrow = drawing._pose(CLASSES.index(name), diameter, 128, degrees)
        half = drawing._fill(np.zeros((100, 100), np.uint8), narrow, 1, 800, 800)
        if name != "ring":
            assert half.sum() == pytest.approx(mask.sum() / 2, rel=3 / diameter)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_polygons_give_any_mask_back(density):
    """COCO's union is exact: holes, diagonal contacts, parts inside holes, pixels at the border."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((17, 23)) < density
        flats = shapes.polygons(mask)
        rle = mask_api.merge(mask_api.frPyObjects(flats, 17, 23))
        assert (mask_api.decode(rle) == mask).all()
        area = 0
        for flat in flats:
            x, y = np.array(flat).reshape(-1, 2).T
            area += abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
            assert len(flat) >= 8
        assert area == mask.sum()  # a hole has the opposite direction of its outer contour
        assert len(flats) == cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1


def test_polygons_of_parts_and_holes():
    mask = np.zeros((20, 20), bool)
    mask[1:4, 1:9] = mask[10:19, 5:9] = True
    assert shapes.polygons(mask)[1] == [1, 1, 1, 4, 9, 4, 9, 1]
    assert len(shapes.polygons(mask)) == 2
    mask[12, 6] = False
    (flat,) = (flat for flat in shapes.polygons(mask) if [5, 10] == flat[:2])
    points = list(zip(flat[0::2], flat[1::2], strict=True))
    assert points[:5] == [(5, 10), (5, 19), (9, 19), (9, 10), (5, 10)]  # and back to the first
    assert points[5] == points[9]  # around the hole
    assert set(points[5:]) == {(6, 12), (6, 13), (7, 12), (7, 13)} and len(points) == 10


# The COCO files


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
            rasterized = coco.annToMask(annotation).astype(bool)
            assert (rasterized & mask).sum() / (rasterized | mask).sum() == 1
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


# What the images show


def test_every_class_size_and_number(scenes):
    counts = np.bincount([label for scene in scenes for label in scene.labels])
    assert len(counts) == len(CLASSES) and counts.min() > 0.5 * counts.mean()
    numbers = [len(scene.masks) for scene in scenes]
    assert min(numbers) == 1 and max(numbers) == drawing.MAX_OBJECTS
    sides = [
        max(cv2.boundingRect(mask.view(np.uint8))[2:]) for scene in scenes for mask in scene.masks
    ]
    assert np.quantile(sides, 0.15) < 20 and np.quantile(sides, 0.9) > 50 and max(sides) > 70
    assert min(mask.sum() for scene in scenes for mask in scene.masks) >= drawing.MIN_AREA


def hidden_share(scenes):
    """Return the share of convex shapes that are concave after occlusion."""
    convex = [CLASSES.index(name) for name in ("circle", "triangle", "square", "pentagon")]
    solidity = []
    for scene in scenes:
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            if label in convex and mask.sum() > 150:
                points = np.argwhere(mask)
                corners = np.concatenate([points + [i, j] for i in (0, 1) for j in (0, 1)])
                hull = cv2.convexHull(corners.astype(np.int32))
                solidity.append(mask.sum() / cv2.contourArea(hull))
    assert len(solidity) > 50
    return np.mean(np.array(solidity) < 0.8)


def test_occlusion(scenes, monkeypatch):
    assert hidden_share(scenes) > 0.1
    for scene in scenes:
        assert np.sum(scene.masks, axis=0).max() == 1  # the visible parts share no pixel
    monkeypatch.setattr(drawing, "MIN_VISIBLE", 0.95)
    assert hidden_share([shapes.draw_detection(7, "train", i, SIZE) for i in range(140)]) == 0


def statistics(images):
    """Return mean (3,), deviation and root mean square of horizontal differences of each image."""
    images = images.astype(float)
    edges = (np.diff(images, axis=2) ** 2).mean(axis=(1, 2, 3)) ** 0.5
    return images.mean(axis=(1, 2)), images.std(axis=(1, 2)).mean(axis=1), edges


def test_domains_shift_statistics():
    scenes = {
        d: [shapes.draw_detection(5, "val", i, SIZE, domain=d) for i in range(24)] for d in DOMAINS
    }
    for d in DOMAINS:  # the domain changes the light, not the scene
        for scene, plain in zip(scenes[d], scenes["plain"], strict=True):
            assert (scene.labels, scene.domain) == (plain.labels, d)
            assert all((a == b).all() for a, b in zip(scene.masks, plain.masks, strict=True))
    images = {d: np.stack([s.image for s in scenes[d]]) for d in DOMAINS}
    mean, deviation, edges = statistics(images["plain"])
    shift = {d: statistics(images[d]) for d in DOMAINS}
    assert (images["inverted"] == 255 - images["plain"]).all()
    assert mean.mean() < 105  # plain is dark, so inverting it moves the mean
    assert (shift["lighting"][0] < 0.6 * mean).all()
    assert (shift["palette"][0] - mean)[:, 2].mean() > 50
    assert (shift["palette"][0] - mean)[:, 1].mean() < -15
    assert (shift["blur"][0] - mean).mean() > 20
    assert (shift["blur"][2] < 0.6 * edges).all()
    assert (shift["noise"][2] > 2.5 * edges).all()
    assert (shift["contrast"][1] < 0.4 * deviation).all()
    # The statistics of single images tell every pair of domains apart, as in batches of one.
    vectors = {d: np.column_stack([s[0], s[1], np.log(s[2])]) for d, s in shift.items()}
    scale = np.concatenate(list(vectors.values())).std(axis=0)
    for i, a in enumerate(DOMAINS):
        for b in DOMAINS[:i]:
            gap = np.abs(vectors[a].mean(axis=0) - vectors[b].mean(axis=0)) / scale
            assert gap.max() > 0.6, (a, b)


@pytest.mark.parametrize("domain", DOMAINS)
def test_objects_stand_out_in_every_domain(domain):
    """A person can see the object: it differs from its surroundings by more than a few levels."""
    kernel = np.ones((3, 3), np.uint8)
    gaps = []
    for i in range(60):
        scene = shapes.draw_classification(2, "val", i, (64, 64), domain=domain)
        mask = scene.masks[0].astype(np.uint8)
        inside = cv2.erode(mask, kernel).astype(bool)
        around = cv2.dilate(mask, kernel, iterations=4) - cv2.dilate(mask, kernel, iterations=2)
        image = scene.image.astype(float)
        gaps.append(np.abs(image[inside].mean(axis=0) - image[around > 0].mean(axis=0)).max())
    assert np.quantile(gaps, 0.05) > 5


def color_p_value(colors, labels):
    """Return how often shuffled labels separate colors (n, 3) as well as these labels do."""

    def between(order):
        counts = np.bincount(order)[:, None]
        sums = np.stack([np.bincount(order, c) for c in colors.T], axis=1)
        return (counts * (sums / counts - colors.mean(axis=0)) ** 2).sum()

    rng = np.random.default_rng(0)
    found = between(labels)
    return np.mean([between(rng.permutation(labels)) >= found for _ in range(400)])


def test_color_does_not_depend_on_the_class():
    colors, textures, labels = [], [], []
    kernel = np.ones((3, 3), np.uint8)
    for i in range(720):
        scene = shapes.draw_classification(1, "train", i, (64, 64), domain="plain")
        inside = cv2.erode(scene.masks[0].astype(np.uint8), kernel, iterations=2).astype(bool)
        if inside.any():  # inside the outline, which covers more of a thin shape
            colors.append(scene.image[inside].mean(axis=0))
            textures.append(scene.image[~scene.masks[0]].mean(axis=0))
            labels.append(scene.labels[0])
    colors, backgrounds, labels = np.array(colors), np.array(textures), np.array(labels)
    assert np.bincount(labels).min() > 50
    assert color_p_value(colors, labels) > 0.02
    assert color_p_value(backgrounds, labels) > 0.02
    leak = np.random.default_rng(0).normal(0, 25, (len(CLASSES), 3))[labels]
    assert color_p_value(colors + leak, labels) < 0.01  # the test detects a leak


# Making the folder


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
def test_damaged_or_old_folder_is_made_again(tmp_path, small, caplog, damage):
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


# Classification


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


def test_classification_object_is_large_and_near_the_middle():
    for index in range(60):
        (mask,) = shapes.draw_classification(0, "val", index, (64, 64)).masks
        y, x = np.argwhere(mask).mean(axis=0)
        assert (
            math.hypot(x - 31.5, y - 31.5) < 32
            and max(cv2.boundingRect(mask.view(np.uint8))[2:]) >= 16
        )


def test_a_classification_files_name_has_its_domain(tmp_path):
    folder = shapes.make_classification(tmp_path, size=32, num_train=84, num_val=1)
    names = sorted(path.name for path in folder.glob("train/*/*"))
    turns = [shapes.domain_of(f"some/where/{name}") for name in names[::12]]
    assert turns == list(shapes.DOMAINS)
    for other in ("n01440764_10026.JPEG", "plain_7.png", "a_plains.png"):
        assert shapes.domain_of(other) is None


# Command line


@pytest.mark.parametrize("more", [[], ["--classification", "--size", "64x48"]])
def test_command_writes_a_contact_sheet(tmp_path, more, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    sheet = tmp_path / "pictures" / "sheet.png"
    main(["--train", "1", "--val", "84", "--contact-sheet", str(sheet), *more])
    height, width = (64, 48) if more else SIZE
    assert cv2.imread(str(sheet)).shape == (7 * (2 * height + 2), 90 + 8 * (2 * width + 2), 3)
    assert os.listdir(sheet.parent) == ["sheet.png"]
    assert str(sheet) in capsys.readouterr().out
    assert os.listdir(tmp_path / "data") == ["shapes_cls" if more else "shapes"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--size", "8"], "64 pixels or more"),
        (["--size", "axb"], "--size"),
        (["--seed", "4"], "seed 3"),
    ],
)
def test_command_errors(small, capsys, argv, message):
    with pytest.raises(SystemExit) as error:
        main(["--root", str(small.parent), "--train", "28", "--val", "14", *argv])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
