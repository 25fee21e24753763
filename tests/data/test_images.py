"""Pictures of all kinds become upright 8-bit RGB or BGR, or an error with the file's name."""

import numpy as np
import pytest
from PIL import Image

from refbn_d2.data.images import read_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def saved(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return str(path)


def test_rgb_and_bgr(tmp_path):
    path = saved(tmp_path / "a.png", RGB)
    np.testing.assert_array_equal(read_image(path, "RGB"), RGB)
    np.testing.assert_array_equal(read_image(path, "BGR"), RGB[:, :, ::-1])


def test_gray_becomes_three_channels(tmp_path):
    got = read_image(saved(tmp_path / "a.png", RGB[:, :, 0]), "RGB")
    np.testing.assert_array_equal(got, np.repeat(RGB[:, :, :1], 3, axis=2))


def test_transparency_is_dropped(tmp_path):
    alpha = np.random.default_rng(1).integers(0, 256, (5, 7, 1), dtype=np.uint8)
    rgba = saved(tmp_path / "a.png", np.concatenate([RGB, alpha], axis=2))
    np.testing.assert_array_equal(read_image(rgba, "RGB"), RGB)
    la = saved(tmp_path / "b.png", np.concatenate([RGB[:, :, :1], alpha], axis=2))
    np.testing.assert_array_equal(read_image(la, "RGB"), np.repeat(RGB[:, :, :1], 3, axis=2))


def test_a_palette_becomes_its_colors(tmp_path):
    colors = [(255, 0, 0), (0, 128, 7)]
    image = Image.new("P", (2, 1))
    image.putpalette([value for color in colors for value in color])
    image.putdata([0, 1])
    got = read_image(saved(tmp_path / "a.png", image), "RGB")
    np.testing.assert_array_equal(got, np.array([colors], dtype=np.uint8))


def test_16_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256, 1000, 32768, 65535]], dtype=np.uint16)
    expected = (values // 256).astype(np.uint8)[..., None].repeat(3, axis=2)
    for name in ("a.png", "a.tif"):
        got = read_image(saved(tmp_path / name, Image.fromarray(values)), "RGB")
        np.testing.assert_array_equal(got, expected)


def test_32_bits_that_fit_8_stay_as_they_are(tmp_path):
    values = np.array([[0, 7, 200, 255]], dtype=np.int32)
    got = read_image(saved(tmp_path / "a.tif", Image.fromarray(values)), "RGB")
    np.testing.assert_array_equal(got, values[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    """The EXIF standard has a table of where the stored rows and columns belong."""
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB[::-1].transpose(1, 0, 2),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: RGB[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    got = read_image(saved(tmp_path / "a.png", RGB, exif=exif), "RGB")
    np.testing.assert_array_equal(got, turned)


@pytest.mark.detectron2
def test_agrees_with_detectron2(tmp_path):
    theirs = pytest.importorskip("detectron2.data.detection_utils").read_image
    exif = Image.Exif()
    exif[274] = 6
    big = np.random.default_rng(2).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    paths = [
        saved(tmp_path / "a.jpg", big, exif=exif),
        saved(tmp_path / "b.jpg", big[:, :, 0]),
        saved(tmp_path / "c.jpg", Image.fromarray(big).convert("CMYK")),
        saved(tmp_path / "d.gif", Image.fromarray(big).convert("P")),
        saved(tmp_path / "e.png", Image.fromarray(big).convert("1")),
    ]
    for path in paths:
        for format in ("RGB", "BGR"):
            np.testing.assert_array_equal(read_image(path, format), theirs(path, format))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg \(image id 42\) does not exist"):
        read_image(str(tmp_path / "gone.jpg"), "RGB", 42)


def test_a_broken_file_is_named(tmp_path):
    whole = saved(tmp_path / "a.jpg", np.zeros((64, 64, 3), np.uint8))
    data = open(whole, "rb").read()
    files = {
        "truncated.jpg": data[: len(data) - 60],
        "empty.jpg": b"",
        "text.jpg": b"no picture",
        "html.png": b"<html></html>",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} \(image id 3\) cannot be read"):
            read_image(str(tmp_path / name), "BGR", 3)
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(str(tmp_path), "BGR")


@pytest.mark.parametrize(
    "values",
    [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32), -np.ones((2, 2), "i4")],
)
def test_values_without_a_place_in_0_255_are_refused(tmp_path, values):
    path = saved(tmp_path / "a.tif", Image.fromarray(values))
    with pytest.raises(ValueError, match=r"a\.tif.*convert it to 8 or 16 bits"):
        read_image(path, "RGB")
