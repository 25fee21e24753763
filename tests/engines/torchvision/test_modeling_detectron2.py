"""The engine's R-CNN against Detectron2's own, with the same weights on the same images."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from refbn_d2.config import get_cfg
from refbn_d2.engines.torchvision import modeling
from refbn_d2.engines.torchvision.modeling import boxes as our_boxes
from refbn_d2.engines.torchvision.modeling import roi_heads
from refbn_d2.engines.torchvision.modeling.masks import mask_targets, paste_masks

pytestmark = pytest.mark.detectron2

CONFIGS = Path(__file__).parents[3] / "configs"
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


@pytest.fixture(scope="module", autouse=True)
def _detectron2():
    pytest.importorskip("detectron2")


def configs(overrides):
    """Our config and Detectron2's, of the same values."""
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
    """Our model and Detectron2's; both channels last, so that the same kernels round alike."""
    from detectron2.modeling import build_model

    cfg, detectron2_cfg = configs(MODELS[name])
    theirs = build_model(detectron2_cfg).to(memory_format=torch.channels_last)
    return modeling.build_model(cfg), theirs


@functools.cache
def weights_of_many_detections(name):
    """A state dict that makes many detections of different classes and scores."""
    torch.manual_seed(3)
    model = fresh(name)[1].eval()
    for key, value in model.state_dict().items():
        if key.endswith(("norm.weight", "running_var")):
            value.uniform_(0.5, 1.0)
        elif key.endswith(("norm.bias", "running_mean")):
            value.normal_(0, 0.1)
    # Predictors in the order they depend on each other, and the spread of their outputs.
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
    """What 60 steps of SGD on the three images leave: the losses are half of what they were."""
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


@pytest.fixture
def models(request):
    """Our model and Detectron2's, with the same weights."""
    with torch.no_grad():
        state = weights_of_many_detections(request.param)
    pair = fresh(request.param)
    for model in pair:
        model.load_state_dict(state, strict=True)
    return pair


def make_samples(bitmask=False, empty=()):
    """Three images of different sizes with 0 to 6 objects: triangles, some in two parts."""
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


@pytest.fixture
def first_come_sampling(monkeypatch):
    """Both sides sample the first candidates instead of random ones."""

    def in_order(n, **kwargs):
        return torch.arange(n, device=kwargs.get("device"))

    class Torch:  # `torch` as our sampling sees it
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def rand(shape, device=None):
            return (torch.arange(shape[1], device=device) / shape[1]).expand(shape)

    monkeypatch.setattr(torch, "randperm", in_order)
    monkeypatch.setattr(our_boxes, "torch", Torch())


def close(first, second, tolerance):
    torch.testing.assert_close(first, second, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("models", MODELS, indirect=True)
def test_detections_are_detectron2s(models):
    check_detections(*models)
    # The comparison is worth something: many detections of several classes and scores.
    with torch.no_grad():
        found = models[0](make_samples())
    assert all(f["pred_masks"].sum() > 5000 for f in found if "pred_masks" in f)
    scores = torch.cat([f["scores"] for f in found])
    classes = torch.cat([f["pred_classes"] for f in found])
    assert len(scores) > 40 and scores.std() > 0.01 and len(classes.unique()) > 2


def test_detections_of_a_trained_model_are_detectron2s():
    pair, weights = fresh("mask_fpn_refbn"), trained_weights("mask_fpn_refbn")
    for model in pair:
        model.load_state_dict(weights, strict=True)
    check_detections(*pair)
    assert max(found["scores"].max() for found in pair[0](make_samples())) > 0.5


@torch.no_grad()
def check_detections(ours, theirs):
    """Proposals, boxes, scores, classes and pasted masks of both models in eval mode."""
    ours.eval()
    theirs.eval()
    samples = make_samples()
    images = theirs.preprocess_image(samples)
    batch, sizes = ours.preprocess_image(samples)
    close(batch, images.tensor, 0)
    assert sizes == images.image_sizes
    features = theirs.backbone(images.tensor)
    for name, value in ours.backbone(batch).items():
        close(value, features[name], 1e-5)
    proposals, _ = theirs.proposal_generator(images, features)
    for mine, his in zip(
        ours.proposal_generator(features, torch.tensor(sizes).float())[0],
        proposals,
        strict=True,
    ):
        close(mine, his.proposal_boxes.tensor, 1e-4)
    expected = [output["instances"] for output in theirs(samples)]
    detections = ours(samples)
    for found, instances in zip(detections, expected, strict=True):
        close(found["scores"], instances.scores, 1e-5)
        close(found["pred_boxes"], instances.pred_boxes.tensor, 1e-4)
        assert found["pred_classes"].equal(instances.pred_classes)
        if instances.has("pred_masks"):
            assert found["pred_masks"].equal(instances.pred_masks)
            assert instances.pred_masks.any()


@pytest.mark.parametrize(
    "models, bitmask",
    [*((name, False) for name in MODELS), ("mask_fpn", True), ("mask_c4", True)],
    indirect=["models"],
)
def test_losses_and_step_are_detectron2s(models, bitmask, first_come_sampling):
    from detectron2.utils.events import EventStorage

    ours, theirs = models
    samples = make_samples(bitmask, empty=() if bitmask else (1,))
    with EventStorage():
        expected = theirs(as_detectron2(samples))
    losses = ours(samples)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), abs=1e-4, rel=1e-4), name
        assert value > 0, name
    for model, total in ((ours, losses), (theirs, expected)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        sum(total.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        close(state[name], value, 1e-5)


def test_no_foreground_and_no_ground_truth_are_detectron2s(first_come_sampling):
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    cfg, detectron2_cfg = configs([*MASK, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False])
    ours, theirs = modeling.build_model(cfg), build_model(detectron2_cfg)
    ours.load_state_dict(theirs.state_dict())
    samples = make_samples(empty=(0, 1, 2))
    with EventStorage():
        expected = theirs(as_detectron2(samples))
    losses = ours(samples)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), abs=1e-5), name
    assert losses["loss_mask"] == losses["loss_rpn_loc"] == losses["loss_box_reg"] == 0


