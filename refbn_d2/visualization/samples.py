"""Draw a model's predictions beside the ground truth, off screen, as PNG."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from refbn_d2.data.images import read_image
from refbn_d2.data.masks import decode_mask, rasterize
from refbn_d2.visualization.style import COLORS, DPI, INK, save_figure

SAMPLES_SHOWN = 8  # pictures of a test set that a run draws
MIN_SCORE = 0.5  # of the predictions that are drawn

_TILE = 350  # pixels of an image's longer side
_GAP, _PAIR_GAP, _MARGIN, _HEADER, _LEGEND = 8, 26, 18, 24, 34


def draw_samples(
    items: Sequence[tuple[np.ndarray, Mapping | None, Mapping | None]],
    class_names: Sequence[str],
    path: str | os.PathLike,
    columns: int = 4,
    min_score: float = MIN_SCORE,
    titles: tuple[str, str] = ("prediction", "ground truth"),
) -> None:
    """Draw a grid of images, each with its predictions beside its ground truth, as one PNG.

    Boxes and masks have the color of their class. A label that would cover another is left out: a
    legend explains the colors.

    Args:
        items: a list of (image uint8 (H, W, 3) RGB, prediction or None, ground truth or None). Both
            are dicts of arrays or tensors: "boxes" (N, 4) XYXY in the image, "classes" (N,) from 0,
            and optionally "scores" (N,) and "masks" bool (N, H, W).
        class_names: by class index.
        path: the PNG to write.
        columns: pictures side by side; an image with prediction and ground truth counts as two.
        min_score: predictions with lower scores are not drawn.
        titles: of prediction and ground truth, which may also be two predictions.

    Raises:
        ValueError: there are no items, an image is not uint8 (H, W, 3), or a class has no name.
    """
    if not items:
        raise ValueError(f"{path}: there are no images to draw; give 1 or more items.")
    headers = [
        header
        for header, index in zip(titles, (1, 2), strict=True)
        if any(item[index] is not None for item in items)
    ] or [""]
    tiles = []  # a row of pictures for each item
    for image, prediction, truth in items:
        content = dict(zip(titles, (prediction, truth), strict=True))
        tiles.append(
            [_Tile(image, content.get(header), class_names, min_score) for header in headers]
        )

    per_row = min(max(columns // len(headers), 1), len(items))
    rows = [tiles[i : i + per_row] for i in range(0, len(tiles), per_row)]
    cell = max(tile.picture.shape[1] for item in tiles for tile in item)
    pair = len(headers) * cell + (len(headers) - 1) * _GAP
    heights = [max(tile.picture.shape[0] for item in row for tile in item) for row in rows]
    width = 2 * _MARGIN + per_row * pair + (per_row - 1) * _PAIR_GAP
    height = _MARGIN + _HEADER + sum(heights) + (len(rows) - 1) * _GAP + _LEGEND + _MARGIN // 2

    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    measure = _Measure(figure)
    top = _MARGIN + _HEADER
    for row, row_height in zip(rows, heights, strict=True):
        for i, item in enumerate(row):
            for j, tile in enumerate(item):
                left = _MARGIN + i * (pair + _PAIR_GAP) + j * (cell + _GAP)
                x = left + (cell - tile.picture.shape[1]) // 2
                h, w = tile.picture.shape[:2]
                canvas[top : top + h, x : x + w] = tile.picture
                tile.draw_labels(ax, x, top, measure)
        top += row_height + _GAP
    for i in range(per_row):
        for j, header in enumerate(headers):
            left = _MARGIN + i * (pair + _PAIR_GAP) + j * (cell + _GAP)
            ax.text(left, _MARGIN + 10, header, fontsize=10, color="#555555", va="center")
    classes = {c for item in tiles for tile in item for c in tile.classes}
    _draw_legend(ax, sorted(classes), class_names, top + _LEGEND // 2 - _GAP, width, measure)
    ax.imshow(canvas, interpolation="nearest", extent=(0, width, height, 0), aspect="auto")
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    save_figure(figure, path, dpi=DPI)


def sample_item(dataset_dict: dict, prediction: dict) -> tuple[np.ndarray, dict, dict]:
    """Return (RGB picture, prediction, ground truth), an item of `draw_samples`.

    Args:
        dataset_dict: in Detectron2's format, boxes as (x, y, width, height).
        prediction: "pred_boxes" (N, 4), "scores" (N,), "pred_classes" (N,), and optionally
            "pred_masks" (N, H, W).
    """
    h, w = dataset_dict["height"], dataset_dict["width"]
    truth = {"boxes": [], "classes": [], "masks": []}
    for annotation in dataset_dict["annotations"]:
        x, y, width, height = annotation["bbox"]
        truth["boxes"].append([x, y, x + width, y + height])
        truth["classes"].append(annotation["category_id"])
        if "segmentation" in annotation:
            segmentation = annotation["segmentation"]
            truth["masks"].append(
                decode_mask(segmentation["counts"], h, w)
                if isinstance(segmentation, dict)
                else rasterize(segmentation, h, w)
            )
    if len(truth["masks"]) < len(truth["boxes"]):
        del truth["masks"]
    predicted = {
        name.removeprefix("pred_"): value.cpu().numpy() for name, value in prediction.items()
    }
    return read_image(dataset_dict["file_name"], "RGB"), predicted, truth


class _Measure:
    """Measure width and height of a text in pixels."""

    def __init__(self, figure: Figure) -> None:
        self.renderer = FigureCanvasAgg(figure).get_renderer()

    def __call__(self, text: str, size: float) -> tuple[int, int]:
        width, height, _ = self.renderer.get_text_width_height_descent(
            text, FontProperties(size=size), False
        )
        return int(np.ceil(width)), int(np.ceil(height))


def _color(index: int) -> tuple[int, int, int]:
    return tuple(round(255 * channel) for channel in to_rgb(COLORS[index % len(COLORS)]))


def _luminance(index: int) -> float:
    return float(np.dot(to_rgb(COLORS[index % len(COLORS)]), (0.299, 0.587, 0.114)))


def _array(values) -> np.ndarray:
    """Return a tensor on any device, an array or a list as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


