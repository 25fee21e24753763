"""Means with their intervals, side by side."""

import os
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from refbn_d2.visualization.style import COLORS, FAINT, INK, save_figure

Estimated = tuple[float, tuple[float, float] | None]  # mean, interval


def plot_intervals(
    groups: Mapping[str, Mapping[str, Estimated]], title: str, path: str | os.PathLike
) -> None:
    """Draw one panel a group, a line a name: a dot at the mean, its value, a bar over the interval.

    Args:
        groups: {panel: {name: (mean, interval or None)}}; a name may miss in a panel.
        title: of the values' axis.
        path: the PNG.

    Raises:
        ValueError: there is nothing to draw.
    """
    names: Sequence[str] = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not names:
        raise ValueError("there is no mean to draw")
    figure = Figure(
        figsize=(2.6 * len(groups) + 2.2, 0.34 * len(names) + 1.3), layout="constrained"
    )
    axes = figure.subplots(1, len(groups), sharey=True, sharex=True, squeeze=False)[0]
    colors = dict(zip(names, COLORS * len(names), strict=False))
    for ax, (panel, group) in zip(axes, groups.items(), strict=True):
        for name, (mean, interval) in group.items():
            y = names.index(name)
            if interval:
                ax.plot(interval, (y, y), color=colors[name], linewidth=2, alpha=0.45)
            ax.plot([mean], [y], "o", color=colors[name], markersize=6)
            ax.text(mean, y - 0.2, f"{mean:.3g}", fontsize=8, color=INK, ha="center", va="bottom")
        ax.set_title(panel, loc="left", fontsize=10, fontweight="bold", color=INK)
        ax.set_xlabel(title, fontsize=9, color=FAINT)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.tick_params(labelsize=9, colors="#444444", length=0)
        ax.grid(True, axis="x", color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
        for spine in ax.spines.values():
            spine.set_visible(False)
    _cut(axes, groups)
    save_figure(figure, path, dpi=130)


def _cut(axes, groups: Mapping[str, Mapping[str, Estimated]]) -> None:
    """Show the means: an interval of two seeds may be ten times as wide, and is cut off."""
    means = [mean for group in groups.values() for mean, _ in group.values()]
    room = 1.0 * (max(means) - min(means)) or 0.1 * abs(means[0]) or 1.0
    left = min(means) - room
    axes[0].set_xlim(max(left, 0) if min(means) >= 0 else left, max(means) + room)
