"""Make the shapes and their contact sheet from the command line."""

import argparse
import json
import logging
import os
from pathlib import Path

import cv2
import numpy as np

from refbn_d2.data.names import DOMAINS
from refbn_d2.data.shapes.dataset import encode_png, make_classification, make_detection, scenes
from refbn_d2.data.shapes.drawing import CLASSES, Scene, polygons
from refbn_d2.utils.errors import RefBNError
from refbn_d2.utils.file_io import write_bytes

_FONT = cv2.FONT_HERSHEY_PLAIN


def contact_sheet(folder: str | os.PathLike, path: str | os.PathLike, columns: int = 8) -> None:
    """Draw `columns` validation images of every domain, with outlines and class names.

    Each domain is a row. `folder` is what `make_detection` or `make_classification` returned, and
    `path` is the PNG to write.
    """
    info = json.loads(Path(folder, "info.json").read_text())
    blank = np.zeros((2 * info["size"][0] + 2, 2 * info["size"][1] + 2, 3), np.uint8)
    rows: dict[str, list[np.ndarray]] = {domain: [] for domain in DOMAINS}
    for _, scene in scenes(info, "val"):
        if len(rows[scene.domain]) < columns:
            rows[scene.domain].append(_tile(scene))
    strips = []
    for domain, row in rows.items():
        side = np.zeros((len(blank), 90, 3), np.uint8)
        cv2.putText(side, domain, (6, len(blank) // 2), _FONT, 1, (255, 255, 255), 1)
        strips.append(np.hstack([side, *row, *[blank] * (columns - len(row))]))
    write_bytes(path, encode_png(np.vstack(strips)))


def _tile(scene: Scene) -> np.ndarray:
    """Return a scene, enlarged twice, with its polygons and the names of its classes."""
    tile: np.ndarray = cv2.resize(scene.image, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
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
    """Make a set and its contact sheet: `python -m refbn_d2.data.shapes`."""
    parser = argparse.ArgumentParser(
        "python -m refbn_d2.data.shapes", argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--root", metavar="DIR", help="folder of datasets [$DETECTRON2_DATASETS or ./datasets]")
    add("--classification", action="store_true", help="the ImageFolder set, not the COCO set")
    add("--seed", type=int, metavar="N", help="seed of the drawing [0]")
    add("--size", type=_size, metavar="PX", help="128, or 96x160: height x width [128; 64]")
    add("--train", type=int, metavar="N", dest="num_train", help="images to train on [4000; 6000]")
    add("--val", type=int, metavar="N", dest="num_val", help="images to validate on [500; 1200]")
    add("--contact-sheet", metavar="PNG", help="[contact_sheet.png in the set's folder]")
    given = vars(parser.parse_args(argv))  # for the rest the functions have defaults
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make = make_classification if given.pop("classification", False) else make_detection
    sheet = given.pop("contact_sheet", None)
    try:
        folder = make(**given)
    except (RefBNError, FileExistsError) as error:
        parser.error(str(error))
    sheet = sheet or folder / "contact_sheet.png"
    contact_sheet(folder, sheet)
    print(f"{folder}: {sheet} shows a part of it")


if __name__ == "__main__":
    main()