class _Tile:
    """One picture: the resized image with masks and boxes, and the labels to place on it."""

    def __init__(
        self,
        image: np.ndarray,
        content: Mapping | None,
        class_names: Sequence[str],
        min_score: float,
    ) -> None:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"An image to draw must be uint8 (H, W, 3), not {image.dtype} {image.shape}."
            )
        self.scale = _TILE / max(image.shape[:2])
        height, width = (max(1, round(side * self.scale)) for side in image.shape[:2])
        # Enlarged pixels stay square: repeat them past the size, then average down to it.
        repeat = math.ceil(self.scale)
        image = image.repeat(repeat, axis=0).repeat(repeat, axis=1)
        self.picture = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        self.classes: list[int] = []
        self.labels: list[tuple[str, int, np.ndarray]] = []  # text, class, box in the picture
        if content is not None:
            self._draw(content, class_names, min_score)

    def _draw(self, content: Mapping, class_names: Sequence[str], min_score: float) -> None:
        boxes = _array(content["boxes"]).reshape(-1, 4) * self.scale
        classes = _array(content["classes"]).astype(int)
        if len(classes) and not 0 <= classes.min() <= classes.max() < len(class_names):
            raise ValueError(
                f"Class {classes.max()} cannot be drawn: there are {len(class_names)} class names."
            )
        scores, masks = content.get("scores"), content.get("masks")
        order = np.arange(len(boxes))
        if scores is not None:
            scores = _array(scores)
            order = np.argsort(-scores, kind="stable")
            order = order[scores[order] >= min_score]
        for i in order[::-1] if masks is not None else ():  # the best on top
            self._draw_mask(_array(masks[i]), _color(classes[i]))
        for i in order[::-1]:
            corners = np.round(boxes[i]).astype(int).tolist()
            contrast = (255, 255, 255) if _luminance(classes[i]) < 0.3 else (0, 0, 0)
            shade = cv2.rectangle(self.picture.copy(), corners[:2], corners[2:], contrast, 4)
            cv2.addWeighted(shade, 0.4, self.picture, 0.6, 0, dst=self.picture)
            cv2.rectangle(self.picture, corners[:2], corners[2:], _color(classes[i]), 2)
        for i in order:
            name = class_names[classes[i]]
            text = name if scores is None else f"{name} {100 * scores[i]:.0f}"
            self.labels.append((text, classes[i], boxes[i]))
        self.classes = classes[order].tolist()

    def _draw_mask(self, mask: np.ndarray, color: tuple[int, int, int]) -> None:
        size = self.picture.shape[1::-1]
        mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        inside = mask.astype(bool)
        self.picture[inside] = (0.5 * self.picture[inside] + 0.5 * np.array(color)).astype(np.uint8)
        outline, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(self.picture, outline, -1, color, 1, cv2.LINE_AA)

    def draw_labels(self, ax: Axes, left: int, top: int, measure: _Measure) -> None:
        """Draw each label at its box, the best first; skip a label that would cover another."""
        height, width = self.picture.shape[:2]
        taken: list[tuple[float, float, float, float]] = []
        for text, class_, (x0, y0, x1, y1) in self.labels:
            w, h = (side + 6 for side in measure(text, 8))
            places = [(x0, y0 - h), (x0, y0), (x1 - w, y0 - h), (x1 - w, y1 - h), (x0, y1)]
            for x, y in places:
                x, y = min(max(x, 0), width - w), min(max(y, 0), height - h)
                free = all(
                    x >= tx + tw or tx >= x + w or y >= ty + th or ty >= y + h
                    for tx, ty, tw, th in taken
                )
                if x >= 0 and y >= 0 and free:
                    taken.append((x, y, w, h))
                    _draw_label(ax, text, class_, (left + x, top + y, w, h))
                    break


def _draw_label(ax: Axes, text: str, class_: int, place: tuple[float, float, float, float]) -> None:
    x, y, w, h = (round(v) for v in place)
    color = COLORS[class_ % len(COLORS)]
    ax.add_patch(Rectangle((x, y), w, h, facecolor=color, linewidth=0, zorder=2))
    ax.text(
        x + w / 2,
        y + h / 2,
        text,
        fontsize=8,
        color="white" if _luminance(class_) < 0.55 else "black",
        ha="center",
        va="center_baseline",
        parse_math=False,
        zorder=3,
    )


def _draw_legend(
    ax: Axes,
    classes: Iterable[int],
    class_names: Sequence[str],
    y: int,
    width: int,
    measure: _Measure,
) -> None:
    """Draw a line of colored squares with class names; names that do not fit are left out."""
    x = _MARGIN
    for class_ in classes:
        name = class_names[class_]
        step = 16 + measure(name, 9)[0] + 18
        if x + step > width:
            ax.text(x, y, "...", fontsize=9, color=INK, va="center")
            break
        color = COLORS[class_ % len(COLORS)]
        ax.add_patch(Rectangle((x, y - 5), 10, 10, facecolor=color, linewidth=0))
        ax.text(x + 16, y, name, fontsize=9, color=INK, va="center", parse_math=False)
        x += step
