"""Draw the images of the shapes, the same on every machine.

Twelve classes differ only in outline: colors, textures, sizes, angles and clutter are drawn
independently of the class. Every image belongs to one of seven photometric domains. They shift the
statistics of channels and edges as far as different cameras would: BatchNorm fails on a batch from
a single domain.

    H, W        height and width of an image in pixels
    image       (H, W, 3) uint8, BGR
    mask        (H, W) bool
    owner       (H, W) uint8: i + 1 where object i is visible, 0 on the background

Only functions of OpenCV on integers draw: no antialiasing, vertices in 1/16 pixel, and 8-bit
filters documented as bit-exact. All random numbers are integers from a generator seeded by (seed,
kind, split, index). Sines are rounded before use. A test compares the pixels with a hash.
"""

import logging
import math
from typing import Any, NamedTuple

import numpy as np

from refbn_d2.data.names import DOMAINS, SPLITS
from refbn_d2.utils.extras import needs
from refbn_d2.utils.opencv import warn_of_two_packages

with needs("train"):
    import cv2

logger = logging.getLogger(__name__)

warn_of_two_packages()

MAX_OBJECTS = 7
TILT = 20  # degrees to either side
MIN_VISIBLE = 0.4  # share of a shape that occlusion and the image's border must leave visible
MIN_AREA = 24  # visible pixels
DIAMETERS = (16, 30, 52, 88)  # bounds of three ranges, equally likely, in 1/128 of the shorter side

_SHIFT = 4  # fractional bits of a vertex
_ONE = 1 << _SHIFT
_LEVELS = np.arange(256)[:, None]
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_FONT = cv2.FONT_HERSHEY_PLAIN


class Scene(NamedTuple):
    """One drawn image; `masks[i]` is the visible part of object i, of class CLASSES[labels[i]]."""

    image: np.ndarray
    labels: list[int]
    masks: list[np.ndarray]
    domain: str


def _arc(radius: int, start: int, stop: int, cx: int = 0, cy: int = 0) -> list:
    """Return points of a circle about (cx, cy), from `start` to `stop` degrees."""
    center, axes = (10 * cx, 10 * cy), (10 * radius, 10 * radius)
    return (np.array(cv2.ellipse2Poly(center, axes, 0, start, stop, 8)) / 10).tolist()


def _star(tips: int, inner: int) -> list:
    """Return a star with `tips` tips; `inner` is the radius of the vertices between them."""
    steps = [(100 if k % 2 == 0 else inner, math.pi * k / tips) for k in range(2 * tips)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in steps]


_LOBE = _arc(49, 212, 403, cx=42, cy=-28)
# Contours of every class in a circle of radius 100 about (0, 0), y down; a second one is a hole.
OUTLINES = {
    "circle": [_arc(100, 0, 352)],
    "triangle": [_star(3, 50)[::2]],
    "square": [[(-78, -78), (78, -78), (78, 78), (-78, 78)]],
    "pentagon": [_star(5, 50)[::2]],
    "star": [_star(5, 42)],
    "cross": [
        [(-30, -97), (30, -97), (30, -30), (97, -30), (97, 30), (30, 30)]
        + [(30, 97), (-30, 97), (-30, 30), (-97, 30), (-97, -30), (-30, -30)]
    ],
    "crescent": [_arc(100, 52, 308, cx=20) + _arc(80, 82, 278, cx=70)[::-1]],
    "heart": [_LOBE + [(0, 89)] + [(-x, y) for x, y in _LOBE[::-1]]],
    "arrow": [[(0, -100), (75, -10), (27, -10), (27, 95), (-27, 95), (-27, -10), (-75, -10)]],
    "ring": [_arc(100, 0, 352), _arc(60, 0, 352)],
    "bolt": [[(10, -100), (-68, 22), (-10, 22), (-35, 100), (68, -28), (8, -28), (55, -100)]],
    "ell": [[(-70, -95), (-15, -95), (-15, 40), (75, 40), (75, 95), (-70, 95)]],
}
CLASSES = tuple(OUTLINES)
_TEMPLATES = [[np.rint(10 * np.array(c)).astype(np.int64) for c in o] for o in OUTLINES.values()]


def _cos_sin(degrees: int) -> tuple[int, int]:
    angle = math.radians(degrees)
    return round(2**14 * math.cos(angle)), round(2**14 * math.sin(angle))


