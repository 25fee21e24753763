"""The engine's R-CNN against Detectron2's, with the same weights on the same images."""

import numpy as np
import pytest
import torch

from refbn_d2.engines.torchvision import modeling
from refbn_d2.engines.torchvision.modeling import boxes as our_boxes
from refbn_d2.engines.torchvision.modeling import roi_heads
from refbn_d2.engines.torchvision.modeling.masks import mask_targets, paste_masks
from tests.engines.torchvision.modeling.pairs import (
    FPN,
    MASK,
    MODELS,
    as_detectron2,
    configs,
    fresh,
    make_samples,
    trained_weights,
    weights_of_many_detections,
)

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module", autouse=True)
def _detectron2():
    pytest.importorskip("detectron2")


@pytest.fixture
def models(request):
    """Return our model and Detectron2's, with the same weights."""
    with torch.no_grad():
        state = weights_of_many_detections(request.param)
    pair = fresh(request.param)
    for model in pair:
        model.load_state_dict(state, strict=True)
    return pair


@pytest.fixture
def first_come_sampling(monkeypatch):
    """Make both models sample the first candidates instead of random ones."""

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
    # The comparison can fail: there are many detections of several classes and scores.
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
    """Compare proposals, boxes, scores, classes and pasted masks of both models in eval mode."""
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
def test_initialization_is_detectron2s(name):
    """The same seed gives the same weights, to the last bit."""
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
    """Return ordinary boxes, one of 0.05 pixels, and one partly outside of the image."""
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
    for i in range(8, 16):  # tiny boxes across the object's upper edge
        x0, y0, x1, y1 = sample["gt_boxes"][pick[i]].tolist()
        center = torch.tensor([(x0 + x1) / 2, y0 + (y1 - y0) / 6] * 2)
        near[i] = center + torch.tensor([-1, -1, 1, 1]) * 0.02 * (i - 7)
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
