import pytest
import torch
import torchvision

from refbn_d2.checkpoint.names import torchvision_to_detectron2
from refbn_d2.checkpoint.resnets import ResNetSpec, infer_resnet, recognize_unsupported
from tests.versions import installed

RESNETS = {
    "resnet18": ResNetSpec(18, res2=64),
    "resnet34": ResNetSpec(34, res2=64),
    "resnet50": ResNetSpec(50),
    "resnet101": ResNetSpec(101),
    "resnet152": ResNetSpec(152),
    "resnext50_32x4d": ResNetSpec(50, 32, 4),
    "resnext101_32x8d": ResNetSpec(101, 32, 8),
    "resnext101_64x4d": ResNetSpec(101, 64, 4),
    "wide_resnet50_2": ResNetSpec(50, 1, 128),
}
NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def torchvisions(name):
    """Return the shapes of torchvision's model but for its classifier, under Detectron2's names."""
    with torch.device("meta"):
        shapes = shapes_of(torchvision.models.get_model(name))
    return {torchvision_to_detectron2(n): s for n, s in shapes.items() if not n.startswith("fc")}


@pytest.mark.parametrize("name", RESNETS)
def test_shapes_are_torchvisions(name):
    assert RESNETS[name].shapes(NORM) == torchvisions(name)
    assert RESNETS[name].is_torchvisions


@pytest.mark.parametrize("name", RESNETS)
def test_it_is_inferred_from_the_shapes(name):
    assert infer_resnet(torchvisions(name)) == RESNETS[name]


@pytest.mark.parametrize("last_stage", [3, 4])
def test_one_without_its_last_stages_is_inferred(last_stage):
    for name in ("resnet18", "resnet34", "resnet50"):
        shapes = {
            n: s for n, s in torchvisions(name).items() if n < f"res{last_stage + 1}" or "stem" in n
        }
        which = infer_resnet(shapes)
        assert str(which) == str(RESNETS[name]) and which.last_stage == last_stage
        assert which.shapes(NORM) == shapes


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4), (0, 0, 0, 0)])
def test_a_tensor_of_another_shape_is_outvoted(name, shape):
    own = torchvisions(name)
    for tensor in own:
        assert infer_resnet({**own, tensor: shape}) == RESNETS[name], tensor


@pytest.mark.parametrize(
    "which, name",
    [
        (ResNetSpec(18, res2=64), "ResNet-18"),
        (ResNetSpec(101, 32, 8), "ResNeXt-101 32x8d"),
        (ResNetSpec(50, width=128), "ResNet-50 of width 128"),
        (ResNetSpec(50, stem=16, res2=32), "ResNet-50 (stem 16, res2 32 channels)"),
    ],
)
def test_it_has_a_name(which, name):
    assert str(which) == name
    assert which.is_torchvisions == ("stem" not in name)


@pytest.mark.parametrize(
    "layers, text",
    [
        ([], "no block"),
        (
            [f"res{n}.{b}.conv{i}" for n in (2, 3, 4, 5) for b in (0, 1) for i in (1, 2, 3)],
            "2 2 2 2",
        ),
        (
            [f"res{n}.0.conv{i}" for n in (2, 3, 5) for i in (1, 2)],
            "1 1 0 1 .*ResNet-34 has 3 4 6 3 of 2",
        ),
    ],
)
def test_what_detectron2_cannot_build_is_an_error(layers, text):
    with pytest.raises(ValueError, match=text):
        infer_resnet({f"{layer}.weight": (8, 8, 3, 3) for layer in layers})


@pytest.mark.detectron2
@pytest.mark.parametrize(
    "which",
    [
        *RESNETS.values(),
        ResNetSpec(50, 4, 8, 16, 32),
        ResNetSpec(34, stem=32, res2=64),
        ResNetSpec(50, stem=256),
    ],
)
def test_its_config_builds_it_in_detectron2(which):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    cfg = get_cfg()
    for key, value in which.config().items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    with torch.device("meta"):
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert which.shapes(NORM[:4]) == shapes_of(model)
    assert infer_resnet(shapes_of(model)) == which


# ---- other architectures

OTHERS = {
    "vit_b_16": "ViT (torchvision)",
    "swin_t": "Swin Transformer",
    "convnext_tiny": "ConvNeXt (torchvision)",
    "efficientnet_b0": "EfficientNet or MobileNetV3 (torchvision)",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3_small": "EfficientNet or MobileNetV3 (torchvision)",
    "vgg11_bn": "VGG or AlexNet",
    "alexnet": "VGG or AlexNet",
    "squeezenet1_1": "SqueezeNet",
    "densenet121": "DenseNet",
    "googlenet": "Inception or GoogLeNet",
    "maskrcnn_resnet50_fpn": "a detector of torchvision's own",
    "retinanet_resnet50_fpn": "a detector of torchvision's own",
}
TIMMS_OTHERS = {
    "resnet50d": "deep stem",
    "resnetaa34d": "deep stem",
    "resnest14d": "deep stem",
    "senet154": "deep stem",
    "seresnet18": "attention in its blocks",
    "ecaresnetlight": "attention in its blocks",
    "legacy_seresnet18": "SENet of the old kind",
    "res2net50_26w_4s": "Res2Net",
    "skresnet18": "SKNet",
    "resnetv2_50": "ResNetV2 or BiT",
    "resnet50_clip": "ByobNet",
    "repvgg_a0": "ByobNet",
    "vit_tiny_patch16_224": "ViT (timm)",
    "swin_tiny_patch4_window7_224": "Swin Transformer",
    "convnext_tiny": "ConvNeXt (timm)",
    "efficientnet_b0": "EfficientNet or MobileNet (timm)",
    "mobilenetv3_small_100": "EfficientNet or MobileNet (timm)",
    "vgg11": "VGG or AlexNet",
    "regnetx_002": "RegNet",
    "hrnet_w18_small": "HRNet",
}


@pytest.mark.parametrize("name", OTHERS)
def test_torchvisions_others_are_named(name):
    weights = {"weights_backbone": None} if "rcnn" in name or "retina" in name else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **weights)
    assert OTHERS[name] in recognize_unsupported(model.state_dict())


@pytest.mark.parametrize("name", TIMMS_OTHERS)
def test_timms_others_are_named(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta" if installed("torch") >= (2, 1) else "cpu"):
        model = timm.create_model(name)
    assert TIMMS_OTHERS[name] in recognize_unsupported(model.state_dict())


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_is_no_other(name):
    with torch.device("meta"):
        names = list(torchvision.models.get_model(name).state_dict())
    assert recognize_unsupported(names) is None
    for place in ("", "backbone.", "backbone.bottom_up."):
        assert recognize_unsupported(place + torchvision_to_detectron2(n) for n in names) is None


def test_a_vitdet_of_detectron2_and_a_stem_of_deeplab_are_named():
    assert recognize_unsupported(["backbone.net.blocks.0.attn.qkv.weight"]) == "a ViT (timm)"
    deeplab = [
        "backbone.stem.conv1.weight",
        "backbone.stem.conv3.weight",
        "backbone.res2.0.conv1.weight",
    ]
    assert "deep stem" in recognize_unsupported(deeplab)
