import pytest
import torch
import torchvision


def randomise(model, seed=0):
    """Give the norms random values, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "ref_mean")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        elif name.endswith(("running_var", "ref_var")) or ".norm.weight" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
    return model.eval()


@pytest.fixture(scope="session")
def resnet18():
    torch.manual_seed(0)
    return randomise(torchvision.models.resnet18(num_classes=7))


@pytest.fixture(scope="session")
def mask_rcnn_cfg():
    """Return a config of Mask R-CNN R-18-FPN, with RefBN wherever Detectron2 has a norm."""
    from refbn_d2.config import get_cfg

    stages, maps = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5", "p6"]
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "MODEL.DEVICE", "cpu", "MODEL.MASK_ON", True,
            "MODEL.PIXEL_STD", [57.375, 57.12, 58.395],
            "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
            "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.OUT_FEATURES", stages, "MODEL.RESNETS.NORM", "RefBN",
            "MODEL.FPN.IN_FEATURES", stages, "MODEL.FPN.OUT_CHANNELS", 16,
            "MODEL.FPN.NORM", "RefBN", "MODEL.RPN.IN_FEATURES", maps,
            "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]],
            "MODEL.RPN.PRE_NMS_TOPK_TEST", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 60,
            "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", maps[:4],
            "MODEL.ROI_HEADS.NUM_CLASSES", 3,
            "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
            "MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16,
            "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7, "MODEL.ROI_BOX_HEAD.NORM", "RefBN",
            "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16,
            "MODEL.ROI_MASK_HEAD.NORM", "RefBN",
        ]
    )  # fmt: skip
    return cfg


@pytest.fixture(scope="session")
def mask_rcnn(mask_rcnn_cfg):
    """Return its model, with weights that make many detections of several classes."""
    from refbn_d2.engines.torchvision.modeling import build_model

    torch.manual_seed(0)
    model = randomise(build_model(mask_rcnn_cfg))
    image = torch.randint(0, 256, (3, 128, 160), generator=torch.Generator().manual_seed(0))
    # The predictors in the order in which they depend on each other; the spread of their outputs.
    for spreads in (
        {"objectness_logits": 2.0, "anchor_deltas": 0.3},
        {"cls_score": 2.0, "bbox_pred": 1.0},
        {"predictor": 3.0},
    ):
        layers = {name.split(".")[-1]: module for name, module in model.named_modules()}
        seen = {name: [] for name in spreads}
        hooks = [
            layers[name].register_forward_hook(lambda m, x, y, s=outputs: s.append(y))
            for name, outputs in seen.items()
        ]
        with torch.no_grad():
            model([{"image": image.byte()}])
            for name, outputs in seen.items():
                layers[name].weight *= (
                    spreads[name] / torch.cat([y.flatten() for y in outputs]).std()
                )
        for hook in hooks:
            hook.remove()
    return model


@pytest.fixture
def small_picture(monkeypatch):
    """Use a quarter of the pixels, to save time."""
    from refbn_d2.export import verify

    monkeypatch.setattr(verify, "PICTURE", (128, 160))


@pytest.fixture
def no_detectron2(monkeypatch):
    """Hide Detectron2, as if it were not installed."""
    from refbn_d2.export import verify

    monkeypatch.setattr(verify, "_detectron2", lambda cfg: None)
