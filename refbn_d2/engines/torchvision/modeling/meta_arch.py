"""Provide GeneralizedRCNN: Faster and Mask R-CNN with Detectron2's numerics, names and config keys.

Shapes:
    N images; H x W their largest size, padded to a multiple of the backbone's divisibility
    M ground-truth boxes per image, padded; D detections of one image
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from refbn_d2.config import apply_options, refbn_options
from refbn_d2.engines.torchvision.modeling.backbone import build_backbone
from refbn_d2.engines.torchvision.modeling.boxes import clip_boxes, nonempty
from refbn_d2.engines.torchvision.modeling.masks import paste_masks
from refbn_d2.engines.torchvision.modeling.roi_heads import build_roi_heads
from refbn_d2.engines.torchvision.modeling.rpn import RPN, Targets
from refbn_d2.layers.peers import prepare_peers


class GeneralizedRCNN(nn.Module):
    """Faster or Mask R-CNN: images -> losses or detections.

    Ren et al., "Faster R-CNN", 2015; He et al., "Mask R-CNN", 2017.

    Each forward pass calls `backbone` once, with the normalized and padded batch (N, 3, H, W). The
    backbone returns a dict of feature maps with N rows each.
    """

    def __init__(self, cfg) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        strides, channels = self.backbone.strides, self.backbone.channels
        self.proposal_generator = RPN(cfg, strides, channels)
        self.roi_heads = build_roi_heads(cfg, strides, channels)
        mean, std = torch.tensor(cfg.MODEL.PIXEL_MEAN), torch.tensor(cfg.MODEL.PIXEL_STD)
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, samples: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training mode, detections in eval mode.

        Args:
            samples: dicts with "image" uint8 (3, h, w). Training needs "gt_boxes" float32 (M, 4),
                "gt_classes" int64 (M,) and, with MODEL.MASK_ON, "gt_masks": a list of M items,
                each a list of float64 polygons or a bool (h, w) bitmask. In eval mode detections
                are scaled to the original image of size "height", "width" (by default h, w).

        Returns:
            In training a dict of scalars "loss_cls", "loss_box_reg", "loss_rpn_cls",
            "loss_rpn_loc" and, with MODEL.MASK_ON, "loss_mask". In eval mode a dict per sample:
            "pred_boxes" (D, 4), "scores" (D,), "pred_classes" (D,) and, with MODEL.MASK_ON,
            "pred_masks" bool (D, height, width).

        Raises:
            KeyError: a key that training needs is missing in a sample.
            DivergedError: training has diverged.
        """
        images, image_sizes = self.preprocess_image(samples)
        features = self.backbone(images)
        sizes = torch.tensor(image_sizes, dtype=torch.float32).to(self.device)
        if self.training:
            targets = self._targets(samples)
            proposals, rpn_losses = self.proposal_generator(features, sizes, targets)
            return self.roi_heads(features, sizes, proposals, targets) | rpn_losses
        proposals, _ = self.proposal_generator(features, sizes)
        found, masks = self.roi_heads(features, sizes, proposals)
        masks = [None] * len(samples) if masks is None else masks.split(found.counts)
        return [
            _in_original_image(sample, size, *detections)
            for sample, size, *detections in zip(
                samples,
                image_sizes,
                found.rois[:, 1:].split(found.counts),
                found.scores.split(found.counts),
                found.classes.split(found.counts),
                masks,
                strict=True,
            )
        ]

    def preprocess_image(self, samples: list[dict]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalize images, (image - PIXEL_MEAN) / PIXEL_STD, and pad right and bottom by zeros.

        Returns:
            (N, 3, H, W) float32, channels last; N image sizes (h, w).
        """
        sizes = [tuple(sample["image"].shape[-2:]) for sample in samples]
        step = self.backbone.size_divisibility
        height, width = (-(-max(side) // step) * step for side in zip(*sizes, strict=True))
        batch = torch.zeros(len(samples), height, width, 3, device=self.device)
        batch = batch.permute(0, 3, 1, 2)  # channels last
        for row, sample, (h, w) in zip(batch, samples, sizes, strict=True):
            image = sample["image"].to(self.device, non_blocking=True)
            torch.div(image - self.pixel_mean, self.pixel_std, out=row[:, :h, :w])
        return batch, sizes

    def _targets(self, samples: list[dict]) -> Targets:
        needed = ["gt_boxes", "gt_classes"]
        if self.roi_heads.mask_on:
            needed.append("gt_masks")
        for sample in samples:
            for key in needed:
                if key not in sample:
                    name = sample.get("file_name", "a sample")
                    raise KeyError(f"{name}: training needs {key!r} in every sample")
        boxes = [sample["gt_boxes"].float().view(-1, 4) for sample in samples]
        most = max(1, *map(len, boxes))
        counts = torch.tensor([len(b) for b in boxes])
        boxes = pad_sequence([*boxes, torch.zeros(most, 4)], batch_first=True)[:-1]
        classes = [sample["gt_classes"] for sample in samples]
        classes = pad_sequence([*classes, torch.zeros(most).long()], batch_first=True)[:-1]
        return Targets(
            boxes.to(self.device),
            (torch.arange(most) < counts[:, None]).to(self.device),
            classes.to(self.device),
            [sample["gt_masks"] if self.roi_heads.mask_on else [] for sample in samples],
        )


def _in_original_image(
    sample: dict,
    size: tuple[int, int],
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    masks: Tensor | None,
) -> dict[str, Tensor]:
    """Scale detections from `size` (h, w) to the sample's (height, width); drop empty boxes."""
    height, width = sample.get("height", size[0]), sample.get("width", size[1])
    scale = torch.tensor([width / size[1], height / size[0]] * 2).to(boxes)
    boxes = clip_boxes(boxes * scale, torch.tensor([float(height), width]).to(boxes))
    keep = nonempty(boxes)
    result = {
        "pred_boxes": boxes[keep],
        "scores": scores[keep],
        "pred_classes": classes[keep],
    }
    if masks is not None:
        result["pred_masks"] = paste_masks(masks[keep], boxes[keep], height, width)
    return result


def build_model(cfg) -> GeneralizedRCNN:
    """Build the model of MODEL.* on MODEL.DEVICE, with new weights, convolutions channels last."""
    model = GeneralizedRCNN(cfg)
    apply_options(model, refbn_options(cfg))
    prepare_peers(model, cfg.SOLVER.MAX_ITER)
    return model.to(cfg.MODEL.DEVICE, memory_format=torch.channels_last)