def _pose(label: int, diameter: int, squeeze: int, degrees: int) -> list[np.ndarray]:
    """Return a class's contours about (0, 0), narrowed to squeeze / 256, rotated, in 1/16 pixel."""
    cos, sin = _cos_sin(degrees)
    # fillPoly also fills the pixels on the outline, half a pixel all around.
    turn = np.array([[cos * squeeze, sin * squeeze], [-sin * 256, cos * 256]]) * (diameter - 1)
    return [(c @ turn * _ONE // (2000 << 22)).astype(np.int32) for c in _TEMPLATES[label]]


def _fill(canvas: np.ndarray, contours: list, value: int | list, x: int, y: int) -> np.ndarray:
    """Fill contours moved by (x, y) / 16 pixels, in place; a contour inside another is a hole."""
    return cv2.fillPoly(canvas, contours, value, cv2.LINE_8, _SHIFT, (x, y))


def polygons(mask: np.ndarray) -> list[list[int]]:
    """Return COCO polygons along the pixel edges of a mask (H, W); they rasterize to it exactly.

    Each 8-connected part is one flat list x0, y0, x1, y1, ... A cut goes from its first vertex to
    each hole and back, so that the parity rule leaves the holes out.
    """
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    part = mask.view(np.uint8)[y : y + height, x : x + width]
    # The pixel at x becomes two, at 2x and 2x + 1. Contours run through their centers. They are
    # then moved to the pixel's edges, x and x + 1.
    twice = cv2.resize(part, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(twice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    loops = [(contour[:, 0] + 1) // 2 + (x, y) for contour in contours]
    loops = [c[np.diff(c, axis=0, prepend=c[-1:]).any(axis=1)] for c in loops]  # no repeated points
    out = []
    for loop, (_, _, hole, parent) in zip(loops, tree[0], strict=True):
        if parent >= 0:
            continue
        path = [loop]
        while hole >= 0:
            path += [loop[:1], loops[hole], loops[hole][:1]]
            hole = tree[0, hole, 0]
        out.append(np.concatenate(path).ravel().tolist())
    return out


def _coordinates(degrees: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two grids (h, w) in 1/16 pixel: coordinates along an angle, and across it."""
    cos, sin = _cos_sin(degrees)
    x, y = np.arange(width, dtype=np.int32), np.arange(height, dtype=np.int32)[:, None]
    return x * cos + y * sin >> 10, y * cos - x * sin >> 10


def _ramp(u: np.ndarray) -> np.ndarray:
    """Return a grid of coordinates, scaled to 0..255."""
    return (u - u.min()) * 255 // max(int(np.ptp(u)), 1)


def _texture(rng: np.random.Generator, shape: tuple[int, int], colors: np.ndarray, kinds: int):
    """Return a pattern (h, w, 3) uint8 of two `colors` (2, 3), with a period of 6 to 24 pixels.

    It is one of the first `kinds` of these: flat, gradient, stripes, checker, dots, blobs.
    """
    height, width = shape
    kind, degrees, period = rng.integers([0, 0, 6 * _ONE], [kinds, 360, 24 * _ONE]).tolist()
    u, v = _coordinates(degrees, height, width)
    weights: np.ndarray  # of the second color, 0..255
    if kind == 0:
        weights = np.zeros(shape)
    elif kind == 1:
        weights = _ramp(u)
    elif kind == 2:
        weights = (u // period & 1) * 255
    elif kind == 3:
        weights = ((u // period ^ v // period) & 1) * 255
    elif kind == 4:
        u, v = u % period - period // 2, v % period - period // 2
        weights = (9 * (u * u + v * v) < period * period) * 255
    else:
        cell = period // _ONE
        grid = rng.integers(0, 256, (height // cell + 2, width // cell + 2), dtype=np.uint8)
        weights = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    ramp = colors[0] + (colors[1] - colors[0]) * _LEVELS // 255
    return cv2.applyColorMap(weights.astype(np.uint8), ramp.astype(np.uint8)[:, None])


def _contrasting(rng: np.random.Generator, others: list[np.ndarray]) -> np.ndarray:
    """Return a random color (3,) that differs from all `others`.

    The difference is at least 64 levels per channel, on average. If none of 24 draws has it, return
    the draw that is furthest from its nearest color.
    """
    draws = rng.integers(0, 256, (24, 3))
    nearest = np.abs(draws[:, None] - np.stack(others)).sum(axis=2).min(axis=1)
    return draws[np.minimum(nearest, 3 * 64).argmax()]  # the first draw that is far enough


# OpenCV < 4.11 has no other path; remove the condition with it.
_ACCURATE: dict[str, Any] = (
    {"hint": cv2.ALGO_HINT_ACCURATE} if hasattr(cv2, "ALGO_HINT_ACCURATE") else {}
)


def _smooth(image: np.ndarray, size: int) -> np.ndarray:
    """Blur by a Gaussian, `size` pixels wide, on OpenCV's bit-exact path."""
    return cv2.GaussianBlur(image, (size, size), 0, **_ACCURATE)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a dark or medium texture under thin, crooked strokes, and its two colors (2, 3)."""
    height, width = size
    colors = rng.integers(0, 150, (2, 3))
    image = _texture(rng, size, colors, kinds=6)
    reach = max(size) * _ONE // 6
    for _ in range(rng.integers(0, 9)):
        corners, thickness = rng.integers([2, 1], [6, 3]).tolist()
        start = rng.integers(0, [width * _ONE, height * _ONE])
        wobble = rng.integers(-reach // 3, reach // 3, (corners, 2))
        line = np.arange(corners)[:, None] * rng.integers(-reach, reach, 2) + wobble + start
        color = rng.integers(0, 256, 3).tolist()
        cv2.polylines(image, [line.astype(np.int32)], False, color, thickness, cv2.LINE_8, _SHIFT)
    return image, colors


def _paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, color: np.ndarray):
    """Fill a mask (H, W) uint8, flat or shaded about `color`; half of them get an outline."""
    x, y, width, height = cv2.boundingRect(mask)
    mask = mask[y : y + height, x : x + width]
    view = image[y : y + height, x : x + width]
    second = np.clip(color + rng.integers(-70, 71, 3), 0, 255)
    outlined, bright = rng.integers(0, 2, 2).tolist()
    cv2.copyTo(_texture(rng, mask.shape, np.stack([color, second]), kinds=2), mask, view)
    if outlined:
        inside = cv2.erode(mask, _CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        view[mask > inside] = color // 3 + 170 * bright


def _photograph(rng: np.random.Generator, image: np.ndarray, domain: str) -> np.ndarray:
    """Return the scene as a camera of `domain` sees it."""
    image = _smooth(image, 3)
    if domain == "lighting":  # almost night: light from one side, fading across the image
        degrees, low, high = rng.integers([0, 30, 120], [360, 64, 190]).tolist()
        light = low + (high - low) * _ramp(_coordinates(degrees, *image.shape[:2])[0]) // 255
        light = cv2.merge([light.astype(np.uint8)] * 3)
        return (np.multiply(image, light, dtype=np.uint16) >> 8).astype(np.uint8)
    if domain == "palette":  # false colors: channels are swapped and rescaled; red is high
        table = _LEVELS * [130, 150, 115] // 256 + rng.integers([20, 0, 110], [60, 20, 140])
        blue, green, red = cv2.split(image)
        return cv2.LUT(cv2.merge([red, blue, green]), table.astype(np.uint8)[None])
    if domain == "blur":  # out of focus, and veiled by stray light
        radius, veil = rng.integers([4, 45], [6, 75]).tolist()
        table = veil + _LEVELS * 180 // 256
        return cv2.LUT(_smooth(image, 2 * radius + 1), table.astype(np.uint8))
    if domain == "noise":  # uniform, of deviation 40 to 65
        reach = rng.integers(70, 114)
        noise = rng.integers(-reach, reach + 1, image.shape, dtype=np.int16)
        return cv2.add(image, noise, dtype=cv2.CV_8U)
    if domain == "contrast":  # fog: a fifth to a third of the contrast, and bright
        gain, level = rng.integers([50, 130], [86, 165]).tolist()
        return cv2.LUT(image, (level + _LEVELS * gain // 256).astype(np.uint8))
    if domain == "inverted":
        return 255 - image
    return image


def draw_detection(
    seed: int, split: str, index: int, size: tuple[int, int], domain: str | None = None
) -> Scene:
    """Draw image `index` of a split: up to seven objects, with later ones over earlier ones.

    An object is not drawn if it, or one that it covers, would keep less than `MIN_VISIBLE` of its
    pixels or fewer than `MIN_AREA`. So everything that is drawn is annotated.

    Args:
        seed: the seed of the set, an integer from 0.
        split: one of `SPLITS`.
        index: the image's number in the split, from 0.
        size: (H, W).
        domain: one of `DOMAINS`; None: the domains alternate by index. The scene does not depend
            on it.
    """
    domain = domain or DOMAINS[index % len(DOMAINS)]
    rng = np.random.default_rng([seed, 0, SPLITS.index(split), index])
    image, backdrop = _background(rng, size)
    owner = np.zeros(size, np.uint8)
    labels: list[int] = []
    needed: list[float] = [0]  # pixels of the background and of each object
    colors = [*backdrop]
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        number = len(labels) + 1
        label, squeeze = rng.integers([0, 200], [len(CLASSES), 257]).tolist()
        degrees = int(rng.integers(-TILT, TILT + 1)) % 360
        for _ in range(8):
            x, y, diameter = _place(rng, owner)
            contours = _pose(label, diameter, squeeze, degrees)
            side = diameter + 2
            whole = _fill(np.zeros((side, side), np.uint8), contours, 1, *[side * _ONE // 2] * 2)
            need = max(MIN_AREA, MIN_VISIBLE * cv2.countNonZero(whole))
            trial = _fill(owner.copy(), contours, number, x, y)
            areas = cv2.calcHist([trial], [0], None, [number + 1], [0, number + 1]).ravel()
            if (areas >= [*needed, need]).all():
                break
        else:
            continue
        owner = trial
        labels.append(label)
        needed.append(need)
        colors.append(_contrasting(rng, colors))
        _paint(rng, image, (owner == number).astype(np.uint8), colors[-1])
    masks = [owner == i + 1 for i in range(len(labels))]
    return Scene(_photograph(rng, image, domain), labels, masks, domain)


def _place(rng: np.random.Generator, owner: np.ndarray) -> tuple[int, int, int]:
    """Return a center (x, y) in 1/16 pixel and a diameter in pixels; a third are on an object."""
    height, width = owner.shape
    step = int(rng.integers(len(DIAMETERS) - 1))
    low, high = (max(12, min(height, width) * d // 128) for d in DIAMETERS[step : step + 2])
    diameter = int(rng.integers(low, high + 1))
    taken = np.flatnonzero(owner) if rng.integers(3) == 0 else ()
    if len(taken):
        y, x = divmod(int(taken[rng.integers(len(taken))]), width)
        return x * _ONE, y * _ONE, diameter
    # A quarter of the diameter may be outside the image.
    edge = min(diameter * _ONE // 4, min(height, width) * _ONE // 2)
    x, y = rng.integers(edge, [width * _ONE - edge + 1, height * _ONE - edge + 1]).tolist()
    return x, y, diameter


def draw_classification(
    seed: int, split: str, index: int, size: tuple[int, int], domain: str | None = None
) -> Scene:
    """Draw image `index` of a split: one object near the middle.

    Classes alternate with every image, domains with every round of classes. Arguments are those of
    `draw_detection`.
    """
    domain = domain or DOMAINS[index // len(CLASSES) % len(DOMAINS)]
    rng = np.random.default_rng([seed, 1, SPLITS.index(split), index])
    image, backdrop = _background(rng, size)
    label = index % len(CLASSES)
    short = min(size)
    diameter, squeeze = rng.integers([short * 3 // 8, 200], [short * 7 // 8, 257]).tolist()
    degrees = int(rng.integers(-TILT, TILT + 1)) % 360
    spare = (short - diameter) * _ONE // 2 + short  # a sixteenth of it may be outside the image
    x, y = (np.array(size[::-1]) * _ONE // 2 + rng.integers(-spare, spare + 1, 2)).tolist()
    mask = _fill(np.zeros(size, np.uint8), _pose(label, diameter, squeeze, degrees), 1, x, y)
    _paint(rng, image, mask, _contrasting(rng, [*backdrop]))
    return Scene(_photograph(rng, image, domain), [label], [mask > 0], domain)
