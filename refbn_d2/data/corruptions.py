"""Apply the 15 common corruptions to pictures, each at 5 severities.

    corrupt(image, name, severity, seed) -> image    uint8 RGB in and out, of the same shape

After Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), and Michaelis et al., "Benchmarking Robustness in Object Detection"
(2019), who apply them to pictures of any size. The code is our own. Do not compare results with
published numbers, because of these differences:

- frost: the authors blend in photographs of ice. We draw a texture of clouds and stars of needles.
- glass_blur: every pixel takes the value of a random neighbor; the authors swap pixels in sequence.
- motion_blur: the kernel is centered, so that objects stay inside their annotated boxes.
- elastic_transform: local displacement only; the authors also move the whole picture by a random
  affine map.
- zoom_blur: the unmoved picture counts once in the mean; the authors count it twice.

There are two tables of severities. Pictures with a shorter side under 96 pixels take the one for
small pictures (after CIFAR-10-C, 32 pixels), others the one for large pictures (after ImageNet-C,
224 pixels). Lengths are in pixels and do not grow further with the picture.

Some parameters of snow, frost, glass_blur, motion_blur, defocus_blur and pixelate, and all of
elastic_transform, are our own: with the authors', some severities were no stronger than the one
before. The five severities of one seed share one random pattern: only its strength differs.

    x           (H, W, C) float32 in 0-1, C = 1 or 3
    rng         numpy's generator, made from the name and the seed
    table       severity 1..5 -> the parameters of the corruption's function
"""

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from refbn_d2.data.filters import (
    blur,
    channels,
    convolve,
    disk,
    displace,
    gray,
    needles,
    plasma,
    resize,
    streak,
)
from refbn_d2.utils.errors import DataError

SMALL = 96  # pixels: pictures with a shorter side below it take the small severities
SEVERITIES = (1, 2, 3, 4, 5)


class _Corruption(NamedTuple):
    family: str  # "noise", "blur", "weather" or "digital"
    function: Callable  # (x, rng, *parameters) -> x, clipped and rounded by `corrupt`
    large: list
    small: list


_REGISTRY: dict[str, _Corruption] = {}


def _corruption(family: str, large: list, small: list):
    """Register a function under its name, with the parameters of its five severities."""

    def register(function):
        _REGISTRY[function.__name__.strip("_")] = _Corruption(family, function, large, small)
        return function

    return register


def corrupt(
    image: np.ndarray, name: str, severity: int, seed: int | Sequence[int] = 0
) -> np.ndarray:
    """Return the corrupted picture. It depends only on the arguments.

    Args:
        image: uint8 (H, W, 3) RGB, or gray (H, W) or (H, W, 1), with 1 pixel or more. In a picture
            of few pixels a blur or a displacement may change nothing.
        name: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5 (strong).
        seed: an integer from 0, or several. Give each picture its own, such as [run, image id]:
            pictures of one size and one seed get the same noise.

    Returns:
        A new uint8 array of the shape of `image`.

    Raises:
        DataError: the name, the severity, the seed, or the picture's type or shape is not allowed.
    """
    if name not in _REGISTRY:
        raise DataError(f"corruption {name!r} is unknown; choose from {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise DataError(f"severity {severity!r} of {name} is not allowed; choose 1, 2, 3, 4 or 5")
    _check(image)
    try:
        entropy = [seed] if isinstance(seed, int | np.integer) else list(seed)
        rng = np.random.default_rng([*entropy, CORRUPTIONS.index(name)])
    except (TypeError, ValueError):
        raise DataError(f"seed {seed!r} is not allowed; give integers from 0") from None
    chosen = _REGISTRY[name]
    table = chosen.small if min(image.shape[:2]) < SMALL else chosen.large
    x = image.reshape(*image.shape[:2], -1).astype(np.float32) / 255
    x = chosen.function(x, rng, *table[severity - 1])
    return np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8).reshape(image.shape)


def _check(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"the picture to corrupt is {kind}; give a numpy array of uint8")
    shape = image.shape
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise DataError(
            f"the picture to corrupt has shape {shape}; give (H, W, 3) RGB, or gray (H, W) or "
            "(H, W, 1), without transparency"
        )
    if 0 in shape:
        raise DataError(f"the picture to corrupt has shape {shape}: it has no pixels")


# Noise


