"""The torchvision engine refuses configs that it does not support, with a helpful error."""

from pathlib import Path

import pytest

from refbn_d2.config import ConfigError, get_cfg
from refbn_d2.engines.torchvision.supported import CHOICES, check_supported, value_of

FPN = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
]
COSINE = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR", 0.001]
RESNET18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]


def config(*overrides):
    cfg = get_cfg()
    cfg.merge_from_list([*overrides])
    return cfg


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["MODEL.MASK_ON", True],
        FPN,
        FPN + RESNET18,
        [*FPN, "MODEL.RESNETS.NORM", "RefBN", "MODEL.FPN.NORM", "GN"],
        [*FPN, "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]]],
        [*FPN, "INPUT.CROP.ENABLED", True, "TEST.AUG.FLIP", False],
        [*COSINE, "SOLVER.BASE_LR_END", 0.001],
        ["SOLVER.BASE_LR_END", 0.1],  # has no effect with steps
        ["MODEL.RETINANET.NUM_CLASSES", 3],  # has no effect, also in Detectron2
    ],
)
def test_supported(overrides):
    check_supported(config(*overrides))


def test_every_key_of_the_table_exists_and_its_default_passes():
    cfg = get_cfg()
    for key, choices in CHOICES.items():
        assert value_of(cfg, key) in choices
        assert all(type(choice) is type(value_of(cfg, key)) for choice in choices)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("MODEL.META_ARCHITECTURE", "RetinaNet", "'GeneralizedRCNN'"),
        ("MODEL.META_ARCHITECTURE", "ProposalNetwork", "'GeneralizedRCNN'"),
        ("MODEL.META_ARCHITECTURE", "PanopticFPN", "'GeneralizedRCNN'"),
        ("MODEL.KEYPOINT_ON", True, "False"),
        ("MODEL.LOAD_PROPOSALS", True, "False"),
        ("MODEL.BACKBONE.NAME", "build_regnet_backbone", "'build_resnet_backbone' or"),
        ("MODEL.RESNETS.NORM", "LN", "'RefBN' or 'RefIN' or 'BN'"),
        ("MODEL.RESNETS.DEPTH", 26, "18 or 34 or 50"),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True], "[False, False"),
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "'StandardROIHeads'"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou", "'smooth_l1'"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "'ROIAlignV2'"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "'TrainingSampler'"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "'WarmupMultiStepLR' or 'WarmupCosineLR'"),
        ("TEST.AUG.ENABLED", True, "False"),
        ("VERSION", 1, "2"),
    ],
)
def test_an_unsupported_choice_is_named(key, value, supported):
    with pytest.raises(ConfigError) as error:
        check_supported(config(key, value))
    for part in (f"{key} = {value!r}", f"supported: {supported}", "--engine detectron2"):
        assert part in str(error.value)


