"""Turn COCO's masks, run lengths and polygons, into pixels."""

import numpy as np
import pycocotools.mask as mask_util


def run_lengths(counts: str | bytes, pixels: int) -> np.ndarray:
    """Decode COCO's run lengths to int64 (runs,): lengths of 0s and 1s in turn, column by column.

    Each is stored in characters of 5 bits, lowest first. Bit 5 says that more characters follow;
    bit 4 of the last character is the sign. From the fourth length on, the stored value is the
    difference from the length two before.

    Raises:
        ValueError: the lengths do not add up to `pixels`.
    """
    text = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
    codes = text.astype(np.int64) - 48
    whole = len(codes) > 0 and codes.min() >= 0 and codes.max() < 64 and codes[-1] < 32
    if whole:
        ends = np.flatnonzero(codes < 32)
        starts = np.concatenate([[0], ends[:-1] + 1])
        sizes = ends - starts + 1
        place = np.arange(len(codes)) - np.repeat(starts, sizes)
        runs = np.add.reduceat((codes & 31) << np.minimum(5 * place, 55), starts)
        runs -= np.where(codes[ends] & 16, 1 << np.minimum(5 * sizes, 60), 0)
        runs[1::2] = runs[1::2].cumsum()
        runs[2::2] = runs[2::2].cumsum()
    if not whole or runs.min() < 0 or runs.sum() != pixels:
        raise ValueError(f"its run lengths do not add up to its {pixels} pixels")
    return runs


def decode_mask(counts: str | bytes, h: int, w: int) -> np.ndarray:
    """Decode COCO's run lengths to a uint8 (h, w) mask, 1 inside.

    pycocotools reads this too, but if a string is broken, it leaves the remaining pixels
    uninitialized.

    Raises:
        ValueError: the lengths do not add up to h w.
    """
    runs = run_lengths(counts, h * w)
    inside = (np.arange(len(runs)) % 2).astype(np.uint8)
    return np.repeat(inside, runs).reshape(w, h).T


def rasterize(polygons: list, h: int, w: int) -> np.ndarray:
    """Rasterize COCO polygons to bool (h, w): their union."""
    if not len(polygons):
        return np.zeros((h, w), dtype=bool)
    runs = mask_util.merge(mask_util.frPyObjects(polygons, h, w))
    return np.array(decode_mask(runs["counts"], h, w), dtype=bool, order="C")
