import json

import cv2
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from refbn_d2.visualization.samples import (
    COLORS,
    _read_curves,
    _smooth,
    compare_curves,
    draw_samples,
    plot_curves,
)

RGB = [tuple(round(255 * v) for v in to_rgb(color)) for color in COLORS]


def read(path):
    return cv2.imread(str(path))[..., ::-1]


def count(picture, color):
    return (picture == color).all(axis=2).sum()


# ---- curves


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
    """A colour for each set of images; in training as logged (pale) and smooth."""
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


def test_values_that_are_no_numbers(tmp_path):
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


def test_lines_of_an_iteration_are_taken_together_and_the_last_counts(tmp_path):
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


def test_a_last_line_that_is_being_written_is_passed_over(tmp_path):
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


# ---- samples

MARGIN, TOP, TILE, GAP = 18, 42, 350, 8


def image(height=100, width=100, gray=60):
    return np.full((height, width, 3), gray, np.uint8)


def content(boxes, classes, scores=None, masks=False, size=100):
    made = {"boxes": np.array(boxes, float), "classes": np.array(classes)}
    if scores is not None:
        made["scores"] = np.array(scores)
    if masks:
        made["masks"] = np.zeros((len(boxes), size, size), bool)
        for mask, (x0, y0, x1, y1) in zip(made["masks"], boxes, strict=True):
            mask[y0:y1, x0:x1] = True
    return made


def tile(picture, column, row=0):
    top, left = TOP + row * (TILE + GAP), MARGIN + column * (TILE + GAP)
    return picture[top : top + TILE, left : left + TILE]


NAMES = ["cat", "dog", "$cow_{", "a very long name of a class"]


def test_prediction_and_ground_truth_stand_side_by_side(tmp_path):
    prediction = content([[20, 40, 60, 80]], [1], [0.9], masks=True)
    truth = content([[30, 40, 70, 80]], [0])
    draw_samples([(image(), prediction, truth)], NAMES, tmp_path / "s.png")
    picture = read(tmp_path / "s.png")
    left, right = tile(picture, 0), tile(picture, 1)
    assert picture.shape[1] == 2 * MARGIN + 2 * TILE + GAP
    for part, color, x in ((left, RGB[1], 70), (right, RGB[0], 105)):
        for spot in ((210, x), (210, x + 140), (140, x + 120), (280, x + 70)):  # the four edges
            assert tuple(part[spot]) == color, spot
        assert tuple(part[330, 10]) == (60, 60, 60)
        label = part[122:138, x + 1 : x + 25]
        assert 0.4 * label[..., 0].size < count(label, color) < label[..., 0].size
    # masks are half transparent; without masks the inside stays
    np.testing.assert_allclose(left[230, 130], (np.array(RGB[1]) + 60) / 2, atol=1)
    assert tuple(right[230, 160]) == (60, 60, 60)
    assert not count(left, RGB[0]) and not count(right, RGB[1])
    legend = picture[TOP + TILE :]
    assert count(legend, RGB[0]) >= 81 and count(legend, RGB[1]) >= 81
    assert not count(legend, RGB[2])


