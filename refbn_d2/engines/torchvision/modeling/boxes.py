"""Handle the boxes of a batch of images: IoU, matching, sampling, regression, clipping.

Shapes:
    N images; M ground-truth boxes per image, padded; R anchors or proposals per image, padded
    boxes       (..., 4) float32, (x0, y0, x1, y1) in pixels of the network's input
    deltas      (..., 4), (dx, dy, dw, dh), the regression's target or output
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

# exp(dw) may at most turn a 16 pixel box into a 1000 pixel box (Detectron's heuristic).
MAX_LOG_SCALE = math.log(1000.0 / 16)
# With more (ground truth, box) pairs than this, the IoU matrix is computed in groups of images.
MAX_PAIRS = 1 << 24


def box_deltas(boxes: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
    """(wx (tx - x) / w, wy (ty - y) / h, ww log(tw / w), wh log(th / h)), x, y the centers

    Return the regression targets (S, 4) that turn `boxes` (S, 4) into `targets` (S, 4). Girshick et
    al., "Rich feature hierarchies", 2014, appendix C.
    """
    (x, y, w, h), (tx, ty, tw, th) = _center_and_size(boxes), _center_and_size(targets)
    wx, wy, ww, wh = weights
    return torch.stack(
        [wx * (tx - x) / w, wy * (ty - y) / h, ww * torch.log(tw / w), wh * torch.log(th / h)], -1
    )


def apply_deltas(deltas: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Apply `deltas` (..., 4) to `boxes`, broadcast, in float32: the inverse of `box_deltas`."""
    x, y, w, h = _center_and_size(boxes)
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = deltas.float().unbind(-1)
    x, y = dx / wx * w + x, dy / wy * h + y
    w = 0.5 * (torch.exp((dw / ww).clamp(max=MAX_LOG_SCALE)) * w)
    h = 0.5 * (torch.exp((dh / wh).clamp(max=MAX_LOG_SCALE)) * h)
    return torch.stack([x - w, y - h, x + w, y + h], -1)


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    w, h = x1 - x0, y1 - y0
    return x0 + 0.5 * w, y0 + 0.5 * h, w, h


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip `boxes` (..., 4) to `sizes` (..., 2), (height, width) of their images, broadcast."""
    width_height = sizes.flip(-1)
    return torch.minimum(boxes.clamp(min=0), torch.cat([width_height, width_height], -1))


def nonempty(boxes: Tensor, min_size: float = 0.0) -> Tensor:
    """Return whether both sides of `boxes` (..., 4) are longer than `min_size`: (...) bool."""
    return ((boxes[..., 2:] - boxes[..., :2]) > min_size).all(-1)


def nms_in_groups(
    boxes: Tensor, scores: Tensor, counts: Sequence[int], iou_threshold: float
) -> Tensor:
    """Run NMS within each group; return the indices of the boxes kept, by descending score.

    Args:
        boxes, scores: (P, 4) and (P,), group after group.
        counts: the number of boxes in each group.
    """
    if boxes.device.type != "cpu":
        groups = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return batched_nms(boxes, scores, groups.to(boxes.device), iou_threshold)
    # `batched_nms` would compare the boxes of all groups.
    kept, start = [], 0
    for own_boxes, own_scores in zip(boxes.split(counts), scores.split(counts), strict=True):
        kept.append(nms(own_boxes, own_scores, iou_threshold) + start)
        start += len(own_boxes)
    kept = torch.cat(kept)
    return kept[scores[kept].argsort(descending=True, stable=True)]


def pairwise_iou(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """Return the IoU (N, M, R) of `gt_boxes` (N, M, 4) and `boxes` (N, R, 4) or (R, 4)."""
    gx0, gy0, gx1, gy1 = gt_boxes.unsqueeze(-2).unbind(-1)  # (N, M, 1)
    x0, y0, x1, y1 = boxes.unsqueeze(-3).movedim(-1, 0).contiguous()  # (N or 1, 1, R)
    w = torch.minimum(gx1, x1).sub_(torch.maximum(gx0, x0)).clamp_(min=0)
    h = torch.minimum(gy1, y1).sub_(torch.maximum(gy0, y0)).clamp_(min=0)
    intersection = w.mul_(h)
    union = (gx1 - gx0) * (gy1 - gy0) + (x1 - x0) * (y1 - y0) - intersection
    return intersection.div_(union).nan_to_num_(nan=0.0)  # 0 / 0 if both boxes are empty


@torch.no_grad()
def match(
    gt_boxes: Tensor,
    gt_valid: Tensor,
    boxes: Tensor,
    thresholds: Sequence[float],
    labels: Sequence[int],
    every_gt: bool,
) -> tuple[Tensor, Tensor]:
    """Match every box with the ground truth of highest IoU, and label it by that IoU.

    Args:
        gt_boxes: (N, M, 4), M > 0.
        gt_valid: (N, M) bool, False where a row is padding.
        boxes: (N, R, 4), or (R, 4) for all images.
        thresholds: ascending IoUs t; a box gets labels[i] if t[i-1] <= IoU < t[i].
        labels: one more than thresholds: -1 (ignored), 0 (negative) or 1 (positive).
        every_gt: for every ground truth, label the box of highest IoU with it, and ties, positive
            (Ren et al., "Faster R-CNN", 2015, section 3.1.2 (i)). Their match does not change.

    Returns:
        index (N, R) int64 in [0, M), label (N, R) int8.
    """
    N, M, R = len(gt_boxes), gt_boxes.shape[1], boxes.shape[-2]
    step = max(1, MAX_PAIRS // max(1, M * R))
    if step < N:
        parts = []
        for i in range(0, N, step):
            group = slice(i, i + step)
            m = max(1, int(gt_valid[group].sum(1).max()))
            own = boxes[group] if boxes.dim() == 3 else boxes
            parts.append(
                match(gt_boxes[group, :m], gt_valid[group, :m], own, thresholds, labels, every_gt)
            )
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    iou = pairwise_iou(gt_boxes, boxes).masked_fill_(~gt_valid[..., None], -1)
    best, index = iou.max(dim=1)
    label = torch.full_like(index, labels[0], dtype=torch.int8)
    for threshold, value in zip(thresholds, labels[1:], strict=True):
        label[best >= threshold] = value
    if every_gt and R:
        highest = iou.amax(dim=2, keepdim=True)
        label[((iou == highest) & gt_valid[..., None]).any(dim=1)] = 1
    return index, label


@torch.no_grad()
def sample(
    positive: Tensor, negative: Tensor, size: int, positive_fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `size` boxes of every image without replacement.

    At most `positive_fraction` of them are positive, the rest negative. If there are too few of
    both, the sample is smaller.

    Args:
        positive, negative: (N, R) bool.

    Returns:
        image, index, is_positive: (S,) each, S <= N * size, sorted by image, the positives of each
            image first.
    """
    R = positive.shape[1]
    keys = torch.rand(positive.shape, device=positive.device)  # < 1: the smallest are drawn

    def draw(candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
        drawn, index = keys.masked_fill(~candidates, 2.0).topk(min(k, R), largest=False)
        return index, drawn < 1.5

    pos_index, pos_drawn = draw(positive, int(size * positive_fraction))
    neg_index, neg_drawn = draw(negative, size)
    rank = torch.arange(neg_drawn.shape[1], device=keys.device)
    neg_drawn &= rank < size - pos_drawn.sum(dim=1, keepdim=True)
    index = torch.cat([pos_index, neg_index], dim=1)
    image, column = torch.cat([pos_drawn, neg_drawn], dim=1).nonzero(as_tuple=True)
    return image, index[image, column], column < pos_index.shape[1]
