"""Pairs of models, ours and Detectron2's, of the same config, and images for both."""

import functools
from pathlib import Path

import numpy as np
import torch

from refbn_d2.config import get_cfg
from refbn_d2.engines.torchvision import modeling

CONFIGS = Path(__file__).parents[4] / "configs"
K = 5
FPN = [
    "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
    "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]],
    "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.PRE_NMS_TOPK_TEST", 150,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 150, "MODEL.RPN.POST_NMS_TOPK_TEST", 100,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 64,
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64,
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC", 2, "MODEL.ROI_BOX_HEAD.FC_DIM", 64,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 2, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32,
]  # fmt: skip
MASK = [*FPN, "MODEL.MASK_ON", True]
C4 = [
    "MODEL.MASK_ON", True,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.STEM_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.PRE_NMS_TOPK_TEST", 150,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 40,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 32,
]  # fmt: skip
DC5 = [
    *C4,
    "MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.RESNETS.RES5_DILATION", 2,
    "MODEL.RESNETS.NUM_GROUPS", 4, "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.RPN.IN_FEATURES", ["res5"],
    "MODEL.RPN.CONV_DIMS", [-1, 24],
    "MODEL.RPN.BOUNDARY_THRESH", 4,
    "MODEL.RPN.SMOOTH_L1_BETA", 0.1, "MODEL.RPN.LOSS_WEIGHT", 0.5,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT", 2.0, "MODEL.RPN.BBOX_REG_WEIGHTS", (2.0, 2.0, 1.0, 1.0),
    "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 4,
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["res5"],
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.05, 0.3], "MODEL.ROI_HEADS.IOU_LABELS", [-1, 0, 1],
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32,
    "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_BOX_HEAD.NORM", "GN",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.5,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 3.0,
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
    "MODEL.ROI_MASK_HEAD.NORM", "GN",
]  # fmt: skip
FEW = [
    "MODEL.WEIGHTS", "",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.PRE_NMS_TOPK_TEST", 150,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 60,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 48,
]  # fmt: skip
MODELS = {
    # The configs that this package ships, at their full size
    "faster_r50_refbn": ["COCO-Detection/faster_rcnn_R_50_FPN_1x_refbn.yaml", *FEW],
    "mask_r50_refbn": ["COCO-Norms/mask_rcnn_R_50_FPN_4conv1fc_1x_refbn.yaml", *FEW],
    "mask_r50_frozenbn": ["COCO-Norms/mask_rcnn_R_50_FPN_4conv1fc_1x_frozenbn_backbone.yaml", *FEW],
    # Smaller ones, of other values
    "faster_fpn": FPN,
    "mask_fpn": MASK,
    "mask_fpn_bn_avg": [
        *MASK, "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.FPN.FUSE_TYPE", "avg",
    ],
    "mask_fpn_refbn": [
        *MASK, "MODEL.RESNETS.NORM", "RefBN", "MODEL.FPN.NORM", "RefBN",
        "MODEL.ROI_MASK_HEAD.NORM", "RefBN", "MODEL.BACKBONE.FREEZE_AT", 0,
    ],
    "mask_c4": C4,
    "faster_c4_basic_blocks": [
        *C4, "MODEL.MASK_ON", False, "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64,
    ],
    "mask_dc5_other_values": DC5,
}  # fmt: skip


def configs(overrides):
    """Return our config and Detectron2's, with the same values."""
    from detectron2.config import get_cfg as get_detectron2_cfg

    common = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", K]
    common += ["MODEL.PIXEL_STD", [57.375, 57.12, 58.395]]
    pair = get_cfg(), get_detectron2_cfg()
    for cfg in pair:
        if overrides[0].endswith(".yaml"):
            cfg.merge_from_file(str(CONFIGS / overrides[0]))
        cfg.merge_from_list([*common, *(o for o in overrides if not str(o).endswith(".yaml"))])
    return pair


def fresh(name):
    """Return our model and Detectron2's, both channels last, so that they use the same kernels."""
    from detectron2.modeling import build_model

    cfg, detectron2_cfg = configs(MODELS[name])
    theirs = build_model(detectron2_cfg).to(memory_format=torch.channels_last)
    return modeling.build_model(cfg), theirs


@functools.cache
def weights_of_many_detections(name):
    """Return a state dict that makes many detections of different classes and scores."""
    torch.manual_seed(3)
    model = fresh(name)[1].eval()
    for key, value in model.state_dict().items():
        if key.endswith(("norm.weight", "running_var")):
            value.uniform_(0.5, 1.0)
        elif key.endswith(("norm.bias", "running_mean")):
            value.normal_(0, 0.1)
    # Predictors in the order in which they depend on each other, and the spread of their outputs.
    for spreads in (
        {"objectness_logits": 2.0, "anchor_deltas": 0.3},
        {"cls_score": 2.0, "bbox_pred": 1.0},
        {"predictor": 3.0},
    ):
        layers = {key.split(".")[-1]: module for key, module in model.named_modules()}
        outputs = {key: [] for key in spreads if key in layers}
        hooks = [
            layers[key].register_forward_hook(lambda m, x, y, seen=seen: seen.append(y))
            for key, seen in outputs.items()
        ]
        model(make_samples())
        for key, seen in outputs.items():
            layers[key].weight *= spreads[key] / torch.cat([y.flatten() for y in seen]).std()
        for hook in hooks:
            hook.remove()
    return model.state_dict()


def trained_weights(name):
    """Return the weights after 60 steps of SGD on the three images, which halve the losses."""
    torch.manual_seed(0)
    model = fresh(name)[0].train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    totals = []
    for _ in range(60):
        total = sum(model(make_samples()).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0] / 2
    return model.state_dict()


def make_samples(bitmask=False, empty=()):
    """Return three images of different sizes with 0 to 6 triangles, some in two parts."""
    rng = np.random.default_rng(5)
    samples = []
    for i, (height, width) in enumerate([(96, 128), (120, 88), (64, 64)]):
        count = 0 if i in empty else 2 * i + 2
        corner = rng.uniform(0, [width - 30, height - 30], (count, 2))
        size = rng.uniform(12, 30, (count, 2))
        masks = []
        for (x, y), (w, h) in zip(corner, size, strict=True):
            polygons = [np.array([x, y, x + w, y + h / 3, x + w / 4, y + h])]
            if len(masks) % 2:
                polygons.append(np.array([x + w, y + h, x + w, y + h / 2, x + w / 2, y + h]))
            masks.append(polygons)
        if bitmask:
            from detectron2.structures.masks import polygons_to_bitmask

            masks = [polygons_to_bitmask(polygons, height, width) for polygons in masks]
        samples.append(
            {
                "file_name": f"{i}.png",
                "image_id": i,
                "height": 2 * height + i,
                "width": 3 * width,
                "image": torch.from_numpy(rng.integers(0, 255, (3, height, width), dtype=np.uint8)),
                "gt_boxes": torch.tensor(np.concatenate([corner, corner + size], 1)).float(),
                "gt_classes": torch.from_numpy(rng.integers(0, K, count)),
                "gt_masks": masks,
            }
        )
    return samples


def as_detectron2(samples):
    from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

    converted = []
    for sample in samples:
        instances = Instances(tuple(sample["image"].shape[1:]))
        instances.gt_boxes = Boxes(sample["gt_boxes"])
        instances.gt_classes = sample["gt_classes"]
        masks = sample["gt_masks"]
        if masks and isinstance(masks[0], np.ndarray):
            instances.gt_masks = BitMasks(np.stack(masks))
        else:
            instances.gt_masks = PolygonMasks(masks)
        converted.append({**sample, "instances": instances})
    return converted