@_corruption(
    "noise",
    large=[(0.08,), (0.12,), (0.18,), (0.26,), (0.38,)],
    small=[(0.04,), (0.06,), (0.08,), (0.09,), (0.10,)],
)
def _gaussian_noise(x, rng, deviation):
    """x + deviation * N(0, 1)"""
    return x + deviation * rng.standard_normal(x.shape, np.float32)


@_corruption(
    "noise",
    large=[(60,), (25,), (12,), (5,), (3,)],
    small=[(500,), (250,), (100,), (75,), (50,)],
)
def _shot_noise(x, rng, photons):
    """Poisson(x * photons) / photons, the noise of few photons per pixel"""
    return rng.poisson(x * photons).astype(np.float32) / photons


@_corruption(
    "noise",
    large=[(0.03,), (0.06,), (0.09,), (0.17,), (0.27,)],
    small=[(0.01,), (0.02,), (0.03,), (0.05,), (0.07,)],
)
def _impulse_noise(x, rng, amount):
    """Set the share `amount` of all values to 0 or 1."""
    u = rng.random(x.shape, np.float32)
    return np.where(u < amount / 2, 0, np.where(u > 1 - amount / 2, 1, x))


# Blur


@_corruption(
    "blur",
    large=[(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    small=[(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.6), (1.5, 0.6)],
)
def _defocus_blur(x, rng, radius, softness):
    """Average over a disk with a soft edge."""
    return convolve(x, disk(radius, softness))


@_corruption(
    "blur",  # deviation of the blur, farthest neighbor, repetitions
    large=[(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    small=[(0.05, 0.55, 1), (0.25, 0.65, 1), (0.3, 0.8, 1), (0.4, 1, 2), (0.4, 1.5, 2)],
)
def _glass_blur(x, rng, deviation, reach, repetitions):
    """Displace pixels at random by up to `reach`, between two slight blurs."""
    x = blur(x, deviation)
    for _ in range(repetitions):
        dy, dx = np.rint(reach * rng.uniform(-1, 1, (2, *x.shape[:2])))
        x = displace(x, dx, dy, cv2.INTER_NEAREST)
    return blur(x, deviation)


@_corruption(
    "blur",  # half length, deviation along it
    large=[(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    small=[(3, 0.8), (3, 1.2), (4, 1.6), (5, 2), (6, 2.5)],
)
def _motion_blur(x, rng, radius, deviation):
    """Average along a line within 45 degrees of the horizontal, weighted by half a Gaussian."""
    return convolve(x, streak(radius, deviation, rng.uniform(-45, 45)))


@_corruption(
    "blur",  # largest zoom, step
    large=[(1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.25, 0.02), (1.30, 0.03)],
    small=[(1.05, 0.01), (1.10, 0.01), (1.15, 0.01), (1.20, 0.01), (1.25, 0.01)],
)
def _zoom_blur(x, rng, largest, step):
    """Average the picture and its enlargements about the center."""
    h, w = x.shape[:2]
    zooms = np.arange(1 + step, largest + step / 2, step)
    total = x.copy()
    for zoom in zooms:
        move = np.array([[zoom, 0, (1 - zoom) * (w - 1) / 2], [0, zoom, (1 - zoom) * (h - 1) / 2]])
        total += channels(cv2.warpAffine(x, move, (w, h), borderMode=cv2.BORDER_REPLICATE))
    return total / (1 + len(zooms))


# Weather


@_corruption(
    "weather",  # mean and deviation of the flakes, their size, threshold, streak, share of x
    large=[
        (0.10, 0.3, 3.0, 0.50, (10, 4), 0.80),
        (0.20, 0.3, 2.0, 0.50, (12, 4), 0.70),
        (0.55, 0.3, 4.0, 0.85, (12, 8), 0.65),
        (0.55, 0.3, 4.5, 0.80, (12, 8), 0.60),
        (0.55, 0.3, 2.5, 0.75, (12, 12), 0.50),
    ],
    small=[
        (0.10, 0.2, 1.00, 0.60, (4, 1.5), 0.95),
        (0.10, 0.2, 1.00, 0.50, (5, 2), 0.90),
        (0.15, 0.3, 1.75, 0.55, (5, 2), 0.90),
        (0.25, 0.3, 2.25, 0.60, (6, 3), 0.85),
        (0.30, 0.3, 1.25, 0.65, (7, 4), 0.80),
    ],
)
def _snow(x, rng, mean, deviation, size, threshold, line, share):
    """Add falling streaks to a picture bleached toward white."""
    h, w = x.shape[:2]
    coarse = (max(1, round(h / size)), max(1, round(w / size)))
    angle = rng.uniform(45, 135)
    flakes = resize(mean + deviation * rng.standard_normal(coarse, np.float32), h, w)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1)).astype(np.float32)
    radius, fade = line
    flakes = convolve(flakes[..., None], streak(radius, fade, angle))
    bleached = np.maximum(x, 1.5 * gray(x) + 0.5)
    return share * x + (1 - share) * bleached + flakes + flakes[::-1, ::-1]


@_corruption(
    "weather",  # share of x, share of the ice
    large=[(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.75), (0.6, 0.8)],
    small=[(1, 0.2), (1, 0.3), (0.95, 0.4), (0.9, 0.5), (0.8, 0.6)],
)
def _frost(x, rng, share, ice):
    """share * x + ice * (a drawn texture of bluish ice)"""
    h, w = x.shape[:2]
    cover = np.clip(2 * plasma(rng, h, w, 1.8) - 0.4, 0, 1)
    texture = cover * (0.35 + 0.65 * needles(rng, h, w))
    tint = np.array([0.86, 0.95, 1.0], np.float32) if x.shape[2] == 3 else np.float32(0.94)
    return share * x + ice * texture * tint


@_corruption(
    "weather",  # thickness, decay of the small clouds
    large=[(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    small=[(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
)
def _fog(x, rng, thickness, decay):
    """(x + thickness * clouds) * max(x) / (max(x) + thickness)"""
    h, w = x.shape[:2]
    brightest = x.max()
    clouds = plasma(rng, h, w, decay)
    return (x + thickness * clouds) * brightest / (brightest + thickness)


@_corruption(
    "weather",
    large=[(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)],
    small=[(0.05,), (0.10,), (0.15,), (0.20,), (0.30,)],
)
def _brightness(x, rng, more):
    """Raise the value of HSV by `more`; hue and saturation stay."""
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + more, 1)
    return np.where(value > 0, x * (raised / np.maximum(value, 1e-6)), raised)


# Digital


@_corruption(
    "digital",
    large=[(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)],
    small=[(0.75,), (0.5,), (0.4,), (0.3,), (0.15,)],
)
def _contrast(x, rng, share):
    """share * (x - mean) + mean, with the mean of each channel over the picture"""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return share * (x - mean) + mean


@_corruption(
    "digital",  # root mean square of the displacement, its smoothness (both in pixels)
    large=[(1.5, 6), (2.5, 6), (3.5, 6), (5, 6), (7, 6)],
    small=[(0.4, 2.5), (0.7, 2.5), (1, 2.5), (1.4, 2.5), (1.9, 2.5)],
)
def _elastic_transform(x, rng, length, smoothness):
    """Displace pixels by a smooth random field, as on a stretched sheet of rubber."""
    field = blur(rng.standard_normal((*x.shape[:2], 2), np.float32), smoothness)
    field *= length / max(1e-6, np.sqrt((field**2).sum(axis=2).mean()))
    return displace(x, field[..., 0], field[..., 1], cv2.INTER_LINEAR)


@_corruption(
    "digital",
    large=[(0.6,), (0.45,), (0.37,), (0.3,), (0.25,)],
    small=[(0.95,), (0.9,), (0.8,), (0.7,), (0.6,)],
)
def _pixelate(x, rng, share):
    """Reduce the resolution to `share`, and enlarge again without interpolation."""
    h, w = x.shape[:2]
    few = (max(1, int(w * share)), max(1, int(h * share)))
    coarse = cv2.resize(x, few, interpolation=cv2.INTER_AREA)
    return channels(cv2.resize(coarse, (w, h), interpolation=cv2.INTER_NEAREST_EXACT))


@_corruption(
    "digital",
    large=[(25,), (18,), (15,), (10,), (7,)],
    small=[(80,), (65,), (58,), (50,), (40,)],
)
def _jpeg_compression(x, rng, quality):
    """Save as JPEG of this quality, and read it again."""
    picture = np.rint(255 * x).astype(np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(picture[..., 0] if x.shape[2] == 1 else picture).save(
            file, "JPEG", quality=quality
        )
        return channels(np.asarray(Image.open(file))).astype(np.float32) / 255


CORRUPTIONS = tuple(_REGISTRY)
SUBSET = ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression")  # one of each family
