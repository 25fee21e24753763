"""Small models, and images with objects."""

import numpy as np
import torch

from refbn_d2.config import get_cfg
from tests.device import DEVICE

SMALL = [
    "MODEL.DEVICE", DEVICE,
    "MODEL.MASK_ON", True,
    "MODEL.PIXEL_STD", [57.375, 57.12, 58.395],
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.ROI_HEADS.NUM_CLASSES", 3,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 60, "MODEL.RPN.PRE_NMS_TOPK_TEST", 60,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40, "MODEL.RPN.POST_NMS_TOPK_TEST", 40,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
]  # fmt: skip
FPN = [
    *SMALL,
    "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
    "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]],
    "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32,
    "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
]  # fmt: skip
C4 = [
    *SMALL, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
]  # fmt: skip
NORMS = ("RESNETS.NORM", "FPN.NORM", "ROI_BOX_HEAD.NORM", "ROI_MASK_HEAD.NORM")


def config(overrides=FPN, norm=None):
    cfg = get_cfg()
    cfg.merge_from_list(list(overrides))
    for key in NORMS if norm is not None else ():
        cfg.merge_from_list([f"MODEL.{key}", norm])
    return cfg


def make_samples(sizes=((64, 96), (80, 64)), objects=3):
    """Return images of noise, whose objects are random triangles."""
    rng = np.random.default_rng(0)
    samples = []
    for height, width in sizes:
        low = rng.uniform(0, [width - 28, height - 28], (objects, 2))
        high = low + rng.uniform(10, 28, (objects, 2))
        image = rng.integers(0, 255, (3, height, width), dtype=np.uint8)
        samples.append(
            {
                "image": torch.from_numpy(image),
                "height": 2 * height,
                "width": 3 * width,
                "gt_boxes": torch.tensor(np.concatenate([low, high], 1)).float(),
                "gt_classes": torch.from_numpy(rng.integers(0, 3, objects)),
                "gt_masks": [
                    [np.array([x0, y0, x1, y0, x0, y1])]
                    for (x0, y0), (x1, y1) in zip(low, high, strict=True)
                ],
            }
        )
    return samples


def trained_step(model, samples):
    losses = model.train()(samples)
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator) * 50
    return torch.cat([low, low + 1 + torch.rand(*shape, 2, generator=generator) * 30], -1)
