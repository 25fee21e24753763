"""Pictures of a training: its curves, and what a model sees in images. PNG, drawn off screen."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from refbn_d2.data.images import read_image
from refbn_d2.data.masks import decode_mask, rasterize

# Okabe and Ito's colours, which people with any colour vision tell apart, the first contrasting
# most; then all of them darker. Classes beyond share colours: their labels tell them apart.
_BRIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
COLORS = (*_BRIGHT, *(to_hex([0.5 * channel for channel in to_rgb(c)]) for c in _BRIGHT))
_INK, _FAINT = "#222222", "#8a8a8a"
_DPI = 100
_FEW = 20  # points of a curve that are shown each, and not smoothed


def _save(figure: Figure, path: str | os.PathLike, **options) -> None:
    """Write a PNG whole, or not at all. Folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- curves

_LOSS = re.compile(r"(total_loss|loss.*|.*/loss)")
_AP = re.compile(r"(.*)\b(AP|AP50|AP75)")
_ACCURACY = re.compile(r"(.*)\b(top1|top5)")
_STYLES = {  # width and dashes
    "AP": (2.2, "-"), "AP50": (1.1, "--"), "AP75": (1.1, ":"),
    "top1": (2.2, "-"), "top5": (1.1, "--"),
}  # fmt: skip


