"""Provide the region proposal network (Ren et al., "Faster R-CNN", 2015), as in Detectron2.

Shapes:
    N images; A anchors per position; L feature maps of H_i x W_i; R = sum of H_i W_i A anchors
    M ground-truth boxes per image, padded; P_n proposals of image n
    logits (N, R), deltas (N, R, 4), anchors (R, 4), ordered by map, then position, then anchor
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refbn_d2.engines.torchvision.modeling.backbone import Conv2d
from refbn_d2.engines.torchvision.modeling.boxes import (
    apply_deltas,
    box_deltas,
    clip_boxes,
    match,
    nms_in_groups,
    nonempty,
    sample,
)
from refbn_d2.utils.errors import DivergedError


class Targets(NamedTuple):
    """The ground truth of N images, padded to M > 0 boxes each."""

    boxes: Tensor  # (N, M, 4) in the network's input
    valid: Tensor  # (N, M) bool, False where padded
    classes: Tensor  # (N, M) int64
    masks: list[list]  # N lists of masks.Mask, not padded; empty lists without a mask head


class AnchorGenerator(nn.Module):
    """w = s / sqrt(a),   h = a w,   center = (offset + position) * stride

    There is one box for every size s and aspect ratio a = h / w. Nothing is rounded. The anchors
    are kept for the next call with feature maps of the same sizes.
    """

    def __init__(self, cfg, strides: list[int]) -> None:
        super().__init__()
        options = cfg.MODEL.ANCHOR_GENERATOR
        self.strides, self.offset = strides, options.OFFSET
        sizes = _for_every_map(options.SIZES, len(strides))
        ratios = _for_every_map(options.ASPECT_RATIOS, len(strides))
        self.num_anchors = len(sizes[0]) * len(ratios[0])
        for i, (own_sizes, own_ratios) in enumerate(zip(sizes, ratios, strict=True)):
            shapes = [(math.sqrt(s**2.0 / a), a) for s in own_sizes for a in own_ratios]
            cells = [(-w / 2.0, -a * w / 2.0, w / 2.0, a * w / 2.0) for w, a in shapes]
            self.register_buffer(f"cells{i}", torch.tensor(cells), persistent=False)
        self._kept = (None, None)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return the anchors (H_i W_i A, 4) of each of `features` (N, C, H_i, W_i)."""
        key = [feature.shape[-2:] for feature in features], self.cells0.device
        if self._kept[0] != key:
            self._kept = key, [self._of_map(i, *size) for i, size in enumerate(key[0])]
        return self._kept[1]

    def _of_map(self, i: int, height: int, width: int) -> Tensor:
        cells, stride = getattr(self, f"cells{i}"), self.strides[i]

        def shifts(n: int) -> Tensor:
            start = self.offset * stride
            return torch.arange(n, dtype=torch.float32, device=cells.device) * stride + start

        y, x = torch.meshgrid(shifts(height), shifts(width), indexing="ij")
        grid = torch.stack([x, y, x, y], -1).view(-1, 1, 4)
        return (grid + cells).view(-1, 4)


def _for_every_map(values: list, maps: int) -> list[list[float]]:
    """Return one list per map. `values` is one list for all maps, or [that list], or already so."""
    if not isinstance(values[0], list | tuple):
        return [values] * maps
    return list(values) * maps if len(values) == 1 else list(values)


