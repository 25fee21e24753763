"""Provide box and mask heads on regions of interest, with Detectron2's numerics.

Shapes:
    N images; S RoIs of the batch, F of them foreground; K classes, and class K is background
    M ground-truth boxes per image, padded; P_n proposals of image n; D_n detections of image n
    rois        (S, 5) float32, (image, x0, y0, x1, y1) in pixels of the network's input
    m           the mask head's resolution, 2 ROI_MASK_HEAD.POOLER_RESOLUTION (C4: the same)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import batched_nms

from refbn_d2.engines.torchvision.modeling.backbone import Conv2d, resnet_stage
from refbn_d2.engines.torchvision.modeling.boxes import (
    apply_deltas,
    box_deltas,
    clip_boxes,
    match,
    sample,
)
from refbn_d2.engines.torchvision.modeling.masks import mask_targets
from refbn_d2.engines.torchvision.modeling.norms import norm_factory
from refbn_d2.engines.torchvision.modeling.roi_align import roi_align
from refbn_d2.engines.torchvision.modeling.rpn import Targets


class Sampled(NamedTuple):
    """Sampled RoIs to train on, with their targets."""

    rois: Tensor  # (S, 5)
    classes: Tensor  # (S,) int64 in [0, K]
    gt_index: Tensor  # (S,) int64 in [0, M), of the best matching box of the RoI's image


class Detections(NamedTuple):
    """Detected objects of N images, image after image, in pixels of the network's input."""

    rois: Tensor  # (D, 5)
    scores: Tensor  # (D,)
    classes: Tensor  # (D,) int64 in [0, K)
    counts: list[int]  # D_n of every image; D is their sum


