import logging
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import batched_nms
from torchvision.ops import roi_align as torchvision_roi_align

from refbn_d2.config import get_cfg
from refbn_d2.engines.torchvision.modeling import boxes as box_ops
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.engines.torchvision.modeling.backbone import FrozenBatchNorm2d
from refbn_d2.engines.torchvision.modeling.masks import mask_targets, paste_masks
from refbn_d2.engines.torchvision.modeling.roi_align import roi_align
from refbn_d2.engines.torchvision.modeling.roi_heads import ROIPooler
from refbn_d2.engines.torchvision.modeling.rpn import AnchorGenerator
from refbn_d2.layers import RefBatchNorm2d

LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
SMALL = [
    "MODEL.DEVICE", "cpu",
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
    """Noise with random triangles for objects."""
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


# ---------------------------------------------------------------------------------- model


def test_mask_rcnn_r50_fpn_has_the_parameters_of_detectron2s_zoo():
    """Counts from Detectron2's state dict of mask_rcnn_R_50_FPN_1x."""
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.MASK_ON", True, "MODEL.FPN.OUT_CHANNELS", 256])
    for key, value in zip(FPN[::2], FPN[1::2], strict=True):
        if key.endswith(("NAME", "IN_FEATURES", "OUT_FEATURES", "SIZES", "POOLER_RESOLUTION")):
            cfg.merge_from_list([key, value])
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.NUM_FC", 2, "MODEL.ROI_MASK_HEAD.NUM_CONV", 4])
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    state = model.state_dict()
    assert len(state) == 307
    assert sum(value.numel() for value in state.values()) == 44_449_456
    assert state["backbone.bottom_up.res5.0.shortcut.weight"].shape == (2048, 1024, 1, 1)
    assert state["roi_heads.mask_head.deconv.weight"].shape == (256, 256, 2, 2)
    assert state["proposal_generator.rpn_head.anchor_deltas.bias"].shape == (12,)


@pytest.mark.parametrize("norm", ["RefBN", "BN", "SyncBN", "FrozenBN", "GN", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_norm_trains_a_step(norm, dtype, caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        model = build_model(config(norm=norm))
    assert ("SyncBN" in caplog.text) == (norm == "SyncBN")
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = trained_step(model, make_samples())
    assert losses.keys() == LOSSES
    assert all(math.isfinite(value) and value > 0 for value in losses.values()), losses
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    moved = [name for name, value in model.named_parameters() if not value.equal(before[name])]
    assert all(value.isfinite().all() for value in model.parameters())
    assert len(moved) > 0.9 * len(before)


def test_bfloat16_losses_are_near_those_of_float32():
    """The RoIs are the ground truth alone: rounding must not choose others."""
    model = build_model(config(norm="GN")).train()
    model.proposal_generator.options.POST_NMS_TOPK_TRAIN = 0
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            found.append({name: loss.item() for name, loss in model(make_samples()).items()})
    assert found[1] == pytest.approx(found[0], rel=0.1, abs=0.02)
    assert found[1] != found[0]


@pytest.mark.parametrize("overrides", [FPN, C4], ids=["fpn", "c4"])
@pytest.mark.parametrize("case", ["one image", "all images", "no foreground", "no RoIs"])
def test_missing_ground_truth_leaves_every_parameter_a_gradient(overrides, case):
    cfg = config([*overrides, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", case == "one image"], "BN")
    if case == "no RoIs":
        cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = 10_000
    if case == "no foreground":
        cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = [0.999]
    torch.manual_seed(0)
    model = build_model(cfg)
    samples = make_samples()
    empty = make_samples(objects=0)
    samples = {"one image": [samples[0], empty[1]], "no foreground": samples}.get(case, empty)
    losses = trained_step(model, samples)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    zero = {
        "one image": set(),
        "no foreground": {"loss_mask", "loss_box_reg"},
        "all images": {"loss_mask", "loss_box_reg", "loss_rpn_loc"},
        "no RoIs": {"loss_mask", "loss_box_reg", "loss_rpn_loc", "loss_cls"},
    }[case]
    assert {name for name, value in losses.items() if value == 0} == zero
    assert all(math.isfinite(value) for value in losses.values())
    assert all(value.isfinite().all() for value in model.buffers())


def test_losses_of_constant_predictions_are_known():
    """All logits 0: cross-entropies are ln 2 and ln(K + 1), normalisers count the samples."""
    doubled = ["RPN.LOSS_WEIGHT", "ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "RPN.BBOX_REG_LOSS_WEIGHT"]
    found = []
    for weights in ((1.0, 1.0, 1.0), (2.0, 3.0, 1.0), (1.0, 1.0, 5.0)):
        cfg = config()
        for key, value in zip(doubled, weights, strict=True):
            cfg.merge_from_list([f"MODEL.{key}", value])
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 0  # the RoIs are the ground truth
        model = build_model(cfg)
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("logits", "deltas", "score", "pred")):
                nn.init.zeros_(parameter)
        nn.init.constant_(model.roi_heads.box_predictor.bbox_pred.bias, 0.25)
        torch.manual_seed(0)
        found.append(trained_step(model, make_samples()))
    first, weighted, loc_weighted = found
    assert first["loss_rpn_cls"] == pytest.approx(math.log(2))
    assert first["loss_cls"] == pytest.approx(math.log(4))
    assert first["loss_mask"] == pytest.approx(math.log(2))
    assert first["loss_box_reg"] == pytest.approx(4 * 0.25)
    assert 0 < first["loss_rpn_loc"] < 1
    factors = {"loss_rpn_cls": 2, "loss_rpn_loc": 2, "loss_box_reg": 3}
    for name, value in first.items():
        assert weighted[name] == pytest.approx(value * factors.get(name, 1))
    assert loc_weighted == pytest.approx({**first, "loss_rpn_loc": 5 * first["loss_rpn_loc"]})


def test_a_batch_is_normalised_padded_with_zeros_and_channels_last():
    model = build_model(config())
    samples = make_samples()
    batch, sizes = model.preprocess_image(samples)
    assert batch.shape == (2, 3, 96, 96) and sizes == [(64, 96), (80, 64)]
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch[0, :, 64:].abs().sum() == batch[1, :, 80:].abs().sum() == 0
    assert batch[1, :, :, 64:].abs().sum() == 0
    pixel = (samples[1]["image"][2, 79, 63].item() - 123.675) / 58.395
    assert batch[1, 2, 79, 63].item() == pytest.approx(pixel, rel=1e-5)


def test_detections_do_not_depend_on_the_other_images():
    """GN couples no images: an image's detections stay when its neighbour of equal size changes."""
    torch.manual_seed(0)
    cfg = config([*FPN, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0], "GN")
    model = build_model(cfg).eval()
    first, second, other = make_samples([(64, 96)] * 3)
    with torch.no_grad():
        found, after = model([first, second])[0], model([first, other])[0]
        alone = model([first])[0]
    assert len(found["scores"]) > 20
    for result in (after, alone):
        torch.testing.assert_close(result["pred_boxes"], found["pred_boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(result["scores"], found["scores"])
        assert result["pred_classes"].equal(found["pred_classes"])
    height, width = found["pred_masks"].shape[1:]
    assert (height, width) == (128, 288)
    low, high = found["pred_boxes"][:, :2], found["pred_boxes"][:, 2:]
    assert (low >= 0).all() and (high > low).all()
    assert (high <= torch.tensor([width, height])).all() and high[:, 0].max() > 100


def test_no_detections_have_the_usual_shapes():
    """Where no score reaches the threshold, and where all boxes lie outside of the image."""
    for threshold, shift in ((0.999, 0.0), (0.0, 1000.0)):
        model = build_model(config([*FPN, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", threshold])).eval()
        with torch.no_grad():
            model.roi_heads.box_predictor.bbox_pred.bias[::4] = shift
            found = model(make_samples())
        assert [tuple(v.shape) for v in found[1].values()] == [(0, 4), (0,), (0,), (0, 160, 192)]
        assert found[1]["pred_masks"].dtype == torch.bool


def test_rows_appended_and_dropped_around_the_backbone_leave_the_losses():
    torch.manual_seed(0)
    model = build_model(config(norm="GN")).train()
    shapes, samples = [], make_samples()

    def append(module, args):
        shapes.append(args[0].shape)
        return (torch.cat([args[0], torch.ones(3, *args[0].shape[1:])]),)

    losses = []
    for appended in (False, True):
        if appended:
            model.backbone.register_forward_pre_hook(append)
            model.backbone.register_forward_hook(
                lambda module, args, maps: {name: value[:-3] for name, value in maps.items()}
            )
        torch.manual_seed(1)
        with torch.no_grad():
            losses.append({name: value.item() for name, value in model(samples).items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert shapes == [(2, 3, 96, 96)]


def test_frozen_stages_are_constant_and_the_others_refbn():
    cfg = config([*FPN, "MODEL.BACKBONE.FREEZE_AT", 3], norm="RefBN")
    cfg.merge_from_list(["MODEL.REFBN.REFERENCE_WEIGHT", 0.5, "MODEL.REFBN.GRADIENT", "pooled"])
    model = build_model(cfg)
    stages = {name: getattr(model.backbone.bottom_up, name) for name in ("stem", "res3", "res4")}
    for name, stage in stages.items():
        norms = [m for m in stage.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
        frozen = name != "res4"
        kind = FrozenBatchNorm2d if frozen else RefBatchNorm2d
        assert norms and all(type(norm) is kind for norm in norms)
        assert all(p.requires_grad != frozen for p in stage.parameters())
    norm = stages["res4"][0].conv1.norm
    assert (norm.reference_weight, norm.gradient) == (0.5, "pooled")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained_step(model, make_samples())
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert changed and not any(key.startswith("backbone.bottom_up.res3") for key in changed)
    assert "backbone.bottom_up.res4.0.conv1.norm.running_mean" in changed


def test_a_frozen_batch_norm_is_the_batch_norm_in_eval_mode():
    norm = nn.BatchNorm2d(6, eps=1e-3)
    for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        value.uniform_(0.5, 2)
    frozen = FrozenBatchNorm2d.of(norm)
    for requires_grad in (False, True):
        x = torch.randn(2, 6, 4, 5, requires_grad=requires_grad)
        torch.testing.assert_close(frozen(x), norm.eval()(x))
    assert not list(frozen.parameters())
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(FrozenBatchNorm2d(6)(x), x)  # the identity at first


def test_diverged_training_is_an_error_and_eval_drops_what_is_not_finite():
    model = build_model(config())
    with torch.no_grad():
        model.proposal_generator.rpn_head.objectness_logits.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        model.train()(make_samples())
    broken = build_model(config([*FPN, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]))
    with torch.no_grad():
        assert [len(found["scores"]) for found in model.eval()(make_samples())] == [0, 0]
        broken.roi_heads.box_predictor.bbox_pred.bias[0] = float("nan")
        assert [len(found["scores"]) for found in broken.eval()(make_samples())] == [0, 0]


def test_a_sample_without_ground_truth_is_named():
    sample = make_samples()[0]
    del sample["gt_masks"]
    with pytest.raises(KeyError, match="dog.jpg.*gt_masks"):
        build_model(config()).train()([{**sample, "file_name": "dog.jpg"}])


# ---------------------------------------------------------------------------------- boxes


def naive_iou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if w * h > 0 else 0.0


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator) * 50
    return torch.cat([low, low + 1 + torch.rand(*shape, 2, generator=generator) * 30], -1)


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


def test_anchors_are_centred_on_the_grid():
    cfg = config()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 2.0]]
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.25
    generator = AnchorGenerator(cfg, [8, 16])
    for grid in ((3, 5), (2, 2)):  # the second is not the first one's, kept
        anchors = generator([torch.empty(1, 1, *grid), torch.empty(1, 1, 1, 1)])
        for (rows, columns), stride, found in zip((grid, (1, 1)), (8, 16), anchors, strict=True):
            wanted = []
            for row in range(rows):
                for column in range(columns):
                    x, y = (column + 0.25) * stride, (row + 0.25) * stride
                    for size in (32, 64):
                        for ratio in (0.5, 2.0):
                            w, h = size / math.sqrt(ratio), size * math.sqrt(ratio)
                            wanted.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            torch.testing.assert_close(found, torch.tensor(wanted))


# ---------------------------------------------------------------------------------- RoIs and masks


def test_roi_levels_follow_the_formula():
    head = config().MODEL.ROI_BOX_HEAD
    boxes = random_boxes(500) * 20
    rois = torch.cat([torch.zeros(500, 1), boxes], dim=1)
    pooler = ROIPooler(head, [4, 8, 16, 32])
    found = pooler.levels(rois).tolist()
    for (x0, y0, x1, y1), level in zip(boxes.double().tolist(), found, strict=True):
        exact = 4 + math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 224)
        if abs(exact - round(exact)) > 1e-5:
            assert level + 2 == min(max(math.floor(exact), 2), 5)
    assert set(found) == {0, 1, 2, 3}
    features = [torch.rand(1, 2, 64 >> i, 64 >> i) for i in range(4)]
    pooled = pooler(features, rois)
    for i in range(0, 500, 10):
        level = found[i]
        alone = torchvision_roi_align(
            features[level], rois[i : i + 1], 7, 0.25 / 2**level, 0, aligned=True
        )
        assert pooled[i : i + 1].equal(alone)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_aligns_gradient_is_torchvisions(ratio, aligned):
    """RoIs of all sizes, many in one image and none in another, some outside of the map."""
    torch.manual_seed(0)
    low = torch.rand(150, 2) * torch.tensor([90.0, 60]) - 15
    boxes = torch.cat([low, low + torch.rand(150, 2) * 80], dim=1)
    boxes[0, 2:] = boxes[0, :2]  # without area
    boxes[1] = torch.tensor([400.0, 400, 420, 420])
    boxes[2] = torch.tensor([8.0, 8, 64, 64])  # of exactly 2 x 2 cells a bin
    image = torch.cat([torch.zeros(80), torch.full((70,), 2.0)])
    rois = torch.cat([image[:, None], boxes], dim=1)
    weight = torch.randn(150, 5, 7, 7)
    grads = []
    for pool in (
        lambda x: roi_align(x, rois, 7, 4, ratio, aligned),
        lambda x: torchvision_roi_align(x, rois, 7, 0.25, ratio, aligned),
    ):
        x = torch.randn(3, 5, 16, 24, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        pooled = pool(x)
        (pooled * weight).sum().backward()
        grads.append((pooled.detach(), x.grad))
    assert grads[0][0].equal(grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], atol=1e-4, rtol=1e-4)


def test_pasted_masks_are_bilinear_samples_at_pixel_centres():
    rng = np.random.default_rng(0)
    masks = rng.random((3, 4, 4))
    boxes = np.array([[2.3, 1.1, 9.7, 8.4], [-3.0, 4.0, 4.0, 15.0], [5.2, 5.2, 5.9, 6.0]])
    pasted = paste_masks(torch.tensor(masks).float(), torch.tensor(boxes).float(), 12, 10)
    assert pasted.shape == (3, 12, 10)
    for mask, (x0, y0, x1, y1), found in zip(masks, boxes, pasted.numpy(), strict=True):
        padded = np.pad(mask, 2)  # zeros around
        for row in range(12):
            for column in range(10):
                x = (column + 0.5 - x0) / (x1 - x0) * 4 - 0.5
                y = (row + 0.5 - y0) / (y1 - y0) * 4 - 0.5
                if not (-1 < x < 4 and -1 < y < 4):
                    assert not found[row, column]
                    continue
                i, j = math.floor(y), math.floor(x)
                cell, a, b = padded[i + 2 : i + 4, j + 2 : j + 4], y - i, x - j
                value = np.array([1 - a, a]) @ cell @ np.array([1 - b, b])
                if abs(value - 0.5) > 1e-4:
                    assert found[row, column] == (value >= 0.5)
    assert pasted[0].any() and pasted[1].any()
    assert paste_masks(torch.zeros(0, 4, 4), torch.zeros(0, 4), 12, 10).shape == (0, 12, 10)


def test_mask_targets_show_the_object_within_the_box():
    """A rectangle as polygon, as two polygons and as bitmask; and an object without polygons."""
    whole = [np.array([10.0, 10, 30, 10, 30, 40, 10, 40])]
    halves = [
        np.array([10.0, 10, 20, 10, 20, 40, 10, 40]),
        np.array([20.0, 10, 30, 10, 30, 40, 20, 40]),
    ]
    bitmap = np.zeros((60, 50), dtype=bool)
    bitmap[10:40, 10:30] = True
    box = torch.tensor([20.0, 25, 40, 55])  # the rectangle is its upper left quarter
    targets = mask_targets([whole, halves, bitmap, []], box.expand(4, 4), 28)
    wanted = torch.zeros(28, 28, dtype=torch.bool)
    wanted[:14, :14] = True
    assert targets.shape == (4, 28, 28) and targets.dtype == torch.bool
    assert targets[0].equal(wanted) and targets[1].equal(wanted) and targets[2].equal(wanted)
    assert not targets[3].any()
    assert mask_targets([], torch.zeros(0, 4), 28).shape == (0, 28, 28)
