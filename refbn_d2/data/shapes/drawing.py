"""Shapes: a synthetic COCO set and an ImageFolder set, drawn the same on every machine.

    python -m refbn_d2.data.shapes [--root DIR] [--classification] [--seed N] [--size PX] ...

Twelve classes differ in outline alone: colours, textures, sizes, angles and clutter are drawn
without regard to the class. Every image belongs to one of seven photometric domains, which shift
the statistics of channels and edges as far as different cameras would; a batch from a single domain
is what BatchNorm fails on.

    H, W        height and width of an image in pixels
    image       (H, W, 3) uint8, BGR
    mask        (H, W) bool
    owner       (H, W) uint8: i + 1 where object i is visible, 0 on the background

OpenCV draws, by its functions on integers: no antialiasing, vertices in 1/16 pixel, 8-bit filters
that it documents as bit-exact. What is random are integers of a generator seeded by (seed, kind,
split, index), and a sine is rounded before it is used. A test holds the pixels to a hash.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

logger = logging.getLogger(__name__)

GENERATOR = "refbn_d2.data.shapes"
VERSION = "1"  # raise it with every change to a pixel or an annotation: folders on disk are remade
DOMAINS = ("plain", "lighting", "palette", "blur", "noise", "contrast", "inverted")
SPLITS = ("train", "val")

MAX_OBJECTS = 7
TILT = 20  # degrees to either side
MIN_VISIBLE = 0.4  # of the whole shape, what occlusion and the image's border must leave
MIN_AREA = 24  # visible pixels
DIAMETERS = (16, 30, 52, 88)  # bounds of three equally likely ranges, in 1/128 of the shorter side

_SHIFT = 4  # fractional bits of a vertex
_ONE = 1 << _SHIFT
_LEVELS = np.arange(256)[:, None]
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_FONT = cv2.FONT_HERSHEY_PLAIN
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
_PNG += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]  # a third faster, a sixth larger


class Scene(NamedTuple):
    """One drawn image; `masks[i]` is what is visible of object i, of class `CLASSES[labels[i]]`."""

    image: np.ndarray
    labels: list[int]
    masks: list[np.ndarray]
    domain: str


def _arc(radius: int, start: int, stop: int, cx: int = 0, cy: int = 0) -> list:
    """Points of a circle about (cx, cy), from `start` to `stop` degrees."""
    centre, axes = (10 * cx, 10 * cy), (10 * radius, 10 * radius)
    return (cv2.ellipse2Poly(centre, axes, 0, start, stop, 8) / 10).tolist()


def _star(tips: int, inner: int) -> list:
    """A regular polygon with `tips` tips; `inner` is the radius of the vertices between them."""
    steps = [(100 if k % 2 == 0 else inner, math.pi * k / tips) for k in range(2 * tips)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in steps]


_LOBE = _arc(49, 212, 403, cx=42, cy=-28)
# The contours of every class in a circle of radius 100 about (0, 0), y down; a second is a hole.
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
    """A class's contours about (0, 0), narrowed to squeeze / 256 and turned, in 1/16 pixel."""
    cos, sin = _cos_sin(degrees)
    # fillPoly adds the pixels on the outline, half a pixel all around.
    turn = np.array([[cos * squeeze, sin * squeeze], [-sin * 256, cos * 256]]) * (diameter - 1)
    return [(c @ turn * _ONE // (2000 << 22)).astype(np.int32) for c in _TEMPLATES[label]]


def _fill(canvas: np.ndarray, contours: list, value: int | list, x: int, y: int) -> np.ndarray:
    """Fills contours moved by (x, y) / 16 pixels, in place; a contour within another is a hole."""
    return cv2.fillPoly(canvas, contours, value, cv2.LINE_8, _SHIFT, (x, y))


def polygons(mask: np.ndarray) -> list[list[int]]:
    """COCO polygons along the pixel edges of a mask (H, W): rasterised, they give it back exactly.

    Each 8-connected part is one flat list x0, y0, x1, y1, ... A cut leads from its first vertex to
    each of its holes and back again, so that the parity rule leaves the holes out.
    """
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    part = mask.view(np.uint8)[y : y + height, x : x + width]
    # The pixel at x becomes two, at 2x and 2x + 1; what is traced through their centres is then
    # moved out to the edges they stand at, x and x + 1.
    twice = cv2.resize(part, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(twice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    loops = [(contour[:, 0] + 1) // 2 + (x, y) for contour in contours]
    loops = [c[np.diff(c, axis=0, prepend=c[-1:]).any(axis=1)] for c in loops]  # no point twice
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
    """Two grids (h, w) in 1/16 pixel, along an angle and across it."""
    cos, sin = _cos_sin(degrees)
    x, y = np.arange(width, dtype=np.int32), np.arange(height, dtype=np.int32)[:, None]
    return x * cos + y * sin >> 10, y * cos - x * sin >> 10


def _ramp(u: np.ndarray) -> np.ndarray:
    """A grid of coordinates scaled to 0..255."""
    return (u - u.min()) * 255 // max(int(np.ptp(u)), 1)


def _texture(rng: np.random.Generator, shape: tuple[int, int], colours: np.ndarray, kinds: int):
    """A two-colour pattern (h, w, 3) uint8, one of the first `kinds` of these:

    flat, gradient, stripes, checker, dots, blobs, with a period of 6 to 24 pixels; colours (2, 3).
    """
    height, width = shape
    kind, degrees, period = rng.integers([0, 0, 6 * _ONE], [kinds, 360, 24 * _ONE]).tolist()
    u, v = _coordinates(degrees, height, width)
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
    ramp = colours[0] + (colours[1] - colours[0]) * _LEVELS // 255
    return cv2.applyColorMap(weights.astype(np.uint8), ramp.astype(np.uint8)[:, None])


def _contrasting(rng: np.random.Generator, others: list[np.ndarray]) -> np.ndarray:
    """A random colour (3,) at least 64 levels a channel, on average, from all `others`.

    Where 24 draws hold none, the one furthest from its nearest.
    """
    draws = rng.integers(0, 256, (24, 3))
    nearest = np.abs(draws[:, None] - np.stack(others)).sum(axis=2).min(axis=1)
    return draws[np.minimum(nearest, 3 * 64).argmax()]  # the first of those that will do


def _smooth(image: np.ndarray, size: int) -> np.ndarray:
    """A Gaussian blur, `size` pixels wide, on OpenCV's bit-exact path."""
    return cv2.GaussianBlur(image, (size, size), 0, hint=cv2.ALGO_HINT_ACCURATE)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A dark to middling texture under thin, crooked strokes; also its two colours (2, 3)."""
    height, width = size
    colours = rng.integers(0, 150, (2, 3))
    image = _texture(rng, size, colours, kinds=6)
    reach = max(size) * _ONE // 6
    for _ in range(rng.integers(0, 9)):
        corners, thickness = rng.integers([2, 1], [6, 3]).tolist()
        start = rng.integers(0, [width * _ONE, height * _ONE])
        wobble = rng.integers(-reach // 3, reach // 3, (corners, 2))
        line = np.arange(corners)[:, None] * rng.integers(-reach, reach, 2) + wobble + start
        colour = rng.integers(0, 256, 3).tolist()
        cv2.polylines(image, [line.astype(np.int32)], False, colour, thickness, cv2.LINE_8, _SHIFT)
    return image, colours


def _paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, colour: np.ndarray):
    """Fills a mask (H, W) uint8, flat or shaded about `colour`; every second has an outline."""
    x, y, width, height = cv2.boundingRect(mask)
    mask = mask[y : y + height, x : x + width]
    view = image[y : y + height, x : x + width]
    second = np.clip(colour + rng.integers(-70, 71, 3), 0, 255)
    outlined, bright = rng.integers(0, 2, 2).tolist()
    cv2.copyTo(_texture(rng, mask.shape, np.stack([colour, second]), kinds=2), mask, view)
    if outlined:
        inside = cv2.erode(mask, _CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        view[mask > inside] = colour // 3 + 170 * bright


def _photograph(rng: np.random.Generator, image: np.ndarray, domain: str) -> np.ndarray:
    """The scene as a camera of `domain` sees it."""
    image = _smooth(image, 3)
    if domain == "lighting":  # nearly night: a lamp on one side, fading across the image
        degrees, low, high = rng.integers([0, 30, 120], [360, 64, 190]).tolist()
        light = low + (high - low) * _ramp(_coordinates(degrees, *image.shape[:2])[0]) // 255
        light = cv2.merge([light.astype(np.uint8)] * 3)
        return (np.multiply(image, light, dtype=np.uint16) >> 8).astype(np.uint8)
    if domain == "palette":  # false colours: channels change places and ranges; red is high
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
    if domain == "contrast":  # fog: a fifth to a third of the contrast, on a bright level
        gain, level = rng.integers([50, 130], [86, 165]).tolist()
        return cv2.LUT(image, (level + _LEVELS * gain // 256).astype(np.uint8))
    if domain == "inverted":
        return 255 - image
    return image


def draw_detection(
    seed: int, split: str, index: int, size: tuple[int, int], domain: str | None = None
) -> Scene:
    """Image `index` of a split: up to seven objects, later ones covering earlier ones.

    An object that would leave another, or itself, with less than `MIN_VISIBLE` of its pixels or
    less than `MIN_AREA` is not drawn: everything that is drawn is annotated. `split` is one of
    `SPLITS`, `size` (H, W); the domains take turns unless `domain` names one, on which the scene
    does not depend.
    """
    domain = domain or DOMAINS[index % len(DOMAINS)]
    rng = np.random.default_rng([seed, 0, SPLITS.index(split), index])
    image, backdrop = _background(rng, size)
    owner = np.zeros(size, np.uint8)
    labels, needed, colours = [], [0], [*backdrop]
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
            areas = cv2.calcHist([trial], [0], None, [number + 1], [0, number + 1])
            if (areas >= [*needed, need]).all():
                break
        else:
            continue
        owner = trial
        labels.append(label)
        needed.append(need)
        colours.append(_contrasting(rng, colours))
        _paint(rng, image, (owner == number).astype(np.uint8), colours[-1])
    masks = [owner == i + 1 for i in range(len(labels))]
    return Scene(_photograph(rng, image, domain), labels, masks, domain)


def _place(rng: np.random.Generator, owner: np.ndarray) -> tuple[int, int, int]:
    """A centre (x, y) in 1/16 pixel and a diameter in pixels; every third time upon an object."""
    height, width = owner.shape
    step = int(rng.integers(len(DIAMETERS) - 1))
    low, high = (max(12, min(height, width) * d // 128) for d in DIAMETERS[step : step + 2])
    diameter = int(rng.integers(low, high + 1))
    taken = np.flatnonzero(owner) if rng.integers(3) == 0 else ()
    if len(taken):
        y, x = divmod(int(taken[rng.integers(len(taken))]), width)
        return x * _ONE, y * _ONE, diameter
    # A quarter of the diameter may leave the image.
    edge = min(diameter * _ONE // 4, min(height, width) * _ONE // 2)
    x, y = rng.integers(edge, [width * _ONE - edge + 1, height * _ONE - edge + 1]).tolist()
    return x, y, diameter


def draw_classification(
    seed: int, split: str, index: int, size: tuple[int, int], domain: str | None = None
) -> Scene:
    """Image `index` of a split: one object near the middle. Classes take turns, then domains."""
    domain = domain or DOMAINS[index // len(CLASSES) % len(DOMAINS)]
    rng = np.random.default_rng([seed, 1, SPLITS.index(split), index])
    image, backdrop = _background(rng, size)
    label = index % len(CLASSES)
    short = min(size)
    diameter, squeeze = rng.integers([short * 3 // 8, 200], [short * 7 // 8, 257]).tolist()
    degrees = int(rng.integers(-TILT, TILT + 1)) % 360
    spare = (short - diameter) * _ONE // 2 + short  # a sixteenth of it may leave the image
    x, y = (np.array(size[::-1]) * _ONE // 2 + rng.integers(-spare, spare + 1, 2)).tolist()
    mask = _fill(np.zeros(size, np.uint8), _pose(label, diameter, squeeze, degrees), 1, x, y)
    _paint(rng, image, mask, _contrasting(rng, [*backdrop]))
    return Scene(_photograph(rng, image, domain), [label], [mask > 0], domain)


def domain_of(file_name: str) -> str | None:
    """The domain that a file of `make_classification` is of, or None for another's file."""
    domain = Path(file_name).stem.rpartition("_")[2]
    return domain if domain in DOMAINS else None


def datasets_root() -> Path:
    """Where datasets live: the environment's DETECTRON2_DATASETS, "./datasets" by default."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets")


def make_detection(root=None, *, seed=0, size=128, num_train=4000, num_val=500) -> Path:
    """Makes the COCO set unless it is there already; returns its folder, `root`/shapes.

    shapes/{train,val}/000001.png, shapes/annotations/instances_{train,val}.json, and the same
    annotations by domain, instances_{train,val}_{domain}.json. Image dicts hold their "domain".
    Masks are polygons of the visible part; boxes and areas are the mask's. The folder appears whole
    or not at all, and several processes may make it at once.

    Args:
        root (path): the folder of datasets; None: `datasets_root()`.
        seed (int): of every choice.
        size (int or (H, W)): of the images, at least 64 pixels each way.
        num_train, num_val (int): images.

    Raises:
        ValueError: a parameter is out of range.
        FileExistsError: the folder holds other files, or a set made with other parameters.
    """
    return _make("detection", root, seed, size, num_train, num_val)


def make_classification(root=None, *, seed=0, size=64, num_train=6000, num_val=1200) -> Path:
    """Makes the ImageFolder set unless it is there already; returns its folder.

    shapes_cls/{train,val}/<class>/000123_<domain>.png, one object an image. Otherwise as
    `make_detection`; the images are at least 32 pixels high and wide.
    """
    return _make("classification", root, seed, size, num_train, num_val)


def ensure_detection(root=None) -> Path:
    """The default COCO set under `root`, made on first use. Raises as `make_detection`."""
    return make_detection(root)


def _make(kind: str, root, seed: int, size, num_train: int, num_val: int) -> Path:
    folder, smallest, write, _ = _KINDS[kind]
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2 or min(size) < smallest:
        raise ValueError(f"size is {size}: {kind} images need (H, W) of {smallest} pixels or more")
    if seed < 0 or min(num_train, num_val) < 1:
        raise ValueError(
            f"seed is {seed}, num_train {num_train}, num_val {num_val} (least: 0, 1, 1)"
        )
    info = {"generator": GENERATOR, "version": VERSION, "kind": kind, "seed": seed}
    info.update(size=list(size), num_train=num_train, num_val=num_val)
    root = datasets_root() if root is None else Path(root)
    target = root / folder
    if _is_made(target, info):
        return target
    root.mkdir(parents=True, exist_ok=True)
    logger.info(f"Drawing {num_train} + {num_val} {kind} images of {size[0]}x{size[1]} pixels")
    # Every process builds in a folder of its own; the first to finish gives it the name.
    with tempfile.TemporaryDirectory(prefix=f".{folder}-", dir=root) as own:
        new = Path(own, "new")
        new.mkdir()
        (new / "info.json").write_text(json.dumps(info, indent=1))
        write(new, info)
        while True:
            try:
                os.rename(new, target)
                break
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            if _is_made(target, info):
                break
            with contextlib.suppress(FileNotFoundError):  # another process may have moved it away
                os.rename(target, Path(own, "old"))
                shutil.rmtree(Path(own, "old"))
    return target


def _is_made(target: Path, info: dict) -> bool:
    """Whether `target` holds the set `info` asks for; an error where it holds something else."""
    found = None
    for _ in range(2):  # twice, as another process may rename a folder between two looks
        try:
            found = json.loads((target / "info.json").read_text())
            break
        except FileNotFoundError:
            if not target.is_dir() or not os.listdir(target):
                return False
        except (ValueError, NotADirectoryError):
            break
    way = "or choose another root (--root or the environment's DETECTRON2_DATASETS)"
    if not isinstance(found, dict) or found.get("generator") != GENERATOR:
        raise FileExistsError(f"{target} is there, and {GENERATOR} did not make it: move it, {way}")
    kept = ("kind", "seed", "size", "num_train", "num_val")
    other = [f"{k} {found.get(k)} (asked for: {info[k]})" for k in kept if found.get(k) != info[k]]
    if other:
        raise FileExistsError(f"{target} holds a set with {', '.join(other)}: remove it, {way}")
    if found != info:
        logger.warning(f"{target} is of generator version {found.get('version')}: made anew")
        return False
    names = [name for place, _, names in os.walk(target) for name in names if place != str(target)]
    if len(names) < info["num_train"] + info["num_val"] + _KINDS[info["kind"]][3]:
        logger.warning(f"{target} lacks files: made anew")
        return False
    return True


def _write_png(path: Path, image: np.ndarray) -> None:
    path.write_bytes(cv2.imencode(".png", image, _PNG)[1].tobytes())


def _scenes(info: dict, split: str) -> Iterator[tuple[int, Scene]]:
    draw = draw_detection if info["kind"] == "detection" else draw_classification
    indices = range(info[f"num_{split}"])
    for index in tqdm(indices, f"shapes {split}", unit="image", disable=None):
        yield index, draw(info["seed"], split, index, tuple(info["size"]))


def _write_detection(folder: Path, info: dict) -> None:
    height, width = info["size"]
    categories = [{"id": i + 1, "name": c, "supercategory": "shape"} for i, c in enumerate(CLASSES)]
    (folder / "annotations").mkdir()
    for split in SPLITS:
        (folder / split).mkdir()
        images, annotations = [], []
        digest = hashlib.sha256()
        for index, scene in _scenes(info, split):
            name = f"{index + 1:06d}.png"
            image = {"id": index + 1, "file_name": name, "height": height, "width": width}
            images.append({**image, "domain": scene.domain})
            _write_png(folder / split / name, scene.image)
            digest.update(scene.image.tobytes())
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label + 1,
                        "iscrowd": 0,
                        "area": int(mask.sum()),
                        "bbox": list(cv2.boundingRect(mask.view(np.uint8))),
                        "segmentation": polygons(mask),
                    }
                )
        digest.update(json.dumps(annotations).encode())
        logger.info(f"{split}: {len(annotations)} objects, sha256 {digest.hexdigest()}")
        about = {
            **info,
            "description": f"Shapes, {split}: synthetic images in {len(DOMAINS)} domains",
            "sha256": digest.hexdigest(),  # of the split's pixels (BGR) and annotations
        }
        for domain in (None, *DOMAINS):
            kept = [image for image in images if domain in (None, image["domain"])]
            ids = {image["id"] for image in kept}
            coco = {"info": about, "licenses": [], "images": kept, "categories": categories}
            coco["annotations"] = [a for a in annotations if a["image_id"] in ids]
            name = f"instances_{split}_{domain}.json" if domain else f"instances_{split}.json"
            (folder / "annotations" / name).write_text(json.dumps(coco, separators=(",", ":")))


def _write_classification(folder: Path, info: dict) -> None:
    for split in SPLITS:
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index, scene in _scenes(info, split):
            name = f"{index:06d}_{scene.domain}.png"
            _write_png(folder / split / CLASSES[scene.labels[0]] / name, scene.image)


# kind -> folder, smallest side of an image, writer (folder, info), files beside the images
_KINDS = {
    "detection": ("shapes", 64, _write_detection, len(SPLITS) * (1 + len(DOMAINS))),
    "classification": ("shapes_cls", 32, _write_classification, 0),
}


def contact_sheet(folder: str | os.PathLike, path: str | os.PathLike, columns: int = 8) -> None:
    """Draws `columns` validation images of every domain, a row each, with outlines and class names.

    `folder` is what `make_detection` or `make_classification` returned, `path` the PNG to write.
    """
    info = json.loads(Path(folder, "info.json").read_text())
    blank = np.zeros((2 * info["size"][0] + 2, 2 * info["size"][1] + 2, 3), np.uint8)
    rows = {domain: [] for domain in DOMAINS}
    for _, scene in _scenes(info, "val"):
        if len(rows[scene.domain]) < columns:
            rows[scene.domain].append(_tile(scene))
    for domain, row in rows.items():
        side = np.zeros((len(blank), 90, 3), np.uint8)
        cv2.putText(side, domain, (6, len(blank) // 2), _FONT, 1, (255, 255, 255), 1)
        rows[domain] = np.hstack([side, *row, *[blank] * (columns - len(row))])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    _write_png(partial, np.vstack(list(rows.values())))
    os.replace(partial, path)


def _tile(scene: Scene) -> np.ndarray:
    """A scene twice as large, with its polygons and the names of its classes."""
    tile = cv2.resize(scene.image, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    for mask in scene.masks:
        outline = [2 * np.array(flat, np.int32).reshape(-1, 2) for flat in polygons(mask)]
        cv2.polylines(tile, outline, True, (255, 255, 255), 1)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        x, y, _, _ = cv2.boundingRect(mask.view(np.uint8))
        (width, height), below = cv2.getTextSize(CLASSES[label], _FONT, 0.8, 1)
        x, y = max(0, min(2 * x, tile.shape[1] - width)), max(2 * y, height)
        tile[y - height : y + below, x : x + width] //= 4
        cv2.putText(tile, CLASSES[label], (x, y), _FONT, 0.8, (0, 255, 255), 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(tile, 1, 1, 1, 1, cv2.BORDER_CONSTANT)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def main(argv: list[str] | None = None) -> None:
    """`python -m refbn_d2.data.shapes`: makes a set and its contact sheet."""
    parser = argparse.ArgumentParser(
        "python -m refbn_d2.data.shapes", argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--root", metavar="DIR", help="of datasets [$DETECTRON2_DATASETS or ./datasets]")
    add("--classification", action="store_true", help="the ImageFolder set, not the COCO set")
    add("--seed", type=int, metavar="N", help="of every choice [0]")
    add("--size", type=_size, metavar="PX", help="128, or 96x160: height first [64 to classify]")
    add("--train", type=int, metavar="N", dest="num_train", help="images [4000; 6000 to classify]")
    add("--val", type=int, metavar="N", dest="num_val", help="images [500; 1200 to classify]")
    add("--contact-sheet", metavar="PNG", help="[contact_sheet.png in the set's folder]")
    given = vars(parser.parse_args(argv))  # what was not given is left to the functions' defaults
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make = make_classification if given.pop("classification", False) else make_detection
    sheet = given.pop("contact_sheet", None)
    try:
        folder = make(**given)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    sheet = sheet or folder / "contact_sheet.png"
    contact_sheet(folder, sheet)
    print(f"{folder}: {sheet} shows a part of it")


if __name__ == "__main__":
    main()
