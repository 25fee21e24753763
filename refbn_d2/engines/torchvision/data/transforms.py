"""Provide geometric augmentations with Detectron2's keys and numerics.

An augmentation is called with (rng, h, w), and draws a transform for images of that size, or None.
A transform acts on pictures (H, W, 3), masks (H, W), points (P, 2) and polygons (P, 2).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from refbn_d2.utils.errors import ConfigError


@dataclass(frozen=True)
class Resize:
    """Resize (h, w) to (new_h, new_w): pictures by PIL's bilinear, masks by the nearest pixel."""

    h: int
    w: int
    new_h: int
    new_w: int

    def picture(self, picture: np.ndarray) -> np.ndarray:
        return self._resample(picture, Image.BILINEAR)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        return self._resample(mask, Image.NEAREST)

    def _resample(self, array, method):
        if (self.h, self.w) == (self.new_h, self.new_w):
            return array
        return np.asarray(Image.fromarray(array).resize((self.new_w, self.new_h), method))

    def points(self, xy: np.ndarray) -> np.ndarray:
        return xy * (self.new_w / self.w, self.new_h / self.h)

    polygon = points


@dataclass(frozen=True)
class Flip:
    """Mirror an image of size (h, w) along its width ("horizontal") or height ("vertical")."""

    h: int
    w: int
    direction: str

    def picture(self, picture: np.ndarray) -> np.ndarray:
        return picture[:, ::-1] if self.direction == "horizontal" else picture[::-1]

    mask = picture

    def points(self, xy: np.ndarray) -> np.ndarray:
        x, y = xy[:, 0], xy[:, 1]
        if self.direction == "horizontal":
            return np.stack([self.w - x, y], axis=1)
        return np.stack([x, self.h - y], axis=1)

    polygon = points


@dataclass(frozen=True)
class Crop:
    """Keep the window of size (h, w) with its upper left corner at (x0, y0)."""

    x0: int
    y0: int
    h: int
    w: int

    def picture(self, picture: np.ndarray) -> np.ndarray:
        return picture[self.y0 : self.y0 + self.h, self.x0 : self.x0 + self.w]

    mask = picture

    def points(self, xy: np.ndarray) -> np.ndarray:
        return xy - (self.x0, self.y0)

    def polygon(self, xy: np.ndarray) -> np.ndarray:
        """Clip the polygon to the window (Sutherland and Hodgman 1974); (0, 2) if nothing is left.

        If the window splits a polygon, its parts stay one polygon, joined along the window's edge.
        """
        xy = self.points(xy)
        for axis, edge, inward in ((0, 0, 1), (0, self.w, -1), (1, 0, 1), (1, self.h, -1)):
            depth = inward * (xy[:, axis] - edge)
            depth_next, xy_next = np.roll(depth, -1), np.roll(xy, -1, axis=0)
            inside = depth >= 0
            crosses = inside != (depth_next >= 0)
            t = np.divide(depth, depth - depth_next, out=np.zeros_like(depth), where=crosses)
            crossing = xy + t[:, None] * (xy_next - xy)
            crossing[:, axis] = edge
            # each point if it is inside, then the crossing of the side that follows it
            xy = np.stack([xy, crossing], axis=1)[np.stack([inside, crosses], axis=1)]
            if len(xy) < 3 or np.ptp(xy, axis=0).min() == 0:
                return np.zeros((0, 2))
        return xy


Transform = Resize | Flip | Crop


@dataclass(frozen=True)
class ResizeShortestEdge:
    """Scale the shorter edge to one of `sizes`, or less, to keep the longer one at `longest`."""

    sizes: tuple[int, ...]
    longest: int
    sampling: str  # "choice": one of sizes; "range": from the first to the second

    def __call__(self, rng: np.random.Generator | None, h: int, w: int) -> Resize | None:
        if self.sampling == "range":
            size = int(rng.integers(self.sizes[0], self.sizes[1] + 1))
        else:
            size = self.sizes[0 if len(self.sizes) == 1 else rng.integers(len(self.sizes))]
        return Resize(h, w, *resized_shape(h, w, size, self.longest)) if size else None


def resized_shape(h: int, w: int, shortest: int, longest: int) -> tuple[int, int]:
    """Return (h, w), scaled to a shorter edge of `shortest`, but a longer one of at most `longest`.

    The order of operations is Detectron2's, since it decides how .5 is rounded.
    """
    scale = shortest * 1.0 / min(h, w)
    new_h, new_w = (shortest * 1.0, scale * w) if h < w else (scale * h, shortest * 1.0)
    if max(new_h, new_w) > longest:
        scale = longest * 1.0 / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    # Detectron2 may round the thin side of a very long image to 0; here it is at least 1.
    return max(int(new_h + 0.5), 1), max(int(new_w + 0.5), 1)


@dataclass(frozen=True)
class RandomFlip:
    """Mirror half of the images, "horizontal" or "vertical"."""

    direction: str

    def __call__(self, rng: np.random.Generator, h: int, w: int) -> Flip | None:
        return Flip(h, w, self.direction) if rng.random() < 0.5 else None