class ROIPooler:
    """RoIAlign of every RoI on level k = floor(4 + log2(sqrt(w h) / 224)), clamped to those given

    Lin et al., "Feature Pyramid Networks for Object Detection", 2017, equation (1).

    Args:
        head: cfg.MODEL.ROI_BOX_HEAD or ROI_MASK_HEAD.
        strides: those of the feature maps, each twice the one before.
    """

    def __init__(self, head, strides: Sequence[int]) -> None:
        self.size, self.strides = head.POOLER_RESOLUTION, list(strides)
        self.sampling_ratio = head.POOLER_SAMPLING_RATIO
        self.aligned = head.POOLER_TYPE == "ROIAlignV2"

    def levels(self, rois: Tensor) -> Tensor:
        """Return the index of the feature map for each of `rois` (S, 5): (S,) int64."""
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        level = torch.floor(4 + torch.log2(side / 224 + 1e-8))
        lowest = int(math.log2(self.strides[0]))
        return level.clamp(lowest, lowest + len(self.strides) - 1).long() - lowest

    def __call__(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """Pool maps (N, C, H_i, W_i) to (S, C, size, size) at `rois` (S, 5), sorted by image."""
        if len(features) == 1:
            return self._pool(0, features[0], rois)
        levels = self.levels(rois)
        pooled, order = [], []
        for i, feature in enumerate(features):
            index = (levels == i).nonzero().squeeze(1)
            if len(index) == len(rois):
                return self._pool(i, feature, rois)
            order.append(index)
            pooled.append(self._pool(i, feature, rois[index]))
        # Reorder from the levels' order to that of `rois`.
        return torch.cat(pooled)[torch.cat(order).argsort()]

    def _pool(self, i: int, feature: Tensor, rois: Tensor) -> Tensor:
        return roi_align(
            feature, rois, self.size, self.strides[i], self.sampling_ratio, self.aligned
        )


def box_head(cfg, in_channels: int) -> nn.Sequential:
    """Build Detectron2's FastRCNNConvFCHead, (S, C, h, w) -> (S, FC_DIM): conv1.., then fc1.."""
    options = cfg.MODEL.ROI_BOX_HEAD
    head, filled = nn.Sequential(), []
    norm, bias = norm_factory(options.NORM, cfg.MODEL.DEVICE), options.NORM == ""
    for i in range(options.NUM_CONV):
        conv = Conv2d(
            in_channels, options.CONV_DIM, 3, padding=1, bias=bias, norm=norm(options.CONV_DIM),
            relu=True,
        )  # fmt: skip
        head.add_module(f"conv{i + 1}", conv)
        filled.append((c2_msra_fill, conv))
        in_channels = options.CONV_DIM
    width = in_channels * options.POOLER_RESOLUTION**2
    head.add_module("flatten", nn.Flatten())
    for i in range(options.NUM_FC):
        fc = nn.Linear(width, options.FC_DIM)
        head.add_module(f"fc{i + 1}", fc)
        head.add_module(f"fc_relu{i + 1}", nn.ReLU(inplace=True))
        filled.append((c2_xavier_fill, fc))
        width = options.FC_DIM
    for fill, layer in filled:
        fill(layer)
    head.out_features = width
    return head


class BoxPredictor(nn.Module):
    """Linear layers: x (S, D) -> class logits (S, K + 1) and box deltas (S, K, 4).

    With CLS_AGNOSTIC_BBOX_REG the deltas are (S, 1, 4).
    """

    def __init__(self, cfg, in_features: int) -> None:
        super().__init__()
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        self.cls_score = nn.Linear(in_features, classes + 1)
        boxes = 1 if cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG else classes
        self.bbox_pred = nn.Linear(in_features, boxes * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(1, (-1, 4))


def mask_head(cfg, in_channels: int) -> nn.Sequential:
    """Build Detectron2's MaskRCNNConvUpsampleHead: (F, C, h, w) -> logits (F, K or 1, 2h, 2w)."""
    options = cfg.MODEL.ROI_MASK_HEAD
    head, dim = nn.Sequential(), options.CONV_DIM
    norm, bias = norm_factory(options.NORM, cfg.MODEL.DEVICE), options.NORM == ""
    for i in range(options.NUM_CONV):
        conv = Conv2d(in_channels, dim, 3, padding=1, bias=bias, norm=norm(dim), relu=True)
        head.add_module(f"mask_fcn{i + 1}", conv)
        in_channels = dim
    head.add_module("deconv", nn.ConvTranspose2d(in_channels, dim, 2, stride=2))
    head.add_module("deconv_relu", nn.ReLU(inplace=True))
    classes = 1 if options.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    head.add_module("predictor", nn.Conv2d(dim, classes, 1))
    for name, layer in head.named_children():
        if name not in ("deconv_relu", "predictor"):
            c2_msra_fill(layer)
    nn.init.normal_(head.predictor.weight, std=0.001)
    nn.init.zeros_(head.predictor.bias)
    return head


class ROIHeads(nn.Module):
    """Base class of the heads: features and proposals -> losses in training, else detections.

    A subclass turns RoIs into the inputs of the box predictor and the mask head.
    """

    def __init__(self, cfg) -> None:
        super().__init__()
        self.options = cfg.MODEL.ROI_HEADS.clone()
        self.box_options = cfg.MODEL.ROI_BOX_HEAD.clone()
        self.detections_per_image = cfg.TEST.DETECTIONS_PER_IMAGE
        self.num_classes = self.options.NUM_CLASSES
        self.in_features = list(self.options.IN_FEATURES)
        self.mask_on = cfg.MODEL.MASK_ON

    def box_features(self, features: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the box predictor's input (S, D), and features that `mask_features` can reuse."""
        raise NotImplementedError

    def mask_features(
        self, features: list[Tensor], rois: Tensor, index: Tensor, shared: Tensor | None
    ) -> Tensor:
        """Return the mask head's input (F, C, h, w) for `rois[index]`, with `index` (F,)."""
        raise NotImplementedError

    def forward(
        self,
        features: dict[str, Tensor],
        sizes: Tensor,
        proposals: list[Tensor],
        targets: Targets | None = None,
    ) -> dict[str, Tensor] | tuple[Detections, Tensor | None]:
        """Return the losses in training mode, detections in eval mode.

        Args:
            features: maps by name, (N, C, H_i, W_i).
            sizes: (N, 2) float32, (height, width) of every image without its padding.
            proposals: N tensors (P_n, 4).
            targets: the ground truth, in training.

        Returns:
            In training {"loss_cls", "loss_box_reg"}, and "loss_mask" with a mask head. In eval mode
            the detections, and their masks' probabilities (D, m, m), or None without a mask head.
        """
        # RoIAlign's CPU kernel copies other inputs, and runs in float32 under autocast anyway.
        maps = [features[f].float().contiguous() for f in self.in_features]
        if self.training:
            return self._train(maps, self.sample(proposals, targets), targets)
        image = torch.repeat_interleave(
            torch.arange(len(proposals)), torch.tensor([len(p) for p in proposals])
        )
        boxes = torch.cat(proposals)
        rois = torch.cat([image.to(boxes)[:, None], boxes], dim=1)
        x, _ = self.box_features(maps, rois)
        found = self.detect(*self.box_predictor(x), rois, sizes)
        if not self.mask_on:
            return found, None
        x = self.mask_features(maps, found.rois, torch.arange(len(found.rois)), None)
        return found, self._of_class(self.mask_head(x).float(), found.classes).sigmoid()

    @torch.no_grad()
    def sample(self, proposals: list[Tensor], targets: Targets) -> Sampled:
        """Label the proposals, with the ground truth among them, and draw BATCH_SIZE_PER_IMAGE.

        The ground truth is among them only with PROPOSAL_APPEND_GT.
        """
        options = self.options
        boxes = pad_sequence(proposals, batch_first=True)
        counts = torch.tensor([len(p) for p in proposals]).to(boxes.device)
        valid = torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]
        if options.PROPOSAL_APPEND_GT:  # else there are almost no positives at first
            boxes = torch.cat([boxes, targets.boxes], dim=1)
            valid = torch.cat([valid, targets.valid], dim=1)
        index, label = match(
            targets.boxes,
            targets.valid,
            boxes,
            options.IOU_THRESHOLDS,
            options.IOU_LABELS,
            every_gt=False,
        )
        label[~targets.valid.any(dim=1)] = 0
        image, drawn, positive = sample(
            valid & (label == 1),
            valid & (label == 0),
            options.BATCH_SIZE_PER_IMAGE,
            options.POSITIVE_FRACTION,
        )
        rois = torch.cat([image.to(boxes)[:, None], boxes[image, drawn]], dim=1)
        index = index[image, drawn]
        classes = torch.where(positive, targets.classes[image, index], self.num_classes)
        return Sampled(rois, classes, index)

    def _train(self, features: list[Tensor], sampled: Sampled, targets: Targets) -> dict:
        rois, classes, gt_index = sampled
        x, shared = self.box_features(features, rois)
        logits, deltas = self.box_predictor(x)
        foreground = (classes < self.num_classes).nonzero().squeeze(1)
        image, gt_index = rois[foreground, 0].long(), gt_index[foreground]
        losses = self.box_losses(
            logits, deltas, rois, classes, foreground, targets.boxes[image, gt_index]
        )
        if self.mask_on:
            x = self.mask_features(features, rois, foreground, shared)
            masks = [
                targets.masks[i][j] for i, j in zip(image.tolist(), gt_index.tolist(), strict=True)
            ]
            losses["loss_mask"] = self.mask_loss(
                self.mask_head(x).float(), classes[foreground], masks, rois[foreground, 1:]
            )
        return losses

    def box_losses(self, logits, deltas, rois, classes, foreground, gt_boxes) -> dict[str, Tensor]:
        """Return cross-entropy of S RoIs and (smooth) L1 of the foreground's deltas, both sums / S.

        `foreground` (F,) are indices of RoIs, `gt_boxes` (F, 4) their ground truth. Both losses are
        0 if S is 0.
        """
        options, count = self.box_options, max(len(rois), 1)
        loss_cls = F.cross_entropy(logits, classes, reduction="sum") / count
        wanted = box_deltas(rois[foreground, 1:], gt_boxes, options.BBOX_REG_WEIGHTS)
        column = classes[foreground] if deltas.shape[1] > 1 else torch.zeros_like(foreground)
        loss_box = F.smooth_l1_loss(
            deltas[foreground, column], wanted, beta=options.SMOOTH_L1_BETA, reduction="sum"
        )
        return {
            "loss_cls": loss_cls,
            "loss_box_reg": loss_box * (options.BBOX_REG_LOSS_WEIGHT / count),
        }

    def mask_loss(self, logits: Tensor, classes: Tensor, masks: list, boxes: Tensor) -> Tensor:
        """Return the mean binary cross-entropy of each RoI's mask of its class; 0 if F is 0."""
        wanted = mask_targets(masks, boxes, logits.shape[-1])
        logits = self._of_class(logits, classes)
        total = F.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="sum")
        return total / max(logits.numel(), 1)

    @staticmethod
    def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
        """Select (F, m, m) from (F, K, m, m) by `classes` (F,), or from (F, 1, m, m)."""
        if logits.shape[1] == 1:
            return logits[:, 0]
        return logits[torch.arange(len(logits), device=logits.device), classes]

    def detect(self, logits: Tensor, deltas: Tensor, rois: Tensor, sizes: Tensor) -> Detections:
        """Keep scores above SCORE_THRESH_TEST, run NMS per class, keep DETECTIONS_PER_IMAGE."""
        options, image = self.options, rois[:, 0].long()
        boxes = apply_deltas(deltas, rois[:, None, 1:], self.box_options.BBOX_REG_WEIGHTS)
        scores = logits.softmax(dim=1)
        finite = torch.isfinite(boxes).flatten(1).all(dim=1) & torch.isfinite(scores).all(dim=1)
        boxes = clip_boxes(boxes, sizes[image][:, None])
        above = (scores[:, :-1] > options.SCORE_THRESH_TEST) & finite[:, None]
        roi, classes = above.nonzero(as_tuple=True)
        boxes = boxes[roi, classes if boxes.shape[1] > 1 else 0]
        scores, image = scores[roi, classes], image[roi]
        kept, start = [], 0
        counts = torch.bincount(image, minlength=len(sizes)).tolist()
        for n, count in enumerate(counts):
            own = slice(start, start + count)
            top = batched_nms(boxes[own], scores[own], classes[own], options.NMS_THRESH_TEST)
            if self.detections_per_image >= 0:
                top = top[: self.detections_per_image]
            kept.append(top + start)
            counts[n], start = len(top), start + count
        kept = torch.cat(kept)
        found = torch.cat([image[kept].to(boxes)[:, None], boxes[kept]], dim=1)
        return Detections(found, scores[kept], classes[kept], counts)


class StandardROIHeads(ROIHeads):
    """Heads for FPN and DC5: box and mask head each pool their own features."""

    def __init__(self, cfg, strides: dict[str, int], channels: dict[str, int]) -> None:
        super().__init__(cfg)
        in_channels = channels[self.in_features[0]]
        own_strides = [strides[f] for f in self.in_features]
        self.box_pooler = ROIPooler(cfg.MODEL.ROI_BOX_HEAD, own_strides)
        self.box_head = box_head(cfg, in_channels)
        self.box_predictor = BoxPredictor(cfg, self.box_head.out_features)
        if self.mask_on:
            self.mask_pooler = ROIPooler(cfg.MODEL.ROI_MASK_HEAD, own_strides)
            self.mask_head = mask_head(cfg, in_channels)

    def box_features(self, features, rois):
        return self.box_head(self.box_pooler(features, rois)), None

    def mask_features(self, features, rois, index, shared):
        return self.mask_pooler(features, rois[index])


class Res5ROIHeads(ROIHeads):
    """Heads for C4: box and mask head share RoI features from res5, three bottleneck blocks."""

    def __init__(self, cfg, strides: dict[str, int], channels: dict[str, int]) -> None:
        super().__init__(cfg)
        self.pooler = ROIPooler(cfg.MODEL.ROI_BOX_HEAD, [strides[f] for f in self.in_features])
        self.res5 = resnet_stage(cfg, stage=5, blocks=3, stride=2)
        out_channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8
        self.box_predictor = BoxPredictor(cfg, out_channels)
        if self.mask_on:
            self.mask_head = mask_head(cfg, out_channels)

    def box_features(self, features, rois):
        shared = self.res5(self.pooler(features, rois))
        return shared.mean(dim=(2, 3)), shared

    def mask_features(self, features, rois, index, shared):
        if shared is not None:
            return shared[index]
        return self.res5(self.pooler(features, rois[index]))


def build_roi_heads(cfg, strides: dict[str, int], channels: dict[str, int]) -> ROIHeads:
    """Build the heads named by MODEL.ROI_HEADS.NAME, for maps of these strides and channels."""
    heads = {"StandardROIHeads": StandardROIHeads, "Res5ROIHeads": Res5ROIHeads}
    return heads[cfg.MODEL.ROI_HEADS.NAME](cfg, strides, channels)