@pytest.mark.parametrize("name", ["mask_fpn", "mask_dc5_other_values"])
def test_initialisation_is_detectron2s(name):
    """The same seed gives the same weights, to the last bit: every layer is filled alike."""
    from detectron2.modeling import build_model

    cfg, detectron2_cfg = configs([*MODELS[name], "MODEL.BACKBONE.FREEZE_AT", 0])
    torch.manual_seed(11)
    expected = build_model(detectron2_cfg).state_dict()
    torch.manual_seed(11)
    state = modeling.build_model(cfg).state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].equal(value), key


@pytest.mark.parametrize(
    "norm, freeze_at, others",
    [
        ("BN", 3, ["MODEL.RESNETS.DEPTH", 34]),
        ("FrozenBN", 2, ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]),
        (
            "GN",
            5,
            [
                *["MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256],
                *["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8],
                *["MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.FPN.NORM", "GN"],
            ],
        ),
        ("", 0, ["MODEL.ROI_BOX_HEAD.NUM_CONV", 2, "MODEL.ROI_MASK_HEAD.NORM", "SyncBN"]),
    ],
)
def test_names_shapes_and_freezing_are_detectron2s(norm, freeze_at, others):
    from detectron2.modeling import build_model

    overrides = [*MASK, "MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze_at, *others]
    cfg, detectron2_cfg = configs(overrides)
    detectron2_cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        ours, theirs = modeling.GeneralizedRCNN(cfg), build_model(detectron2_cfg)
    strides = [m.stride for m in theirs.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.stride for m in ours.backbone.modules() if isinstance(m, torch.nn.Conv2d)] == strides
    for mine, his in (
        (ours.state_dict(), theirs.state_dict()),
        (dict(ours.named_parameters()), dict(theirs.named_parameters())),
    ):
        assert list(mine) == list(his)
        for name, value in mine.items():
            assert value.requires_grad == his[name].requires_grad, name
            assert value.shape == his[name].shape, name


def awkward_boxes(count, rng, width, height):
    """Ordinary ones, one of 0.05 pixels, and one partly outside of the image."""
    low = rng.uniform(-5, [width - 20, height - 20], (count, 2))
    size = rng.uniform(2, 60, (count, 2))
    size[0] = 0.05
    return torch.tensor(np.concatenate([low, low + size], 1)).float()


@pytest.mark.parametrize("bitmask", [False, True], ids=["polygon", "bitmask"])
def test_mask_targets_are_detectron2s(bitmask):
    sample = make_samples(bitmask)[1]
    instances = as_detectron2([sample])[0]["instances"]
    rng = np.random.default_rng(1)
    pick = torch.from_numpy(rng.integers(0, len(sample["gt_masks"]), 40))
    near = sample["gt_boxes"][pick] + torch.from_numpy(rng.normal(0, 4, (40, 4))).float()
    near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 3)
    near[:8] = awkward_boxes(8, rng, 88, 120)
    for i in range(8, 16):  # tiny ones, across the object's upper edge
        x0, y0, x1, y1 = sample["gt_boxes"][pick[i]].tolist()
        centre = torch.tensor([(x0 + x1) / 2, y0 + (y1 - y0) / 6] * 2)
        near[i] = centre + torch.tensor([-1, -1, 1, 1]) * 0.02 * (i - 7)
    expected = instances.gt_masks[pick].crop_and_resize(near, 28)
    ours = mask_targets([sample["gt_masks"][i] for i in pick.tolist()], near, 28)
    assert ours.equal(expected) and 0.1 < expected.float().mean() < 0.9


def test_pasted_masks_are_detectron2s():
    from detectron2.layers import paste_masks_in_image

    rng = np.random.default_rng(2)
    masks = torch.from_numpy(rng.random((12, 28, 28))).float()
    boxes = awkward_boxes(12, rng, 50, 40)
    expected = paste_masks_in_image(masks, boxes, (40, 50))
    assert paste_masks(masks, boxes, 40, 50).equal(expected) and expected.any()
    assert paste_masks(masks[:0], boxes[:0], 40, 50).shape == (0, 40, 50)


@pytest.mark.parametrize("aligned", [True, False])
def test_every_roi_goes_to_detectron2s_level(aligned):
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    cfg = configs(FPN)[0]
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2" if aligned else "ROIAlign"
    sides = torch.tensor([4.0, 55.9, 56, 111.9, 112, 224, 447, 448, 900])
    boxes = torch.stack([sides * 0, sides * 0, sides * 2, sides / 2], dim=1)
    features = [torch.rand(2, 3, 64 >> i, 64 >> i) for i in range(4)]
    theirs = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE)
    expected = theirs(features, [Boxes(boxes[:4]), Boxes(boxes[4:])])
    image = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1.0])
    ours = roi_heads.ROIPooler(cfg.MODEL.ROI_BOX_HEAD, [4, 8, 16, 32])
    assert ours(features, torch.cat([image[:, None], boxes], 1)).equal(expected)
