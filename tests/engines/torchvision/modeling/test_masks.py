import math

import numpy as np
import torch

from refbn_d2.engines.torchvision.modeling.masks import mask_targets, paste_masks


def test_pasted_masks_are_bilinear_samples_at_pixel_centers():
    rng = np.random.default_rng(0)
    masks = rng.random((3, 4, 4))
    boxes = np.array([[2.3, 1.1, 9.7, 8.4], [-3.0, 4.0, 4.0, 15.0], [5.2, 5.2, 5.9, 6.0]])
    pasted = paste_masks(torch.tensor(masks).float(), torch.tensor(boxes).float(), 12, 10)
    assert pasted.shape == (3, 12, 10)
    for mask, (x0, y0, x1, y1), found in zip(masks, boxes, pasted.numpy(), strict=True):
        padded = np.pad(mask, 2)  # zeros around
        for row in range(12):
            for column in range(10):
                x = (column + 0.5 - x0) / (x1 - x0) * 4 - 0.5
                y = (row + 0.5 - y0) / (y1 - y0) * 4 - 0.5
                if not (-1 < x < 4 and -1 < y < 4):
                    assert not found[row, column]
                    continue
                i, j = math.floor(y), math.floor(x)
                cell, a, b = padded[i + 2 : i + 4, j + 2 : j + 4], y - i, x - j
                value = np.array([1 - a, a]) @ cell @ np.array([1 - b, b])
                if abs(value - 0.5) > 1e-4:
                    assert found[row, column] == (value >= 0.5)
    assert pasted[0].any() and pasted[1].any()
    assert paste_masks(torch.zeros(0, 4, 4), torch.zeros(0, 4), 12, 10).shape == (0, 12, 10)


def test_mask_targets_show_the_object_within_the_box():
    """A rectangle is a polygon, two polygons or a bitmask; another object has no polygons."""
    whole = [np.array([10.0, 10, 30, 10, 30, 40, 10, 40])]
    halves = [
        np.array([10.0, 10, 20, 10, 20, 40, 10, 40]),
        np.array([20.0, 10, 30, 10, 30, 40, 20, 40]),
    ]
    bitmap = np.zeros((60, 50), dtype=bool)
    bitmap[10:40, 10:30] = True
    box = torch.tensor([20.0, 25, 40, 55])  # the rectangle is its upper left quarter
    targets = mask_targets([whole, halves, bitmap, []], box.expand(4, 4), 28)
    wanted = torch.zeros(28, 28, dtype=torch.bool)
    wanted[:14, :14] = True
    assert targets.shape == (4, 28, 28) and targets.dtype == torch.bool
    assert targets[0].equal(wanted) and targets[1].equal(wanted) and targets[2].equal(wanted)
    assert not targets[3].any()
    assert mask_targets([], torch.zeros(0, 4), 28).shape == (0, 28, 28)
