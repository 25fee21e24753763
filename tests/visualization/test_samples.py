import cv2
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from refbn_d2.visualization.samples import draw_samples
from refbn_d2.visualization.style import COLORS

RGB = [tuple(round(255 * v) for v in to_rgb(color)) for color in COLORS]


def read(path):
    return cv2.imread(str(path))[..., ::-1]


def count(picture, color):
    return (picture == color).all(axis=2).sum()


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


def test_the_titles_are_above_their_columns(tmp_path):
    both = content([[10, 10, 50, 50]], [0], scores=[0.9])
    for name, titles in (("a", ("prediction", "ground truth")), ("b", ("before", "ground truth"))):
        draw_samples([(image(), both, both)], ["x"], tmp_path / f"{name}.png", titles=titles)
    differs = (read(tmp_path / "a.png") != read(tmp_path / "b.png")).any(axis=2)
    rows, columns = np.nonzero(differs)
    assert rows.max() < TOP and columns.max() < MARGIN + TILE


def tile(picture, column, row=0):
    top, left = TOP + row * (TILE + GAP), MARGIN + column * (TILE + GAP)
    return picture[top : top + TILE, left : left + TILE]


NAMES = ["cat", "dog", "$cow_{", "a very long name of a class"]


def test_prediction_and_ground_truth_are_side_by_side(tmp_path):
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
    for color in RGB[1:3]:  # the first box covers theirs: only their labels show their colors
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
