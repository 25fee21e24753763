import hashlib
import json
import math

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_api

from refbn_d2.data import shapes
from refbn_d2.data.shapes import CLASSES, DOMAINS, drawing
from tests.data.shapes.helpers import SIZE

# ---- the same on every machine


@pytest.mark.skipif(
    int(cv2.__version__.partition(".")[0]) < 5,
    reason="OpenCV 5 draws lines and outlines of one pixel differently",
)
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


def test_seeds_splits_and_images_differ():
    draws = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 7)]
    images = [shapes.draw_detection(*d, SIZE).image for d in draws]
    images += [shapes.draw_classification(*d, SIZE).image for d in draws]
    assert len({image.tobytes() for image in images}) == 8


# ---- masks and polygons


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


# ---- what the images show


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


def test_classification_object_is_large_and_near_the_middle():
    for index in range(60):
        (mask,) = shapes.draw_classification(0, "val", index, (64, 64)).masks
        y, x = np.argwhere(mask).mean(axis=0)
        assert (
            math.hypot(x - 31.5, y - 31.5) < 32
            and max(cv2.boundingRect(mask.view(np.uint8))[2:]) >= 16
        )
