"""Corruptions: strength grows with the severity, results are reproducible, odd pictures work."""

import io
import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from refbn_d2.data import corruptions
from refbn_d2.data.corruptions import CORRUPTIONS, SEVERITIES, SUBSET, corrupt
from refbn_d2.utils.errors import DataError


def scene(side, seed=0):
    """Return a picture with edges and texture of many scales, mid gray on average."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((side, side, 3), np.float32)
    for cells in (3, 7, 15, side // 2):
        picture += cv2.resize(rng.normal(0, 22, (cells, cells, 3)).astype(np.float32), (side, side))
    picture = np.clip(picture + 120, 0, 255).astype(np.uint8)
    for _ in range(6):
        x, y, radius = rng.integers(0, side, 3)
        cv2.circle(picture, (int(x), int(y)), int(radius) // 6 + 2, rng.uniform(40, 210, 3), -1)
    return picture


def distance(a, b):
    return np.sqrt(np.square(a.astype(float) - b).mean())


def lost_structure(a, b):
    """1 - correlation of the gradients, which ignores a change of brightness or contrast"""

    def gradients(x):
        x = x.astype(np.float32).mean(axis=2)
        return np.stack([cv2.Sobel(x, -1, 1, 0), cv2.Sobel(x, -1, 0, 1)]).ravel()

    a, b = gradients(a), gradients(b)
    return 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def test_there_are_15_in_four_families():
    assert CORRUPTIONS == (
        *("gaussian_noise", "shot_noise", "impulse_noise"),
        *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness"),
        *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    )
    assert [corruptions._REGISTRY[name].family for name in SUBSET] == [
        *("noise", "blur", "weather", "digital")
    ]


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("side", [32, 160])
def test_strength_grows_with_the_severity(name, side):
    # The authors make fog stronger with finer clouds, which hide more at the same distance.
    measure = lost_structure if name == "fog" else distance
    strength = np.mean(
        [[measure(p, corrupt(p, name, s, i)) for s in SEVERITIES]
         for i, p in enumerate(scene(side, seed) for seed in range(8))],
        axis=0,
    )  # fmt: skip
    assert strength[0] > (1e-3 if name == "fog" else 1)
    assert (np.diff(strength) > 0).all(), strength


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_function_of_its_arguments_only(name):
    picture = scene(100)
    kept = picture.copy()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = corrupt(picture, name, 3, 5)
    np.random.seed(1), random.seed(1)
    changed = random.getstate(), np.random.get_state()[1].tolist()
    np.testing.assert_array_equal(first, corrupt(picture, name, np.int64(3), [5]))
    assert changed == (random.getstate(), np.random.get_state()[1].tolist())
    assert states[2] == torch.get_rng_state().tolist()
    np.testing.assert_array_equal(picture, kept)
    random_ones = set(CORRUPTIONS) - {
        *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    }
    assert (first != corrupt(picture, name, 3, 6)).any() == (name in random_ones)
    assert (first != corrupt(picture, name, 3, [5, 1])).any() == (name in random_ones)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_shape(name):
    """Find noise that wraps around, an index outside the picture, a lost channel."""
    for shape in [
        (1, 1),
        (1, 1, 1),
        (1, 1, 3),
        (1, 40, 3),
        (40, 1),
        (2, 3, 3),
        (7, 5, 1),
        (97, 130),
    ]:
        picture = np.full(shape, 130, np.uint8)
        for severity in (1, 5):
            with np.errstate(all="raise"):
                got = corrupt(picture, name, severity, 0)
            assert (got.shape, got.dtype) == (shape, np.uint8)
            if name.endswith(("blur", "_transform", "pixelate", "contrast")):
                assert np.abs(got.astype(int) - 130).max() <= 1  # a plain picture stays plain


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_stay_finite(name, value):
    with np.errstate(all="raise"):
        assert corrupt(np.full((20, 20, 3), value, np.uint8), name, 4, 0).shape == (20, 20, 3)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"jpeg_compression"}))
def test_gray_is_three_equal_channels(name):
    """If the pattern has no color, a gray picture gives the same result in color."""
    gray = scene(60)[..., 0]
    flat = corrupt(gray, name, 3, 2)
    np.testing.assert_array_equal(flat, corrupt(gray[..., None], name, 3, 2)[..., 0])
    if not name.endswith("_noise") and name != "frost":
        colored = corrupt(np.repeat(gray[..., None], 3, axis=2), name, 3, 2)
        assert np.abs(colored.astype(int) - flat[..., None]).max() <= 1


def test_layout_in_memory_does_not_matter():
    picture = scene(50)
    flipped = np.ascontiguousarray(picture[::-1, :, ::-1])[::-1, :, ::-1]  # negative strides
    flipped.flags.writeable = False
    for name in CORRUPTIONS:
        np.testing.assert_array_equal(corrupt(picture, name, 2, 1), corrupt(flipped, name, 2, 1))


def test_noise_has_the_stated_moments():
    picture = np.full((200, 200, 3), 128, np.uint8)
    noise = corrupt(picture, "gaussian_noise", 2, 0) - 128.0
    assert abs(noise.mean()) < 0.5 and noise.std() == pytest.approx(0.12 * 255, rel=0.02)
    shots = corrupt(picture, "shot_noise", 2, 0) / 255
    x = 128 / 255
    assert shots.mean() == pytest.approx(x, rel=0.01)
    assert shots.var() == pytest.approx(x / 25, rel=0.04)  # less what is clipped at 1
    impulses = corrupt(picture, "impulse_noise", 5, 0)
    assert set(np.unique(impulses)) == {0, 128, 255}
    assert (impulses == 0).mean() == pytest.approx(0.135, rel=0.05)
    assert (impulses == 255).mean() == pytest.approx(0.135, rel=0.05)


@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur", "zoom_blur"])
def test_blur_keeps_objects_in_place(name):
    """The center of mass of a spot stays, so that annotated boxes stay correct."""
    picture = np.zeros((161, 161, 3), np.uint8)
    picture[76:85, 76:85] = 255
    for seed in range(3):
        got = corrupt(picture, name, 5, seed)[..., 0].astype(float)
        rows, columns = np.indices(got.shape)
        center = (got * rows).sum() / got.sum(), (got * columns).sum() / got.sum()
        assert center == pytest.approx((80, 80), abs=0.3)
        assert (got > 0).sum() > 2 * 81


def test_jpeg_is_what_pillow_writes():
    picture = scene(100)
    for image, mode in ((picture, "RGB"), (picture[..., 0], "L")):
        file = io.BytesIO()
        Image.fromarray(image, mode=None).save(file, "JPEG", quality=15)
        expected = Image.open(file)
        assert expected.mode == mode
        np.testing.assert_array_equal(
            corrupt(image, "jpeg_compression", 3, 0), np.asarray(expected)
        )


def test_brightness_raises_the_value_and_keeps_the_hue():
    picture = np.array([[[100, 50, 20], [0, 0, 0], [255, 10, 10]]], np.uint8)
    got = corrupt(np.repeat(picture, 100, axis=0).repeat(40, axis=1), "brightness", 2, 0)
    more = round(0.2 * 255)  # by the definition of HSV: all channels times (V + more) / V
    by_hand = [[100 + more, 50 * (100 + more) / 100, 20 * (100 + more) / 100]]
    by_hand += [[more, more, more], [255, 10, 10]]
    np.testing.assert_allclose(got[0, ::40], by_hand, atol=0.6)


def test_contrast_and_pixelate_by_hand():
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[:, 50:] = 200
    # 100 +- 0.4 * 100
    np.testing.assert_array_equal(np.unique(corrupt(picture, "contrast", 1, 0)), [60, 140])
    pixelated = corrupt(scene(100), "pixelate", 5, 0)  # a quarter of the resolution
    blocks = pixelated.reshape(25, 4, 25, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    mean = scene(100).reshape(25, 4, 25, 4, 3).mean(axis=(1, 3))
    assert np.abs(blocks[:, 0, :, 0] - mean).max() <= 0.51


def test_fog_and_snow_by_their_extremes():
    """Clouds span 0-1, so fog on a plain x spans x^2 / (x + thickness) to x."""
    fog = corrupt(np.full((120, 100, 3), 204, np.uint8), "fog", 1, 0)
    assert fog.min() == round(255 * 0.8**2 / (0.8 + 1.5)) and fog.max() == 204
    snow = corrupt(np.full((120, 100, 3), 51, np.uint8), "snow", 1, 0)
    bleached = 0.8 * 0.2 + 0.2 * (1.5 * 0.2 + 0.5)  # between the flakes
    assert snow.min() == round(255 * bleached) and snow.max() > 200


def test_small_pictures_take_small_severities():
    large, small = np.full((96, 200), 128, np.uint8), np.full((95, 200), 128, np.uint8)
    assert corrupt(large, "gaussian_noise", 5, 0).std() > 60
    assert 20 < corrupt(small, "gaussian_noise", 5, 0).std() < 30


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "rain"}, "corruption 'rain' is unknown; choose from gaussian_noise, shot"),
        ({"severity": 0}, "severity 0 of fog is not allowed"),
        ({"severity": 6}, "severity 6"),
        ({"severity": 2.5}, "severity 2.5"),
        ({"seed": -1}, "seed -1 is not allowed"),
        ({"seed": [1, "a"]}, r"seed \[1, 'a'\]"),
        ({"seed": None}, "seed None"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, "is float32"),
        ({"image": [[1]]}, "is list"),
        ({"image": np.zeros((4, 4, 4), np.uint8)}, r"\(4, 4, 4\).*without transparency"),
        ({"image": np.zeros((4, 4, 2), np.uint8)}, r"shape \(4, 4, 2\)"),
        ({"image": np.zeros(4, np.uint8)}, r"shape \(4,\)"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, "has no pixels"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"image": scene(40), "name": "fog", "severity": 1, "seed": 0}
    with pytest.raises(DataError, match=message):
        corrupt(**{**good, **change})