@dataclass(frozen=True)
class RandomCrop:
    """Cut out a window at a uniformly random place. `kind` determines its size:

        "relative"        (size[0] h, size[1] w)
        "relative_range"  (fh h, fw w), with fh uniform in size[0]..1, fw in size[1]..1
        "absolute"        size
        "absolute_range"  both sides uniform in size[0]..size[1]

    Sides in pixels ("absolute...") are limited to the image's.
    """

    kind: str
    size: tuple[float, float]

    def __call__(self, rng: np.random.Generator, h: int, w: int) -> Crop:
        crop_h, crop_w = (max(side, 1) for side in self.shape(rng, h, w))
        y0, x0 = int(rng.integers(h - crop_h + 1)), int(rng.integers(w - crop_w + 1))
        return Crop(x0, y0, crop_h, crop_w)

    def shape(self, rng: np.random.Generator, h: int, w: int) -> tuple[int, int]:
        """Draw the size of the window."""
        if self.kind == "absolute":
            return min(self.size[0], h), min(self.size[1], w)
        if self.kind == "absolute_range":
            sides = [
                rng.integers(*(min(s, side) for s in self.size), endpoint=True) for side in (h, w)
            ]
            return int(sides[0]), int(sides[1])
        fractions = self.size
        if self.kind == "relative_range":
            least = np.asarray(self.size, dtype=np.float32)  # as in Detectron2
            fractions = least + rng.random(2) * (1 - least)
        return int(h * fractions[0] + 0.5), int(w * fractions[1] + 0.5)


Augmentation = ResizeShortestEdge | RandomFlip | RandomCrop


def build_augmentations(cfg, is_train: bool) -> list[Augmentation]:
    """Return Detectron2's default augmentations in its order: crop, resize, flip.

    Each is called with (rng, h, w), and draws a transform for images of that size, or None.

    Raises:
        ConfigError: a value under INPUT is not allowed; the message names the key.
    """
    inputs = cfg.INPUT
    if not is_train:
        _check_sizes("TEST", (inputs.MIN_SIZE_TEST,), inputs.MAX_SIZE_TEST, "choice")
        return [ResizeShortestEdge((inputs.MIN_SIZE_TEST,), inputs.MAX_SIZE_TEST, "choice")]
    sizes, sampling = tuple(inputs.MIN_SIZE_TRAIN), inputs.MIN_SIZE_TRAIN_SAMPLING
    _check_sizes("TRAIN", sizes, inputs.MAX_SIZE_TRAIN, sampling)
    augmentations = [ResizeShortestEdge(sizes, inputs.MAX_SIZE_TRAIN, sampling)]
    if inputs.CROP.ENABLED:
        _check_crop(inputs.CROP.TYPE, tuple(inputs.CROP.SIZE))
        augmentations.insert(0, RandomCrop(inputs.CROP.TYPE, tuple(inputs.CROP.SIZE)))
    check_choice("INPUT.RANDOM_FLIP", inputs.RANDOM_FLIP, ("horizontal", "vertical", "none"))
    if inputs.RANDOM_FLIP != "none":
        augmentations.append(RandomFlip(inputs.RANDOM_FLIP))
    return augmentations


def check_choice(key: str, value, choices: tuple[str, ...]) -> None:
    """Check that `value` of the config key `key` is one of `choices`.

    Raises:
        ValueError: it is not; the message names the key, the value and the choices.
    """
    if value not in choices:
        raise ConfigError(f"{key} = {value!r}; allowed: {' or '.join(map(repr, choices))}")


def _check_sizes(split: str, sizes: tuple, longest: int, sampling: str) -> None:
    if not sizes or any(type(size) is not int or size < 0 for size in sizes):
        raise ConfigError(f"INPUT.MIN_SIZE_{split} = {sizes}; allowed: pixels, or 0 for no resize")
    if longest < 1:
        raise ConfigError(f"INPUT.MAX_SIZE_{split} = {longest}; allowed: pixels, 1 or more")
    check_choice("INPUT.MIN_SIZE_TRAIN_SAMPLING", sampling, ("choice", "range"))
    if sampling == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise ConfigError(
            f"INPUT.MIN_SIZE_{split} = {sizes} with INPUT.MIN_SIZE_{split}_SAMPLING = 'range'; "
            "allowed: two sizes, the smaller one first"
        )


def _check_crop(kind: str, size: tuple) -> None:
    kinds = ("relative", "relative_range", "absolute", "absolute_range")
    check_choice("INPUT.CROP.TYPE", kind, kinds)
    if kind.startswith("relative"):
        allowed, fits = "two fractions in (0, 1]", [0 < s <= 1 for s in size]
    else:
        allowed, fits = "two integers above 0, pixels", [type(s) is int and s > 0 for s in size]
    if kind == "absolute_range":
        allowed += ", the smaller one first"
        fits.append(size == tuple(sorted(size)))
    if len(size) != 2 or not all(fits):
        raise ConfigError(f"INPUT.CROP.SIZE = {size} with TYPE {kind!r}; allowed: {allowed}")