def test_all_unsupported_keys_are_listed():
    cfg = config("MODEL.KEYPOINT_ON", True, "TEST.AUG.ENABLED", True, "MODEL.FPN.NORM", "LN")
    with pytest.raises(ConfigError) as error:
        check_supported(cfg)
    for key in ("MODEL.KEYPOINT_ON", "TEST.AUG.ENABLED", "MODEL.FPN.NORM"):
        assert key in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["MODEL.RESNETS.DEPTH", 18], "MODEL.RESNETS.RES2_OUT_CHANNELS"),
        ([*RESNET18, "MODEL.RESNETS.NUM_GROUPS", 32], "MODEL.RESNETS.NUM_GROUPS"),
        (["MODEL.RESNETS.OUT_FEATURES", ["res6"]], "MODEL.RESNETS.OUT_FEATURES"),
        (["MODEL.RESNETS.OUT_FEATURES", []], "MODEL.RESNETS.OUT_FEATURES"),
        (["MODEL.RPN.IN_FEATURES", ["res5"]], "MODEL.RPN.IN_FEATURES"),
        (["MODEL.ROI_HEADS.IN_FEATURES", []], "MODEL.ROI_HEADS.IN_FEATURES"),
        (["MODEL.RPN.IOU_LABELS", [0, 1]], "MODEL.RPN.IOU_LABELS"),
        (["MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "MODEL.ROI_BOX_HEAD.NAME"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 0], "MODEL.ROI_HEADS.NUM_CLASSES"),
        (["MODEL.PIXEL_STD", [1.0]], "MODEL.PIXEL_STD"),
        (["SOLVER.MAX_ITER", 0], "SOLVER.MAX_ITER"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD"),
        (["SOLVER.BASE_LR", 0], "SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR", float("nan")], "SOLVER.BASE_LR"),
        ([*COSINE, "SOLVER.BASE_LR_END", 0.0011], "SOLVER.BASE_LR_END"),
        ([*COSINE, "SOLVER.BASE_LR_END", -0.1], "SOLVER.BASE_LR_END"),
        ([*FPN, "MODEL.FPN.IN_FEATURES", []], "MODEL.FPN.IN_FEATURES"),
        ([*FPN, "MODEL.FPN.IN_FEATURES", ["res2", "res4"]], "MODEL.FPN.IN_FEATURES"),
        ([*FPN, "MODEL.RESNETS.RES5_DILATION", 2], "MODEL.RESNETS.RES5_DILATION"),
        ([*FPN, "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p4"]], "MODEL.ROI_HEADS.IN_FEATURES"),
        ([*FPN, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads"], "MODEL.ROI_HEADS.IN_FEATURES"),
        ([*FPN, "MODEL.ROI_BOX_HEAD.NUM_FC", 0], "MODEL.ROI_BOX_HEAD.NUM_FC"),
        ([*FPN, "MODEL.ANCHOR_GENERATOR.SIZES", [[32]] * 4], "MODEL.ANCHOR_GENERATOR.SIZES"),
        (
            [*FPN, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0], [1.0, 2.0]] + [[1.0]] * 3],
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(overrides, key):
    with pytest.raises(ConfigError, match=f"{key} = "):
        check_supported(config(*overrides))


@pytest.mark.detectron2
def test_detectron2s_own_yamls():
    """Faster and Mask R-CNN with any of their backbones pass; the error of others names a key."""
    package = Path(pytest.importorskip("detectron2").__file__).parent
    configs = package.parent / "configs"
    if not configs.is_dir():
        configs = package / "model_zoo" / "configs"
    if not configs.is_dir():
        pytest.skip("Detectron2 is installed without its configs")
    refused = {
        "fast_rcnn": "MODEL.LOAD_PROPOSALS = True",
        "retinanet": "MODEL.META_ARCHITECTURE = 'RetinaNet'",
        "rpn": "MODEL.META_ARCHITECTURE = 'ProposalNetwork'",
        "giou": "MODEL.RPN.BBOX_REG_LOSS_TYPE = 'giou'",
        "keypoint": "MODEL.KEYPOINT_ON = True",
        "panoptic": "MODEL.META_ARCHITECTURE = 'PanopticFPN'",
    }
    passed = 0
    for folder in (
        "",
        "COCO-Detection",
        "COCO-InstanceSegmentation",
        "COCO-Keypoints",
        "COCO-PanopticSegmentation",
    ):
        for path in sorted((configs / folder).glob("*.yaml")):
            name = path.name.lower()
            reason = [why for key, why in refused.items() if name.startswith(("base-" + key, key))]
            reason += [refused["giou"]] if "giou" in name else []
            try:
                cfg = get_cfg()
                cfg.merge_from_file(str(path))
                check_supported(cfg)
                passed += 1
                assert not reason, path
            except ConfigError as error:
                assert reason and reason[0] in str(error), f"{path}: {error}"
                assert "--engine detectron2" in str(error)
    assert passed >= 20
