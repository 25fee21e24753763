import json

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from refbn_d2.visualization.curves import _read_curves, _smooth, compare_curves, plot_curves
from refbn_d2.visualization.style import COLORS

RGB = [tuple(round(255 * v) for v in to_rgb(color)) for color in COLORS]


def read(path):
    return cv2.imread(str(path))[..., ::-1]


def count(picture, color):
    return (picture == color).all(axis=2).sum()


def records(n, keys=("total_loss", "loss_cls", "lr", "bbox/AP", "segm/AP")):
    values = dict(zip(keys, range(1, 9), strict=False))
    return [
        {"iteration": 20 * i, **{key: value / (i + 1) for key, value in values.items()}}
        for i in range(n)
    ]


def write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_all_panels(tmp_path):
    metrics = write(tmp_path / "metrics.json", records(100))
    plot_curves(metrics, tmp_path / "made" / "curves.png")
    picture = read(tmp_path / "made" / "curves.png")
    assert picture.shape == (507, 1846, 3)
    ink, blue, orange = ((34, 34, 34), *RGB[:2])
    losses, precisions, rates = np.split(picture, [800, 1420], axis=1)
    assert count(losses, ink) > 100 and count(losses, blue) > 100
    assert count(precisions, blue) > 100 and count(precisions, orange) > 100
    assert count(rates, blue) > 100 and not count(rates, orange)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    "keys, width",
    [
        (["total_loss"], 6.2),
        (["segm/AP", "segm/AP50"], 4.6),
        (["lr"], 3.4),
        (["lr", "loss_x"], 9.6),
        (["val/top1", "val/top5"], 4.6),
        (["total_loss", "val/loss", "train/top1", "lr"], 14.2),
    ],
)
def test_panels_without_values_are_left_out(tmp_path, keys, width):
    plot_curves(write(tmp_path / "m.json", records(30, keys)), tmp_path / "c.png")
    assert read(tmp_path / "c.png").shape[1] == round(130 * width)


def test_accuracies(tmp_path):
    """Each set of images has a color; training is drawn as logged (pale) and smoothed."""
    data = records(100, ["train/top1", "train/top5", "val/top1"])
    plot_curves(write(tmp_path / "m.json", data), tmp_path / "c.png")
    picture = read(tmp_path / "c.png")
    assert count(picture, RGB[0]) > 100 and count(picture, RGB[1]) > 100
    assert not count(picture, RGB[2])
    pale = np.array(RGB[0]) * 0.25 + 255 * 0.75
    assert (np.abs(picture - pale).max(axis=2) < 3).sum() > 20


@pytest.mark.parametrize("n", [1, 2, 21])
def test_few_points(tmp_path, n):
    plot_curves(write(tmp_path / "m.json", records(n)), tmp_path / "c.png")
    assert count(read(tmp_path / "c.png"), RGB[1]) > 10


def test_values_that_are_not_numbers(tmp_path):
    data = records(50)
    for record in data[10:20]:
        record |= {"total_loss": float("nan"), "loss_cls": float("inf"), "bbox/AP": float("nan")}
    for record in data:
        record |= {"segm/AP": float("nan"), "note": "text", "loss_mask": 0.0, "none": None}
    plot_curves(write(tmp_path / "m.json", data), tmp_path / "c.png")
    curves = _read_curves(tmp_path / "m.json")
    assert not {"segm/AP", "note", "none"} & set(curves)
    assert np.isnan(curves["loss_cls"][1][10:20]).all()
    assert np.isfinite(curves["loss_cls"][1][20:]).all()


def test_lines_of_an_iteration_are_merged_and_the_last_counts(tmp_path):
    data = [
        {"iteration": 0, "lr": 1.0},
        {"iteration": 40, "lr": 3.0},
        {"iteration": 20, "lr": 5.0},  # resumed from here
        {"iteration": 40, "lr": 6.0},
        {"iteration": 40, "bbox/AP": 7.0},
        {"lr": 99.0},
    ]
    curves = _read_curves(write(tmp_path / "m.json", data))
    np.testing.assert_array_equal(curves["lr"], [[0, 20, 40], [1, 5, 6]])
    np.testing.assert_array_equal(curves["bbox/AP"], [[40], [7]])


def test_a_last_line_that_is_being_written_is_skipped(tmp_path):
    whole = write(tmp_path / "whole.json", records(3))
    cut = write(tmp_path / "cut.json", records(3), tail='{"iteration": 60, "lr')
    assert str(_read_curves(cut)) == str(_read_curves(whole))
    broken = write(tmp_path / "broken.json", [])
    broken.write_text('{"iteration": 0, "l\n' + whole.read_text())
    with pytest.raises(ValueError, match="broken.json, line 1 is not JSON"):
        plot_curves(broken, tmp_path / "c.png")


@pytest.mark.parametrize("data", [[], [{"iteration": 0, "time": 0.5}], [{"total_loss": 1.0}]])
def test_nothing_to_draw_is_an_error_and_leaves_the_old_picture(tmp_path, data):
    (tmp_path / "c.png").write_text("old")
    with pytest.raises(ValueError, match="m.json has nothing to draw"):
        plot_curves(write(tmp_path / "m.json", data), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_text() == "old"
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        plot_curves(tmp_path / "nowhere.json", tmp_path / "c.png")


def test_smoothing_keeps_level_and_slope_and_reduces_noise():
    line = np.linspace(1, 3, 400)
    np.testing.assert_allclose(_smooth(line)[30:-30], line[30:-30], rtol=1e-9)
    noise = np.random.default_rng(0).normal(size=400)
    smooth = _smooth(line + noise)
    assert np.abs(smooth - line)[30:-30].max() < 1
    holes = np.where(np.arange(400) % 7 == 0, np.nan, 5.0)
    np.testing.assert_allclose(_smooth(holes), holes)


def test_compare_curves(tmp_path):
    """Each run has one color in all panels, even if another run has no such metric."""
    a = write(tmp_path / "a.json", records(100))
    b = write(tmp_path / "b.json", records(100, ["loss_x", "total_loss"]))
    c = write(tmp_path / "c.json", records(100, ["lr", "loss_x", "bbox/AP", "total_loss"]))
    metrics = {"total_loss": "Loss", "bbox/AP": "AP"}
    compare_curves({"A": a, "B": b, "C": c}, metrics, tmp_path / "made" / "c.png")
    losses, precisions = np.array_split(read(tmp_path / "made" / "c.png"), 2, axis=1)
    for color in RGB[:3]:
        assert count(losses, color) > 100
    assert count(precisions, RGB[0]) > 100 and count(precisions, RGB[2]) > 100
    assert not count(precisions, RGB[1])


@pytest.mark.parametrize(
    "runs, metric, error, match",
    [
        ({"A": "absent.json"}, "bbox/AP", FileNotFoundError, r"absent\.json"),
        ({"A": "a.json"}, "bbox/APx", ValueError, r"a\.json has 'bbox/APx'"),
    ],
)
def test_compare_curves_errors(tmp_path, runs, metric, error, match):
    write(tmp_path / "a.json", records(3))
    runs = {label: tmp_path / file for label, file in runs.items()}
    with pytest.raises(error, match=match):
        compare_curves(runs, {metric: "AP"}, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
