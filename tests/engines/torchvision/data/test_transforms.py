"""The random draws of augmentations, and the transforms of pictures, masks and polygons."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from refbn_d2.config import get_cfg
from refbn_d2.engines.torchvision.data.transforms import (
    Crop,
    Flip,
    RandomCrop,
    RandomFlip,
    Resize,
    ResizeShortestEdge,
    build_augmentations,
    resized_shape,
)

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8)
MASK = np.random.default_rng(1).integers(0, 2, (30, 47), dtype=np.uint8)
TRANSFORMS = [
    Resize(30, 47, 45, 70),
    Resize(30, 47, 11, 17),
    Flip(30, 47, "horizontal"),
    Flip(30, 47, "vertical"),
    Crop(5, 3, 20, 31),
]


def config(*overrides):
    cfg = get_cfg()
    cfg.merge_from_list([*overrides])
    return cfg


def draws(augmentation, h, w, times=400):
    return [augmentation(np.random.default_rng([7, i]), h, w) for i in range(times)]


def star(rng, points=9, center=(20, 15), radius=14):
    """Return a concave polygon without self-intersection, (points, 2)."""
    angles = np.sort(rng.random(points)) * 2 * np.pi
    radii = radius * (0.3 + rng.random(points))
    return np.stack([center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)], 1)


def rasterize(polygons, h, w):
    rles = mask_util.frPyObjects([np.asarray(p).reshape(-1).tolist() for p in polygons], h, w)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


def area(xy):
    x, y = xy[:, 0], xy[:, 1]
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def test_resize_is_pils():
    resize = Resize(30, 47, 45, 70)
    want = Image.fromarray(PICTURE).resize((70, 45), Image.BILINEAR)
    np.testing.assert_array_equal(resize.picture(PICTURE), np.asarray(want))
    want = Image.fromarray(MASK).resize((70, 45), Image.NEAREST)
    np.testing.assert_array_equal(resize.mask(MASK), np.asarray(want))
    np.testing.assert_allclose(resize.points(np.array([[47.0, 30.0], [0, 0]])), [[70, 45], [0, 0]])


def test_an_unchanged_size_is_not_resampled():
    assert Resize(30, 47, 30, 47).picture(PICTURE) is PICTURE


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if not isinstance(t, Resize)])
def test_points_move_with_their_pixels(transform):
    """The center of a pixel moves to the center of the pixel of the same color."""
    centers = np.array([[x + 0.5, y + 0.5] for y in range(30) for x in range(47)])
    colors = PICTURE.reshape(-1, 3)
    picture = transform.picture(PICTURE)
    moved = transform.points(centers)
    h, w = picture.shape[:2]
    inside = ((moved >= 0) & (moved < (w, h))).all(axis=1)
    assert inside.sum() == h * w
    column, row = np.floor(moved[inside]).astype(int).T
    np.testing.assert_array_equal(picture[row, column], colors[inside])


@pytest.mark.parametrize("window", [Crop(10, 4, 12, 15), Crop(0, 0, 30, 20), Crop(18, 10, 9, 9)])
def test_a_cut_polygon_covers_what_is_left(window):
    for seed in range(40):
        xy = star(np.random.default_rng(seed))
        whole = rasterize([xy * 8], 30 * 8, 47 * 8)  # 8 times finer: borders weigh less
        want = whole[window.y0 * 8 :, window.x0 * 8 :][: window.h * 8, : window.w * 8]
        cut = window.polygon(xy)
        if not len(cut):
            assert want.mean() < 0.01
            continue
        got = rasterize([cut * 8], window.h * 8, window.w * 8)
        assert (got != want).mean() < 0.02
        assert (cut >= 0).all() and (cut <= (window.w, window.h)).all()
        assert area(cut) == pytest.approx(want.sum() / 64, abs=2.0)


def test_cutting_by_hand():
    square = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    inside = Crop(0, 0, 20, 20).polygon(square)
    np.testing.assert_array_equal(inside, square)
    corner = Crop(5, 5, 20, 20).polygon(square)
    assert sorted(map(tuple, corner)) == [(0, 0), (0, 5), (5, 0), (5, 5)]
    triangle = Crop(1, 0, 2, 1).polygon(np.array([[0.0, 0], [2, 0], [0, 2]]))
    assert sorted(map(tuple, triangle)) == [(0, 0), (0, 1), (1, 0)]
    for outside in (Crop(11, 0, 5, 5), Crop(10, 0, 5, 5), Crop(0, 50, 5, 5)):
        assert outside.polygon(square).shape == (0, 2)


@pytest.mark.parametrize(
    ("h", "w", "shortest", "longest", "want"),
    [
        (480, 640, 800, 1333, (800, 1067)),
        (640, 480, 800, 1333, (1067, 800)),
        (427, 640, 800, 1333, (800, 1199)),
        (100, 1000, 800, 1333, (133, 1333)),
        (800, 1000, 800, 1333, (800, 1000)),
        (1, 5000, 800, 1333, (1, 1333)),
    ],
)
def test_resized_shape(h, w, shortest, longest, want):
    assert resized_shape(h, w, shortest, longest) == want


def test_sizes_are_drawn():
    choice = ResizeShortestEdge((64, 96), 10**6, "choice")
    sizes = [t.new_h for t in draws(choice, 30, 47)]
    assert set(sizes) == {64, 96} and 150 < sizes.count(64) < 250
    sizes = [t.new_w for t in draws(ResizeShortestEdge((64, 70), 10**6, "range"), 47, 30)]
    assert set(sizes) == set(range(64, 71))
    assert ResizeShortestEdge((0,), 10, "choice")(None, 30, 47) is None


def test_every_second_image_is_flipped():
    flips = draws(RandomFlip("vertical"), 30, 47)
    assert set(flips) == {None, Flip(30, 47, "vertical")}
    assert 150 < flips.count(None) < 250


@pytest.mark.parametrize(
    ("kind", "size", "heights", "widths"),
    [
        ("relative", (0.5, 0.25), (15, 15), (12, 12)),
        ("relative_range", (0.5, 0.9), (15, 30), (42, 47)),
        ("absolute", (10, 100), (10, 10), (47, 47)),
        ("absolute_range", (10, 40), (10, 30), (10, 40)),
        ("absolute_range", (60, 90), (30, 30), (47, 47)),
    ],
)
def test_crops_are_drawn(kind, size, heights, widths):
    crops = draws(RandomCrop(kind, size), 30, 47)
    assert (min(c.h for c in crops), max(c.h for c in crops)) == heights
    assert (min(c.w for c in crops), max(c.w for c in crops)) == widths
    assert all(0 <= c.x0 <= 47 - c.w and 0 <= c.y0 <= 30 - c.h for c in crops)
    # every place is reached, up to the last
    assert {c.y0 for c in crops if c.h == 15} >= set(range(16)) or (kind, size) != (
        "relative",
        (0.5, 0.25),
    )


def test_order_and_keys():
    cfg = config(
        *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [8, 9]),
        *("INPUT.MIN_SIZE_TRAIN", (3, 5), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
        *("INPUT.MAX_SIZE_TRAIN", 7, "INPUT.RANDOM_FLIP", "vertical"),
        *("INPUT.MIN_SIZE_TEST", 11, "INPUT.MAX_SIZE_TEST", 13),
    )
    assert build_augmentations(cfg, True) == [
        RandomCrop("absolute", (8, 9)),
        ResizeShortestEdge((3, 5), 7, "range"),
        RandomFlip("vertical"),
    ]
    assert build_augmentations(cfg, False) == [ResizeShortestEdge((11,), 13, "choice")]
    assert len(build_augmentations(config("INPUT.RANDOM_FLIP", "none"), True)) == 1


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["INPUT.MIN_SIZE_TRAIN", ()], "INPUT.MIN_SIZE_TRAIN = ()"),
        (["INPUT.MIN_SIZE_TRAIN", (800, -1)], "INPUT.MIN_SIZE_TRAIN = (800, -1)"),
        (["INPUT.MIN_SIZE_TRAIN", (0.5,)], "INPUT.MIN_SIZE_TRAIN = (0.5,)"),
        (["INPUT.MAX_SIZE_TRAIN", 0], "INPUT.MAX_SIZE_TRAIN = 0"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "all"], "'choice' or 'range'"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "two sizes"),
        (["INPUT.RANDOM_FLIP", "both"], "INPUT.RANDOM_FLIP = 'both'"),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "half"], "INPUT.CROP.TYPE = 'half'"),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.5, 1.5]], "fractions in (0, 1]"),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.5]], "INPUT.CROP.SIZE = (0.5,)"),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute"], "two integers"),
        (
            *(
                ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range"]
                + ["INPUT.CROP.SIZE", [9, 8]],
            ),
            "smaller one first",
        ),
    ],
)
def test_a_wrong_value_is_named(overrides, named):
    with pytest.raises(ValueError) as error:
        build_augmentations(config(*overrides), True)
    assert named in str(error.value)


def test_test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"INPUT\.MIN_SIZE_TEST"):
        build_augmentations(config("INPUT.MIN_SIZE_TEST", -1), False)
    with pytest.raises(ValueError, match=r"INPUT\.MAX_SIZE_TEST"):
        build_augmentations(config("INPUT.MAX_SIZE_TEST", 0), False)


def in_detectron2(transform):
    T = pytest.importorskip("detectron2.data.transforms")
    if isinstance(transform, Resize):
        return T.ResizeTransform(transform.h, transform.w, transform.new_h, transform.new_w)
    if isinstance(transform, Crop):
        return T.CropTransform(transform.x0, transform.y0, transform.w, transform.h)
    if transform.direction == "horizontal":
        return T.HFlipTransform(transform.w)
    return T.VFlipTransform(transform.h)


@pytest.mark.detectron2
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_agree_with_detectron2(transform):
    theirs = in_detectron2(transform)
    np.testing.assert_array_equal(transform.picture(PICTURE), theirs.apply_image(PICTURE))
    np.testing.assert_array_equal(transform.mask(MASK), theirs.apply_segmentation(MASK))
    xy = star(np.random.default_rng(3))
    np.testing.assert_array_equal(transform.points(xy), theirs.apply_coords(xy.copy()))


@pytest.mark.detectron2
def test_cut_polygons_agree_with_detectron2():
    pytest.importorskip("shapely")
    window = Crop(10, 4, 12, 15)
    theirs = in_detectron2(window)
    for seed in range(40):
        xy = star(np.random.default_rng(seed))
        want = theirs.apply_polygons([xy.copy()])
        got = window.polygon(xy)
        assert bool(len(got)) == bool(want)
        if want:
            assert area(got) == pytest.approx(sum(map(area, want)), abs=1e-9)
            corners = np.concatenate(want)
            np.testing.assert_allclose(got.min(axis=0), corners.min(axis=0), atol=1e-9)
            np.testing.assert_allclose(got.max(axis=0), corners.max(axis=0), atol=1e-9)


@pytest.mark.detectron2
def test_shapes_agree_with_detectron2():
    T = pytest.importorskip("detectron2.data.transforms")
    rng = np.random.default_rng(0)
    for h, w in rng.integers(10, 2000, (3000, 2)).tolist():
        for shortest, longest in ((800, 1333), (640, 1333), (224, 300)):
            want = T.ResizeShortestEdge.get_output_shape(h, w, shortest, longest)
            assert resized_shape(h, w, shortest, longest) == want


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("relative", (0.5, 0.25)),
        ("relative_range", (0.3, 0.9)),
        ("absolute", (10, 100)),
        ("absolute_range", (10, 40)),
    ],
)
def test_crop_sizes_agree_with_detectron2(kind, size, monkeypatch):
    """Both get the same uniform numbers."""
    impl = pytest.importorskip("detectron2.data.transforms.augmentation_impl")
    ours, theirs = RandomCrop(kind, size), impl.RandomCrop(kind, size)
    for seed in range(50):
        twin = np.random.default_rng(seed)
        monkeypatch.setattr(np.random, "rand", twin.random)
        monkeypatch.setattr(np.random, "randint", twin.integers)
        want = theirs.get_crop_size((31, 47))
        assert ours.shape(np.random.default_rng(seed), 31, 47) == tuple(map(int, want))