class RPNHead(nn.Module):
    """3x3 convolutions, then 1x1 ones for objectness logits and anchor deltas, on every map."""

    def __init__(self, cfg, in_channels: int, num_anchors: int) -> None:
        super().__init__()
        convs = []
        for dim in cfg.MODEL.RPN.CONV_DIMS:
            out_channels = in_channels if dim == -1 else dim
            convs.append(Conv2d(in_channels, out_channels, 3, padding=1, relu=True))
            in_channels = out_channels
        self.conv = convs[0] if len(convs) == 1 else nn.Sequential()
        for i, conv in enumerate(convs if len(convs) > 1 else ()):
            self.conv.add_module(f"conv{i}", conv)
        self.objectness_logits = nn.Conv2d(in_channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(in_channels, num_anchors * 4, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits (N, H_i W_i A) and deltas (N, H_i W_i A, 4) of every map, in float32."""
        logits, deltas = [], []
        for x in features:
            x = self.conv(x)
            logits.append(self.objectness_logits(x).float().permute(0, 2, 3, 1).flatten(1))
            delta = self.anchor_deltas(x).float().permute(0, 2, 3, 1)  # (N, H, W, A * 4)
            deltas.append(delta.reshape(len(delta), -1, 4))
        return logits, deltas


class RPN(nn.Module):
    """Region proposal network: features and image sizes -> proposals, and losses in training.

    Args:
        strides, channels: {name: int} of the backbone's feature maps.
    """

    def __init__(self, cfg, strides: dict[str, int], channels: dict[str, int]) -> None:
        super().__init__()
        rpn = self.options = cfg.MODEL.RPN.clone()
        self.in_features = list(rpn.IN_FEATURES)
        self.min_size = float(cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE)
        self.anchor_generator = AnchorGenerator(cfg, [strides[f] for f in self.in_features])
        self.rpn_head = RPNHead(
            cfg, channels[self.in_features[0]], self.anchor_generator.num_anchors
        )

    def forward(
        self, features: dict[str, Tensor], sizes: Tensor, targets: Targets | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose boxes.

        Args:
            features: maps by name, (N, C, H_i, W_i).
            sizes: (N, 2) float32, (height, width) of every image without its padding.
            targets: the ground truth, in training.

        Returns:
            proposals: N tensors (P_n, 4), by descending score, without gradient.
            losses: empty in eval mode.

        Raises:
            DivergedError: in training, a proposal or score is infinite or NaN.
        """
        maps = [features[f] for f in self.in_features]
        anchors = self.anchor_generator(maps)
        logits, deltas = self.rpn_head(maps)
        losses = self.losses(anchors, logits, deltas, sizes, targets) if self.training else {}
        return self.propose(anchors, logits, deltas, sizes), losses

    def losses(self, anchors, logits, deltas, sizes, targets: Targets) -> dict[str, Tensor]:
        """Return cross-entropy and (smooth) L1 loss of the sampled anchors.

        Both are sums, divided by BATCH_SIZE_PER_IMAGE N.
        """
        options = self.options
        anchors, logits = torch.cat(anchors), torch.cat(logits, dim=1)
        index, label = match(
            targets.boxes,
            targets.valid,
            anchors,
            options.IOU_THRESHOLDS,
            options.IOU_LABELS,
            every_gt=True,
        )
        if options.BOUNDARY_THRESH >= 0:
            low = anchors[:, :2].amin(1) >= -options.BOUNDARY_THRESH
            high = anchors[:, 2:] < sizes.flip(1)[:, None] + options.BOUNDARY_THRESH
            label[~(low & high.all(-1))] = -1
        image, anchor, positive = sample(
            label == 1, label == 0, options.BATCH_SIZE_PER_IMAGE, options.POSITIVE_FRACTION
        )
        loss_cls = F.binary_cross_entropy_with_logits(
            logits[image, anchor], positive.float(), reduction="sum"
        )
        image, anchor = image[positive], anchor[positive]
        wanted = box_deltas(
            anchors[anchor],
            targets.boxes[image, index[image, anchor]],
            options.BBOX_REG_WEIGHTS,
        )
        loss_loc = F.smooth_l1_loss(
            torch.cat(deltas, dim=1)[image, anchor],
            wanted,
            beta=options.SMOOTH_L1_BETA,
            reduction="sum",
        )
        scale = options.LOSS_WEIGHT / (options.BATCH_SIZE_PER_IMAGE * len(logits))
        return {
            "loss_rpn_cls": loss_cls * scale,
            "loss_rpn_loc": loss_loc * (scale * options.BBOX_REG_LOSS_WEIGHT),
        }

    @torch.no_grad()
    def propose(self, anchors, logits, deltas, sizes: Tensor) -> list[Tensor]:
        """Decode and clip the PRE_NMS_TOPK best of every map; return the POST_NMS_TOPK after NMS.

        NMS compares boxes of the same map only.
        """
        options, mode = self.options, "TRAIN" if self.training else "TEST"
        scores, boxes = [], []
        for own_anchors, logit, delta in zip(anchors, logits, deltas, strict=True):
            k = min(logit.shape[1], options[f"PRE_NMS_TOPK_{mode}"])
            score, index = logit.topk(k, dim=1)
            delta = delta.gather(1, index[..., None].expand(-1, -1, 4))
            scores.append(score)
            boxes.append(apply_deltas(delta, own_anchors[index], options.BBOX_REG_WEIGHTS))
        of_map = [score.shape[1] for score in scores]
        scores, boxes = torch.cat(scores, dim=1), torch.cat(boxes, dim=1)
        finite = torch.isfinite(boxes).all(-1) & torch.isfinite(scores)
        if self.training and not finite.all():
            raise DivergedError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
        boxes = clip_boxes(boxes, sizes[:, None])
        keep = finite & nonempty(boxes, self.min_size)
        counts = torch.stack([own.sum(dim=1) for own in keep.split(of_map, dim=1)], dim=1)
        proposals = []
        for own_boxes, score, kept, count in zip(boxes, scores, keep, counts.tolist(), strict=True):
            own_boxes = own_boxes[kept]
            top = nms_in_groups(own_boxes, score[kept], count, options.NMS_THRESH)
            proposals.append(own_boxes[top[: options[f"POST_NMS_TOPK_{mode}"]]])
        return proposals
