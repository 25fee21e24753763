import math

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from refbn_d2.engines.torchvision.modeling import boxes as box_ops
from tests.engines.torchvision.modeling.helpers import random_boxes


def naive_iou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if w * h > 0 else 0.0


@pytest.mark.parametrize("max_pairs", [1 << 24, 1])
@pytest.mark.parametrize("every_gt", [False, True])
def test_match_is_the_brute_force_one(max_pairs, every_gt, monkeypatch):
    monkeypatch.setattr(box_ops, "MAX_PAIRS", max_pairs)
    gt, boxes = random_boxes(3, 4), random_boxes(3, 50, seed=1)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    index, label = box_ops.match(gt, valid, boxes, [0.2, 0.4], [0, -1, 1], every_gt)
    for n in range(3):
        rows = [i for i in range(4) if valid[n, i]]
        iou = np.array([[naive_iou(gt[n, i], b) for b in boxes[n].tolist()] for i in rows])
        if not rows:
            assert (label[n] == 0).all()
            continue
        best = iou.max(0)
        wanted = np.where(best < 0.2, 0, np.where(best < 0.4, -1, 1))
        if every_gt:
            wanted[iou.argmax(1)] = 1
        assert label[n].tolist() == wanted.tolist()
        assert index[n][best > 0].tolist() == iou.argmax(0)[best > 0].tolist()
    assert {0, -1, 1} == set(label.flatten().tolist())
    shared = box_ops.match(gt, valid, boxes[0], [0.5], [0, 1], every_gt)
    repeated = box_ops.match(gt, valid, boxes[:1].expand(3, -1, -1), [0.5], [0, 1], every_gt)
    assert shared[0].equal(repeated[0]) and shared[1].equal(repeated[1])


def test_samples_are_balanced_without_replacement_and_uniform():
    torch.manual_seed(0)
    label = torch.tensor([[1] * 10 + [0] * 30, [1] * 2 + [0] * 38, [1] * 3 + [-1] * 34 + [0] * 3])
    drawn = torch.zeros(3, 40)
    for _ in range(400):
        image, index, positive = box_ops.sample(label == 1, label == 0, 16, 0.25)
        assert label[image, index].eq(positive).all()
        assert image.equal(image.sort().values)
        assert len(set(zip(image.tolist(), index.tolist(), strict=True))) == len(index)
        counts = [(int((image == n).sum()), int(positive[image == n].sum())) for n in range(3)]
        assert counts == [(16, 4), (16, 2), (6, 3)]
        drawn[image, index] += 1
    expected = torch.tensor([4 / 10, 12 / 30]) * 400  # of image 0, by label
    sd = (400 * 0.4 * 0.6) ** 0.5
    assert (drawn[0, :10] - expected[0]).abs().max() < 4.5 * sd
    assert (drawn[0, 10:] - expected[1]).abs().max() < 4.5 * sd


def test_deltas_are_the_published_ones_and_their_inverse():
    weights = (10.0, 10.0, 5.0, 5.0)
    boxes, targets = random_boxes(20), random_boxes(20, seed=1)
    deltas = box_ops.box_deltas(boxes, targets, weights)
    x0, y0, x1, y1 = boxes[3].double().tolist()
    tx0, ty0, tx1, ty1 = targets[3].double().tolist()
    assert deltas[3].tolist() == pytest.approx(
        [
            10 * ((tx0 + tx1) / 2 - (x0 + x1) / 2) / (x1 - x0),
            10 * ((ty0 + ty1) / 2 - (y0 + y1) / 2) / (y1 - y0),
            5 * math.log((tx1 - tx0) / (x1 - x0)),
            5 * math.log((ty1 - ty0) / (y1 - y0)),
        ],
        rel=1e-4,
        abs=1e-5,
    )
    torch.testing.assert_close(box_ops.apply_deltas(deltas, boxes, weights), targets)
    huge = box_ops.apply_deltas(
        torch.tensor([0, 0, 99.0, 0]), torch.tensor([0, 0, 16.0, 1]), [1] * 4
    )
    assert (huge[2] - huge[0]).item() == pytest.approx(1000, rel=1e-4)


def test_nms_in_groups_is_nms_of_each_group():
    boxes, scores = random_boxes(60), torch.rand(60, generator=torch.Generator().manual_seed(2))
    counts = [25, 0, 35]
    kept = box_ops.nms_in_groups(boxes, scores, counts, 0.3)
    groups = torch.tensor([0] * 25 + [2] * 35)
    assert kept.equal(batched_nms(boxes, scores, groups, 0.3)) and 5 < len(kept) < 55