def plot_curves(metrics_json: str | os.PathLike, path: str | os.PathLike) -> None:
    """Losses, average precision or accuracy, and learning rate over the iterations, in one PNG.

    Of what a run logged, "total_loss", "loss*" and "<set>/loss", "<task>/AP", AP50, AP75,
    "<set>/top1", top5, and "lr" are drawn; a panel without values is left out. nan interrupts a
    line. What is measured in training shows as logged (faint) and smoothed.

    Args:
        metrics_json: Detectron2's metrics.json: a JSON object a line, each with "iteration". Lines
            of one iteration are taken together, and the last one counts (a resumed run); a last
            line that is cut off is passed over, for the run may be writing it.
        path: the PNG.

    Raises:
        FileNotFoundError: there is no such file of metrics.
        ValueError: another line than the last is not JSON, or there is nothing to draw.
    """
    curves = _read_curves(Path(metrics_json))
    panels = [
        (draw, width, chosen)
        for draw, width, pattern in (
            (_draw_losses, 6.2, _LOSS),
            (partial(_draw_metrics, "Average precision (%)", _AP), 4.6, _AP),
            (partial(_draw_metrics, "Accuracy (%)", _ACCURACY), 4.6, _ACCURACY),
            (_draw_rates, 3.4, re.compile("lr")),
        )
        if (chosen := {name: c for name, c in curves.items() if pattern.fullmatch(name)})
    ]
    if not panels:
        raise ValueError(
            f"{metrics_json} has nothing to draw: no losses, AP, accuracy or learning rate over "
            "iterations."
        )
    widths = [width for _, width, _ in panels]
    figure = Figure(figsize=(sum(widths), 3.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for (draw, _, chosen), ax in zip(panels, axes, strict=True):
        draw(ax, chosen)
    _save(figure, path, dpi=130)


def compare_curves(
    runs: Mapping[str, str | os.PathLike],
    metrics: Mapping[str, str],
    path: str | os.PathLike,
) -> None:
    """One panel a metric, one line a run, in one PNG. Losses have a logarithmic axis.

    Args:
        runs: {label: metrics.json}, as `plot_curves` reads it. A run without a metric has no line.
        metrics: {name in metrics.json: title of the panel}.
        path: the PNG.

    Raises:
        FileNotFoundError: there is no such file of metrics.
        ValueError: a file cannot be read, or no run has a metric.
    """
    curves = {label: _read_curves(Path(file)) for label, file in runs.items()}
    figure = Figure(figsize=(4.8 * len(metrics) + 1.2, 3.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    for ax, (name, title) in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True
    ):
        _style(ax, title)
        drawn = [(label, *c[name]) for label, c in curves.items() if name in c]
        if not drawn:
            raise ValueError(f"none of {', '.join(map(str, runs.values()))} has {name!r}.")
        colors = dict(zip(curves, COLORS * len(curves), strict=False))
        for label, x, y in drawn:
            last = f"  {y[np.isfinite(y)][-1]:.3g}"
            _noisy_line(ax, x, y, color=colors[label], linewidth=2.0, label=label + last)
        if _LOSS.fullmatch(name):
            _log_axis(ax)
        else:
            ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    _save(figure, path, dpi=130)


def _read_curves(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name: (iterations, values), iterations ascending."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file of metrics.")
    lines = file.read_text().splitlines()
    points: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
        for name, value in record.items() if isinstance(record, dict) else ():
            if isinstance(value, int | float) and "iteration" in record:
                points.setdefault(name, {})[record["iteration"]] = value
    curves = {}
    for name, values in points.items():
        x = np.array(sorted(values))
        y = np.array([values[i] for i in x], float)
        y[np.isinf(y)] = np.nan
        if np.isfinite(y).any():
            curves[name] = x, y
    return curves


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average under a bell centred on each point (so that it does not lag); nan stays nan."""
    sigma = len(values) / 60
    offsets = np.arange(-int(3 * sigma), int(3 * sigma) + 1)
    bell = np.exp(-0.5 * (offsets / sigma) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), bell, mode="same")
    weight = np.convolve(known.astype(float), bell, mode="same")
    return np.where(known, total / np.maximum(weight, 1e-12), np.nan)


def _style(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=10)
    ax.set_xlabel("iteration", fontsize=9, color=_FAINT)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x and ax.get_xlim()[1] > 1e4 else f"{x:g}")
    )
    ax.tick_params(labelsize=8.5, colors="#555555", length=0)
    ax.grid(True, color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#bbbbbb")


def _line(ax: Axes, x: np.ndarray, y: np.ndarray, **style) -> None:
    """A line, with its points where they are few."""
    if len(x) <= _FEW:
        style |= {"marker": "o", "markersize": 1.5 + style["linewidth"]}
    ax.plot(x, y, solid_capstyle="round", **style)


def _noisy_line(ax: Axes, x: np.ndarray, y: np.ndarray, **style) -> None:
    """A smoothed line before a faint one of the values themselves, unless they are few."""
    if len(y) > _FEW:
        ax.plot(x, y, color=style["color"], linewidth=0.8, alpha=0.25)
        y = _smooth(y)
    _line(ax, x, y, **style)


def _draw_losses(ax: Axes, losses: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    _style(ax, "Loss")
    names = sorted(losses, key=lambda name: (name != "total_loss", name))
    colors = iter(COLORS * len(names))
    for name in names:
        x, y = losses[name]
        total = name == "total_loss"
        style = {"color": _INK if total else next(colors), "linewidth": 2.2 if total else 1.6}
        label = "total" if total else name.removeprefix("loss_").replace("/", " ")
        _noisy_line(ax, x, y, label=label, **style)
    if all((y[np.isfinite(y)] > 0).all() for _, y in losses.values()):
        _log_axis(ax)
    ax.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8.5, labelcolor=_INK
    )


def _log_axis(ax: Axes) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _draw_metrics(
    title: str,
    pattern: re.Pattern,
    ax: Axes,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """What `pattern` splits into task and metric: a colour for each task."""
    _style(ax, title)
    tasks = list(dict.fromkeys(pattern.fullmatch(name)[1] for name in curves))
    for task, color in zip(tasks, COLORS * len(tasks), strict=False):
        for metric, (width, dashes) in _STYLES.items():
            if task + metric in curves:
                x, y = curves[task + metric]
                label = (task + metric).replace("/", " ")
                draw = _noisy_line if task == "train/" else _line
                style = {"color": color, "linewidth": width, "linestyle": dashes}
                draw(ax, x, y, label=f"{label}  {y[np.isfinite(y)][-1]:.1f}", **style)
    ax.set_ylim(bottom=0)
    ax.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8.5, labelcolor=_INK
    )


def _draw_rates(ax: Axes, rates: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    _style(ax, "Learning rate")
    _line(ax, *rates["lr"], color=COLORS[0], linewidth=1.6)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# ---- samples

SAMPLES_SHOWN = 8  # pictures of a test set that a run draws

_TILE = 350  # pixels of an image's longer side
_GAP, _PAIR_GAP, _MARGIN, _HEADER, _LEGEND = 8, 26, 18, 24, 34


def draw_samples(
    items: Sequence[tuple[np.ndarray, Mapping | None, Mapping | None]],
    class_names: Sequence[str],
    path: str | os.PathLike,
    columns: int = 4,
    min_score: float = 0.5,
) -> None:
    """A grid of images, each with its predictions beside its ground truth, as one PNG.

    Boxes and masks have their class's colour; a label that would cover another is left out, for the
    colours are explained below.

    Args:
        items: (image uint8 (H, W, 3) RGB, prediction or None, ground truth or None) each. Both are
            dicts of arrays or tensors: "boxes" (N, 4) XYXY in the image, "classes" (N,) from 0,
            and, where there are, "scores" (N,) and "masks" bool (N, H, W).
        class_names: by class index.
        path: the PNG.
        columns: pictures side by side; an image with prediction and ground truth is two.
        min_score: predictions below are not drawn.

    Raises:
        ValueError: there are no items, an image is of another kind, or a class has no name.
    """
    if not items:
        raise ValueError(f"{path}: there are no images to draw.")
    headers = [
        header
        for header, index in (("prediction", 1), ("ground truth", 2))
        if any(item[index] is not None for item in items)
    ] or [""]
    tiles = []  # a row of pictures for each item
    for image, prediction, truth in items:
        content = {"prediction": prediction, "ground truth": truth}
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
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
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
    _save(figure, path, dpi=_DPI)


def sample_item(dataset_dict: dict, prediction: dict) -> tuple[np.ndarray, dict, dict]:
    """(RGB picture, prediction, ground truth) as `draw_samples` takes them.

    Args:
        dataset_dict: in Detectron2's format, boxes as (x, y, width, height).
        prediction: "pred_boxes" (N, 4), "scores", "pred_classes" (N,), and "pred_masks" (N, H, W)
            where there are.
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
    """Width and height of a text in pixels."""

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
    """Of a tensor on any device, an array or a list."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


class _Tile:
    """One picture: the image at a good size, masks and boxes drawn on it, and where labels go."""

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
        # Enlarged pixels stay squares: repeat them beyond the size, then average down to it.
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
                f"Class {classes.max()} is to be drawn, but there are {len(class_names)} class "
                "names."
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
        """Each label at its box where it covers no other, the best first; without place, none."""
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
    """A line of coloured squares with class names; what finds no room is left out."""
    x = _MARGIN
    for class_ in classes:
        name = class_names[class_]
        step = 16 + measure(name, 9)[0] + 18
        if x + step > width:
            ax.text(x, y, "...", fontsize=9, color=_INK, va="center")
            break
        color = COLORS[class_ % len(COLORS)]
        ax.add_patch(Rectangle((x, y - 5), 10, 10, facecolor=color, linewidth=0))
        ax.text(x + 16, y, name, fontsize=9, color=_INK, va="center", parse_math=False)
        x += step
