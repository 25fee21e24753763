import logging
import math

import pytest
import torch
from torch import nn

from refbn_d2.config import get_cfg
from refbn_d2.engines.torchvision.modeling import build_model
from tests.device import DEVICE
from tests.engines.torchvision.modeling.helpers import C4, FPN, config, make_samples, trained_step

LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}


def test_mask_rcnn_r50_fpn_has_the_parameters_of_detectron2s_zoo():
    """The counts are those of Detectron2's state dict of mask_rcnn_R_50_FPN_1x."""
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
    assert ("SyncBN" in caplog.text) == (norm == "SyncBN" and DEVICE == "cpu")
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = trained_step(model, make_samples())
    assert losses.keys() == LOSSES
    assert all(math.isfinite(value) and value > 0 for value in losses.values()), losses
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    moved = [name for name, value in model.named_parameters() if not value.equal(before[name])]
    assert all(value.isfinite().all() for value in model.parameters())
    assert len(moved) > 0.9 * len(before)


def test_bfloat16_losses_are_near_those_of_float32():
    """The RoIs are only the ground truth, so that rounding cannot choose others."""
    model = build_model(config(norm="GN")).train()
    model.proposal_generator.options.POST_NMS_TOPK_TRAIN = 0
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled), torch.no_grad():
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
    """All logits are 0: cross-entropies are ln 2 and ln(K + 1), normalizers count samples."""
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


def test_a_batch_is_normalized_padded_with_zeros_and_channels_last():
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
    """GN couples no images: detections stay the same if another image of equal size changes."""
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
    assert (high <= high.new_tensor([width, height])).all() and high[:, 0].max() > 100


def test_no_detections_have_the_usual_shapes():
    """No score reaches the threshold, or all boxes are outside of the image."""
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
        return (torch.cat([args[0], args[0].new_ones(3, *args[0].shape[1:])]),)

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
