"""Draw curves of a run's metrics.json."""

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from refbn_d2.utils.errors import DataError
from refbn_d2.utils.file_io import read_metrics
from refbn_d2.visualization.style import COLORS, FAINT, INK, save_figure

_FEW = 20  # curves with at most this number of points show every point, without smoothing
_LOSS = re.compile(r"(total_loss|loss.*|.*/loss)")
_AP = re.compile(r"(.*)\b(AP|AP50|AP75)")
_ACCURACY = re.compile(r"(.*)\b(top1|top5)")
_STYLES = {  # width and dashes
    "AP": (2.2, "-"), "AP50": (1.1, "--"), "AP75": (1.1, ":"),
    "top1": (2.2, "-"), "top5": (1.1, "--"),
}  # fmt: skip


def plot_curves(metrics_json: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draw losses, average precision or accuracy, and learning rate over the iterations as PNG.

    These metrics are drawn, and a panel without values is left out:

        losses             "total_loss", "loss*", "<set>/loss"
        average precision  "<task>/AP", "<task>/AP50", "<task>/AP75"
        accuracy           "<set>/top1", "<set>/top5"
        learning rate      "lr"

    A nan interrupts a line. Training metrics are drawn as logged (faint) and smoothed.

    Args:
        metrics_json: Detectron2's metrics.json: one JSON object per line, each with "iteration".
            Lines of one iteration are merged, and the last value counts (a resumed run). An
            incomplete last line is skipped: the run may be writing it.
        path: the PNG to write.

    Raises:
        FileNotFoundError: the file of metrics does not exist.
        DataError: a line other than the last is not JSON, or there is nothing to draw.
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
        raise DataError(
            f"{metrics_json} has nothing to draw: no losses, AP, accuracy or learning rate over "
            "iterations."
        )
    widths = [width for _, width, _ in panels]
    figure = Figure(figsize=(sum(widths), 3.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for (draw, _, chosen), ax in zip(panels, axes, strict=True):
        draw(ax, chosen)
    save_figure(figure, path, dpi=130)


def compare_curves(
    runs: Mapping[str, str | os.PathLike],
    metrics: Mapping[str, str],
    path: str | os.PathLike,
) -> None:
    """Draw one panel per metric with one line per run, as PNG. Losses have a logarithmic axis.

    Args:
        runs: {label: metrics.json}; see `plot_curves`. A run without the metric has no line.
        metrics: {name in metrics.json: title of the panel}.
        path: the PNG to write.

    Raises:
        FileNotFoundError: a file of metrics does not exist.
        DataError: a file cannot be read, or no run has a metric.
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
            raise DataError(f"none of {', '.join(map(str, runs.values()))} has {name!r}.")
        colors = dict(zip(curves, COLORS * len(curves), strict=False))
        for label, x, y in drawn:
            last = f"  {y[np.isfinite(y)][-1]:.3g}"
            _noisy_line(ax, x, y, color=colors[label], linewidth=2.0, label=label + last)
        if _LOSS.fullmatch(name):
            _log_axis(ax)
        else:
            ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    save_figure(figure, path, dpi=130)


def _read_curves(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {name: (iterations, values)}, with ascending iterations."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file of metrics.")
    points: dict[str, dict[int, float]] = {}
    for record in read_metrics(file):
        for name, value in record.items():
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
    """Smooth by a bell curve centered on each point, without lag; nan stays nan."""
    sigma = len(values) / 60
    offsets = np.arange(-int(3 * sigma), int(3 * sigma) + 1)
    bell = np.exp(-0.5 * (offsets / sigma) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), bell, mode="same")
    weight = np.convolve(known.astype(float), bell, mode="same")
    return np.where(known, total / np.maximum(weight, 1e-12), np.nan)


def _style(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    ax.set_xlabel("iteration", fontsize=9, color=FAINT)
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
    """Draw a line, with points if they are few."""
    if len(x) <= _FEW:
        style |= {"marker": "o", "markersize": 1.5 + style["linewidth"]}
    ax.plot(x, y, solid_capstyle="round", **style)


def _noisy_line(ax: Axes, x: np.ndarray, y: np.ndarray, **style) -> None:
    """Draw a smoothed line over the faint line of the values; if they are few, only their line."""
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
        style = {"color": INK if total else next(colors), "linewidth": 2.2 if total else 1.6}
        label = "total" if total else name.removeprefix("loss_").replace("/", " ")
        _noisy_line(ax, x, y, label=label, **style)
    if all((y[np.isfinite(y)] > 0).all() for _, y in losses.values()):
        _log_axis(ax)
    ax.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8.5, labelcolor=INK
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
    """Draw metrics, which `pattern` splits into task and metric, with a color for each task."""
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
        loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8.5, labelcolor=INK
    )


def _draw_rates(ax: Axes, rates: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    _style(ax, "Learning rate")
    _line(ax, *rates["lr"], color=COLORS[0], linewidth=1.6)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
