import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from refbn_d2.visualization.intervals import plot_intervals
from refbn_d2.visualization.style import COLORS


def columns(path, color):
    """Columns of the picture with pixels of a color."""
    pixels = np.asarray(Image.open(path).convert("RGB"), float) / 255
    return np.flatnonzero((np.abs(pixels - to_rgb(color)).max(axis=2) < 0.05).any(axis=0))


def test_dots_stand_where_the_means_are(tmp_path):
    path = tmp_path / "x.png"
    plot_intervals({"one": {"A": (1.0, None), "B": (3.0, (2.5, 3.5))}}, "AP", path)
    a, b = columns(path, COLORS[0]), columns(path, COLORS[1])
    assert a.mean() < b.mean()
    plot_intervals({"one": {"A": (3.0, None), "B": (1.0, None)}}, "AP", path)
    assert columns(path, COLORS[0]).mean() > columns(path, COLORS[1]).mean()


def test_panels_without_a_name_and_nothing_at_all(tmp_path):
    path = tmp_path / "x.png"
    plot_intervals({"one": {"A": (1.0, (-90, 90))}, "two": {"B": (1.0, None)}}, "AP", path)
    assert len(columns(path, COLORS[0])) and len(columns(path, COLORS[1]))
    with pytest.raises(ValueError, match="no mean"):
        plot_intervals({"one": {}}, "AP", path)
