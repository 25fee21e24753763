"""Check that the torchvision engine supports what a Detectron2 config asks for."""

from collections.abc import Iterator

from refbn_d2.config import ConfigError
from refbn_d2.config.cfg_node import OTHER_ENGINE
from refbn_d2.config.checks import solver_misfits
from refbn_d2.engines.torchvision.modeling.norms import NORMS

# Key that chooses an implementation -> the values that the torchvision engine implements.
CHOICES = {
    "VERSION": (2,),
    "FLOAT32_PRECISION": ("",),
    "VIS_PERIOD": (0,),
    "MODEL.DEVICE": ("cuda", "cpu"),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.KEYPOINT_ON": (False,),
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.BACKBONE.NAME": ("build_resnet_backbone", "build_resnet_fpn_backbone"),
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": NORMS,
    "MODEL.RESNETS.RES5_DILATION": (1, 2),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False] * 4,),
    "MODEL.FPN.NORM": NORMS,
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", "Res5ROIHeads"),
    "MODEL.ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead", ""),
    "MODEL.ROI_BOX_HEAD.NORM": NORMS,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "MODEL.ROI_MASK_HEAD.NORM": NORMS,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
    "DATALOADER.BATCH_COMPOSITION": ("iid", "domain"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "SOLVER.REFERENCE_WORLD_SIZE": (0,),
    "TEST.AUG.ENABLED": (False,),
}

STAGES = ("stem", "res2", "res3", "res4", "res5")


def check_supported(cfg, way_out: str = OTHER_ENGINE) -> None:
    """Return if the torchvision engine can build and train what `cfg` asks for.

    Args:
        way_out: what to do instead, for the error.

    Raises:
        ConfigError: it cannot; lists each key with its value, what is supported, and what to do.
    """
    # Whether values fit each other is checked only if all of them are supported.
    problems = list(_unknown_choices(cfg)) or list(_misfits(cfg))
    if problems:
        raise ConfigError(
            "the torchvision engine cannot run this config:\n  "
            + "\n  ".join(
                f"{key} = {value_of(cfg, key)!r}; supported: {supported}"
                for key, supported in problems
            )
            + f"\nChange that, or {way_out}"
        )


def value_of(cfg, key: str):
    """Return the value of a full key such as "MODEL.RESNETS.DEPTH"."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _unknown_choices(cfg) -> Iterator[tuple[str, str]]:
    for key, choices in CHOICES.items():
        if value_of(cfg, key) not in choices:
            yield key, " or ".join(map(repr, choices))
    for key, _, allowed in solver_misfits(cfg):
        yield key, allowed


def _misfits(cfg) -> Iterator[tuple[str, str]]:
    """Yield (key, what is supported) for values that do not fit each other."""
    model = cfg.MODEL
    stages = list(model.RESNETS.OUT_FEATURES)
    if not stages or not set(stages) <= set(STAGES):
        yield "MODEL.RESNETS.OUT_FEATURES", f"some of {', '.join(STAGES)}"
        return
    if model.RESNETS.DEPTH < 50:
        for key, value in (("RES2_OUT_CHANNELS", 64), ("NUM_GROUPS", 1), ("RES5_DILATION", 1)):
            if model.RESNETS[key] != value:
                yield f"MODEL.RESNETS.{key}", f"{value} with DEPTH {model.RESNETS.DEPTH}"
    if model.BACKBONE.NAME == "build_resnet_fpn_backbone":
        levels = list(model.FPN.IN_FEATURES)
        if not levels or not set(levels) <= set(stages) or not _consecutive(levels):
            yield (
                "MODEL.FPN.IN_FEATURES",
                f"consecutive stages of MODEL.RESNETS.OUT_FEATURES {stages}",
            )
            return
        if model.RESNETS.RES5_DILATION != 1 and "res5" in levels:
            yield "MODEL.RESNETS.RES5_DILATION", "1 with FPN, because its strides double"
        lowest, highest = int(levels[0][-1]), int(levels[-1][-1])
        maps = [f"p{i}" for i in range(lowest, highest + 2)]
    else:
        maps = stages
    for section in ("RPN", "ROI_HEADS"):
        names = list(model[section].IN_FEATURES)
        if not names or not set(names) <= set(maps):
            yield f"MODEL.{section}.IN_FEATURES", f"some of the backbone's maps {maps}"
        if len(model[section].IOU_LABELS) != len(model[section].IOU_THRESHOLDS) + 1:
            yield f"MODEL.{section}.IOU_LABELS", "one label more than there are IOU_THRESHOLDS"
    yield from _heads_misfits(model)


def _heads_misfits(model) -> Iterator[tuple[str, str]]:
    roi_maps = list(model.ROI_HEADS.IN_FEATURES)
    if model.ROI_HEADS.NAME == "Res5ROIHeads":
        if len(roi_maps) != 1:
            yield "MODEL.ROI_HEADS.IN_FEATURES", "one map with Res5ROIHeads"
    else:
        if model.ROI_BOX_HEAD.NAME != "FastRCNNConvFCHead":
            yield "MODEL.ROI_BOX_HEAD.NAME", "'FastRCNNConvFCHead' with StandardROIHeads"
        if model.ROI_BOX_HEAD.NUM_FC + model.ROI_BOX_HEAD.NUM_CONV < 1:
            yield "MODEL.ROI_BOX_HEAD.NUM_FC", "1 or more if NUM_CONV is 0"
        if len(roi_maps) > 1 and not _consecutive(roi_maps):
            yield "MODEL.ROI_HEADS.IN_FEATURES", "consecutive maps"
    rpn_maps = len(model.RPN.IN_FEATURES)
    for key in ("SIZES", "ASPECT_RATIOS"):
        lists = model.ANCHOR_GENERATOR[key]
        per_map = lists and isinstance(lists[0], list | tuple)
        if not lists or (per_map and len(lists) not in (1, rpn_maps)):
            yield (
                f"MODEL.ANCHOR_GENERATOR.{key}",
                f"one list for all maps, or one for each of the {rpn_maps} maps of RPN.IN_FEATURES",
            )
        elif per_map and len({len(own) for own in lists}) > 1:
            yield f"MODEL.ANCHOR_GENERATOR.{key}", "lists of equal length: the maps share the head"
    if model.ROI_HEADS.NUM_CLASSES < 1:
        yield "MODEL.ROI_HEADS.NUM_CLASSES", "1 or more"
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(model[key]) != 3:
            yield f"MODEL.{key}", "3 numbers, one per channel"


def _consecutive(names: list[str]) -> bool:
    numbers = [int(name[-1]) if name[-1].isdigit() else -1 for name in names]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
