"""Provide the filters and textures of the corruptions.

    x           (H, W, C) float32
    kernel      (K, K) float32, of sum 1, K odd

Pixels outside the image take the value of the nearest pixel inside.
"""

import cv2
import numpy as np

from refbn_d2.utils.opencv import warn_of_two_packages

warn_of_two_packages()


def channels(x: np.ndarray) -> np.ndarray:
    """Return x (H, W) or (H, W, C) as (H, W, C): OpenCV drops a single channel."""
    return x.reshape(*x.shape[:2], -1)


def gray(x: np.ndarray) -> np.ndarray:
    """Return the luminance of x (H, W, C): (H, W, 1)."""
    return x if x.shape[2] == 1 else x @ np.array([[0.299], [0.587], [0.114]], np.float32)


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate every channel of x with `kernel`."""
    return channels(cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE))


def blur(x: np.ndarray, deviation: float) -> np.ndarray:
    """Blur x by a Gaussian of this standard deviation in pixels."""
    size = 2 * int(np.ceil(3 * deviation)) + 1
    return channels(cv2.GaussianBlur(x, (size, size), deviation, borderType=cv2.BORDER_REPLICATE))


def resize(x: np.ndarray, h: int, w: int) -> np.ndarray:
    """Resize x to (h, w) by bicubic interpolation."""
    return cv2.resize(x, (w, h), interpolation=cv2.INTER_CUBIC)


def displace(x: np.ndarray, dx: np.ndarray, dy: np.ndarray, interpolation: int) -> np.ndarray:
    """y[i, j] = x[i + dy[i, j], j + dx[i, j]], with the nearest pixel for places outside"""
    rows, columns = np.indices(x.shape[:2], np.float32)
    at = (columns + dx.astype(np.float32), rows + dy.astype(np.float32))
    return channels(cv2.remap(x, *at, interpolation, borderMode=cv2.BORDER_REPLICATE))


def disk(radius: float, softness: float) -> np.ndarray:
    """Return a disk of sum 1. A pixel's weight is the share of its 9 x 9 parts inside the disk."""
    reach = int(np.ceil(radius)) + 1
    parts = (np.arange((2 * reach + 1) * 9) + 0.5) / 9 - reach - 0.5
    inside = (parts[:, None] ** 2 + parts**2 <= radius**2).astype(np.float32)
    disk = inside.reshape(2 * reach + 1, 9, -1, 9).mean(axis=(1, 3))
    disk = cv2.GaussianBlur(disk, (5, 5), softness, borderType=cv2.BORDER_CONSTANT)
    return disk / disk.sum()


def streak(radius: int, deviation: float, degrees: float) -> np.ndarray:
    """Return a line of sum 1 that fades as half a Gaussian; its center of mass is in the middle."""
    along = np.arange(0, 2 * radius + 0.25, 0.25)
    weight = np.exp(-(along**2) / (2 * deviation**2))
    weight /= weight.sum()
    along = along - (along * weight).sum()
    angle = np.deg2rad(degrees)
    x, y = along * np.cos(angle), along * np.sin(angle)
    reach = int(np.abs(along).max()) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    for column, share_x in ((left, left + 1 - x), (left + 1, x - left)):
        for row, share_y in ((top, top + 1 - y), (top + 1, y - top)):
            np.add.at(kernel, (row + reach, column + reach), weight * share_x * share_y)
    return kernel


def _star() -> np.ndarray:
    """Return lines (66, 2), start and end as x + iy: six needles of length 1 with barbs."""
    foot = np.arange(0.25, 1, 0.15)
    barbs = [foot + 0.4 * (1 - foot) * np.exp(side * np.pi / 3) for side in (-1j, 1j)]
    needle = np.concatenate([[(0, 1)], *(np.stack([foot, tip], axis=1) for tip in barbs)])
    return np.concatenate([needle * np.exp(1j * np.pi / 3 * k) for k in range(6)])


_STAR = _star()


def needles(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Draw ice (h, w, 1) in 0-1: stars of needles, up to a quarter of the shorter side long."""
    canvas = np.zeros((h, w), np.uint8)
    length = min(max(4, min(h, w) / 4), 64)
    for _ in range(int(np.ceil(3 * h * w / length**2))):
        x, y, turn, size, light = rng.uniform(0, (w, h, np.pi / 3, 1, 1))
        lines = x + 1j * y + length * (0.4 + 0.6 * size) * np.exp(1j * turn) * _STAR
        points = np.rint(16 * np.stack([lines.real, lines.imag], axis=-1)).astype(np.int32)
        cv2.polylines(canvas, points, False, int(90 + 165 * light), 1, cv2.LINE_AA, 4)
    return canvas[..., None].astype(np.float32) / 255


def plasma(rng: np.random.Generator, h: int, w: int, decay: float) -> np.ndarray:
    """Draw clouds (h, w, 1) in 0-1: a sum of noise with 1, 2, 4, ... cells on the longer side.

    The amplitude of each is 1 / decay of the one before.
    """
    side = max(h, w)
    clouds = np.zeros((h, w), np.float32)
    for octave in range(int(np.ceil(np.log2(side))) + 1):
        cells = [int(np.ceil(2**octave * length / side)) + 1 for length in (h, w)]
        clouds += decay**-octave * resize(rng.standard_normal(cells, np.float32), h, w)
    spread = clouds.max() - clouds.min()
    clouds = (clouds - clouds.min()) / spread if spread > 0 else np.full_like(clouds, 0.5)
    return clouds[..., None]
