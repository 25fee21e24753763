"""Define the colors of figures, and save figures."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from refbn_d2.utils.file_io import written_whole

# Okabe and Ito's colors, which people with any color vision can distinguish, the first with the
# most contrast; then the same ones darker. Further classes share colors: labels distinguish them.
_BRIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
COLORS = (*_BRIGHT, *(to_hex([0.5 * channel for channel in to_rgb(c)]) for c in _BRIGHT))
INK, FAINT = "#222222", "#8a8a8a"
DPI = 100


def save_figure(figure: Figure, path: str | os.PathLike, **options) -> None:
    """Write a PNG, whole or not at all. Missing folders are made."""
    FigureCanvasAgg(figure)
    with written_whole(Path(path)) as file:
        figure.savefig(file, format="png", **options)