def test_tensors_are_drawn_as_arrays_are(tmp_path):
    made = content([[20, 40, 60, 80]], [1], [0.9], masks=True)
    draw_samples([(image(), made, None)], NAMES, tmp_path / "a.png")
    made = {key: torch.from_numpy(value) for key, value in made.items()}
    draw_samples([(image(), made, None)], NAMES, tmp_path / "b.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


def test_low_scores_are_not_drawn(tmp_path):
    made = content([[20, 40, 60, 80], [0, 0, 10, 10]], [1, 0], [0.3, 0.7])
    draw_samples([(image(), made, None)], NAMES, tmp_path / "s.png")
    assert not count(read(tmp_path / "s.png"), RGB[1]) and count(read(tmp_path / "s.png"), RGB[0])
    draw_samples([(image(), made, None)], NAMES, tmp_path / "s.png", min_score=0.2)
    assert count(read(tmp_path / "s.png"), RGB[1])


@pytest.mark.parametrize("height, width", [(7, 13), (100, 60), (350, 350), (480, 640), (1333, 30)])
def test_every_image_gets_the_same_longer_side(tmp_path, height, width):
    picture = image(height, width)
    picture[:, width // 2 :] = (250, 0, 0)
    draw_samples([(picture, None, None)], NAMES, tmp_path / "s.png")
    out = read(tmp_path / "s.png")
    rows, columns = np.nonzero((out == (250, 0, 0)).all(axis=2))
    assert abs(np.ptp(rows) + 1 - 350 * height / max(height, width)) <= 1
    assert abs(np.ptp(columns) + 1 - 350 * (width - width // 2) / max(height, width)) <= 2


@pytest.mark.parametrize(
    "items, columns, across, down", [(5, 4, 2, 3), (1, 4, 1, 1), (2, 1, 1, 2), (4, 9, 4, 1)]
)
def test_grid(tmp_path, items, columns, across, down):
    made = content([[20, 40, 60, 80]], [1])
    draw_samples([(image(), made, made)] * items, NAMES, tmp_path / "s.png", columns=columns)
    picture = read(tmp_path / "s.png")
    assert picture.shape[1] == 2 * MARGIN + across * (2 * TILE + GAP) + (across - 1) * 26
    assert (picture.shape[0] - TOP) // (TILE + GAP) == down


def test_labels_do_not_cover_one_another(tmp_path):
    made = content([[30, 40, 70, 80]] * 3, [0, 1, 2])
    draw_samples([(image(), made, None)], NAMES, tmp_path / "s.png")
    part = tile(read(tmp_path / "s.png"), 0)
    spans = []
    for color in RGB[1:3]:  # the first one's box covers theirs: their colours are their labels'
        rows, columns = np.nonzero((part == color).all(axis=2))
        spans.append((rows.min(), rows.max(), columns.min(), columns.max()))
        assert len(rows) > 0.4 * (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert 10 < np.ptp(rows) < 25 and 20 < np.ptp(columns) < 60
    (t0, b0, l0, r0), (t1, b1, l1, r1) = spans
    assert b0 < t1 or b1 < t0 or r0 < l1 or r1 < l0


def test_labels_without_room_are_left_out(tmp_path):
    few, many = (content([[30, 40, 70, 80]] * n, [0] * n) for n in (12, 40))
    draw_samples([(image(), few, None)], NAMES, tmp_path / "few.png")
    draw_samples([(image(), many, None)], NAMES, tmp_path / "many.png")
    np.testing.assert_array_equal(
        count(read(tmp_path / "few.png"), RGB[0]), count(read(tmp_path / "many.png"), RGB[0])
    )


def test_odd_inputs(tmp_path):
    empty = content(np.zeros((0, 4)), np.zeros(0, int), [])
    outside = content([[-50, -50, 300, 300], [5, 5, 5, 5]], [3, 2], [1.0, 1.0])
    draw_samples(
        [(image(), empty, outside), (image(), None, empty), (image(10, 40), outside, None)],
        NAMES,
        tmp_path / "s.png",
    )
    before = (tmp_path / "s.png").read_bytes()
    bad = content([[0, 0, 5, 5]], [4])
    with pytest.raises(ValueError, match="Class 4 .* 4 class names"):
        draw_samples([(image(), None, bad)], NAMES, tmp_path / "s.png")
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\), not float64 \(3, 5, 5\)"):
        draw_samples([(np.zeros((3, 5, 5)), None, None)], NAMES, tmp_path / "s.png")
    with pytest.raises(ValueError, match="no images"):
        draw_samples([], NAMES, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]


# ---- comparison


def test_compare_curves(tmp_path):
    """A colour for each run in every panel, also where another run lacks the metric."""
    a = write(tmp_path / "a.json", records(100))
    b = write(tmp_path / "b.json", records(100, ["loss_x", "total_loss"]))
    c = write(tmp_path / "c.json", records(100, ["lr", "loss_x", "bbox/AP", "total_loss"]))
    metrics = {"total_loss": "Loss", "bbox/AP": "AP"}
    compare_curves({"A": a, "B": b, "C": c}, metrics, tmp_path / "made" / "c.png")
    losses, precisions = np.split(read(tmp_path / "made" / "c.png"), 2, axis=1)
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
