"""Verify that a converted checkpoint computes the same as its source, on one picture.

Shapes:

    images      (1, 3, H, W)
    maps        a backbone's "stem", "res2", ... (1, C, h, w), with FPN "p2", ...
"""

from itertools import chain
from types import ModuleType

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from refbn_d2.checkpoint.convert import TORCHVISION_INPUT, Contents
from refbn_d2.checkpoint.loading import EXPENDABLE
from refbn_d2.checkpoint.resnets import BLOCKS
from refbn_d2.config import CfgNode, apply_options, get_cfg, refbn_options
from refbn_d2.config.cfg_node import leaves
from refbn_d2.data.shapes.drawing import draw_detection
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.engines.torchvision.modeling.backbone import build_backbone
from refbn_d2.engines.torchvision.modeling.norms import norm_factory
from refbn_d2.engines.torchvision.supported import check_supported
from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d, convert_to_refbn
from refbn_d2.utils.errors import CheckpointError

TOLERANCE = 1e-4
PICTURE = (256, 320)  # H, W

Outputs = dict[str, Tensor]  # {name: a model's output}


def verify(before: Contents, after: Contents, cfg: CfgNode | None = None) -> str:
    """Return a table of each stage's largest difference, divided by max(1, its largest value).

    Contents in torchvision's layout run as torchvision's ResNet. Contents in Detectron2's layout
    run as Detectron2's model if that imports, else as this package's. If both are detectors, the
    backbone's maps and the detections are compared; else the ResNet's stages are.

    Args:
        before, after: the contents of the source and of the result.
        cfg: see `model_config`; two detectors need it.

    Raises:
        CheckpointError: a difference is above TOLERANCE (the message has the table), or the tensors
            do not fit a model.
    """
    run = _detector if before.is_detector and after.is_detector else _resnet
    (expected_of, expected), (found_of, found) = run(before, cfg), run(after, cfg)
    table = compare(found, expected, f"{expected_of} against {found_of}", before.source)
    return f"{table}\n  {len(expected['boxes'])} detections" if run is _detector else table


def compare(found: Outputs, expected: Outputs, title: str, source: str) -> str:
    """Return `verify`'s table of two models' outputs.

    Raises:
        CheckpointError: a difference is above TOLERANCE or NaN.
    """
    differences = {name: _difference(found[name], value) for name, value in expected.items()}
    table = "\n".join([title, *(f"  {name:8}{d:.1e}" for name, d in differences.items())])
    if not all(d <= TOLERANCE for d in differences.values()):  # NaN counts as different
        raise CheckpointError(
            f"{source}: the result computes something else: a difference is above {TOLERANCE:g}. "
            f"Nothing was written.\n{table}"
        )
    return table


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if expected.dtype == torch.bool:  # masks: the share of pixels that differ
        return (found != expected).float().mean().item()
    found, expected = found.float(), expected.float()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def model_config(contents: Contents, cfg: CfgNode | None = None) -> CfgNode:
    """Return a config of the model that has these tensors, with BN for RefBN and RefIN.

    Args:
        cfg: the base, for what cannot be inferred from tensors: anchors, strides, pooling and
            thresholds. A ResNet does not need it: then its stride is in the 3x3 convolution, as in
            torchvision.
    """
    if cfg is None:
        cfg = get_cfg()
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg = cfg.clone()
    ours = ("RefBN", "RefIN")
    norms = {key: "BN" if norm in ours else norm for key, norm in contents.norms.items()}
    cfg.merge_from_list([*chain(*(contents.resnet.config() | norms).items())])
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", 0
    return cfg


def resnet_config(contents: Contents, cfg: CfgNode | None = None) -> CfgNode:
    """Return `model_config` of only the ResNet, whose maps are the stem and all stages."""
    cfg = model_config(contents, cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    stages = [f"res{stage}" for stage in range(2, contents.resnet.last_stage + 1)]
    cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", *stages]
    cfg.MODEL.RESNETS.RES5_DILATION = 1
    return cfg


def load(model: nn.Module, contents: Contents, state: dict[str, Tensor], cfg: CfgNode) -> nn.Module:
    """Return `model` in eval mode with `state`, and a RefBN or RefIN for a BN that has its tensors.

    RefIN's n_0, which no checkpoint holds, is that of `cfg`.

    Raises:
        CheckpointError: a name or a shape differs.
    """
    for name, layer in list(model.named_modules()):
        if f"{name}.ref_mean" in state:
            norm = RefBatchNorm2d if f"{name}.running_mean" in state else RefInstanceNorm2d
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, convert_to_refbn(layer, norm))
    apply_options(model, refbn_options(cfg))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        why = str(error)[:1000]  # it may name every tensor
        raise CheckpointError(f"{contents.source} does not fit its model: {why}") from None
    return model.eval()


def resnet_state(contents: Contents) -> dict[str, Tensor]:
    """Return the ResNet's tensors but for a classifier, under names without a place."""
    return {
        name if contents.layout == "torchvision" else own: contents.tensors[name]
        for name, own in contents.resnet_names.items()
        if not own.startswith("linear.")
    }


@torch.no_grad()
def _resnet(contents: Contents, cfg: CfgNode | None) -> tuple[str, Outputs]:
    """Return a name for the model, and its maps of the picture."""
    resnet, norm = contents.resnet, contents.norms["MODEL.RESNETS.NORM"]
    what = f"{resnet} with {norm or 'no norm'}"
    cfg, state = resnet_config(contents, cfg), resnet_state(contents)
    image = (_picture() - _channels("MEAN")) / _channels("STD")
    if contents.layout == "detectron2":
        if detectron2 := _detectron2(cfg):
            shape = detectron2.layers.ShapeSpec(channels=3)
            model = detectron2.modeling.build_backbone(_detectron2_config(cfg), shape)
        else:
            model = build_backbone(cfg)
        return f"{_whose(detectron2)} {what}", load(model, contents, state, cfg)(image[None])

    norm = norm_factory(cfg.MODEL.RESNETS.NORM, cfg.MODEL.DEVICE)
    model = ResNet(
        Bottleneck if resnet.depth >= 50 else BasicBlock,
        BLOCKS[resnet.depth],
        groups=resnet.groups,
        width_per_group=resnet.width,
        norm_layer=lambda channels: norm(channels) or nn.Identity(),
    )
    model.fc = nn.Identity()
    load(model, contents, state, cfg)
    x = model.maxpool(model.relu(model.bn1(model.conv1(image[None]))))
    maps = {"stem": x}
    for stage in range(1, 5):
        x = maps[f"res{stage + 1}"] = model.get_submodule(f"layer{stage}")(x)
    return f"torchvision's {what}", maps


@torch.no_grad()
def _detector(contents: Contents, cfg: CfgNode) -> tuple[str, Outputs]:
    """Return a name for the model, and its backbone's maps and detections of the picture."""
    cfg = model_config(contents, cfg)
    state = {name: t for name, t in contents.tensors.items() if not EXPENDABLE.fullmatch(name)}
    if detectron2 := _detectron2(cfg):
        model = detectron2.modeling.build_model(_detectron2_config(cfg))
    else:
        check_supported(cfg)
        model = build_model(cfg)
    load(model, contents, state, cfg)
    outputs: Outputs = {}
    model.backbone.register_forward_hook(lambda module, images, maps: outputs.update(maps))
    found = model([{"image": _picture().byte(), "height": PICTURE[0], "width": PICTURE[1]}])[0]
    if detectron2:
        found = found["instances"].get_fields()
        found["pred_boxes"] = found["pred_boxes"].tensor
    outputs |= {name.removeprefix("pred_"): value for name, value in found.items()}
    return f"{_whose(detectron2)} {cfg.MODEL.META_ARCHITECTURE}", outputs


def _picture() -> Tensor:
    """Return a picture of the shapes: (3, H, W) float32, RGB, whole numbers from 0 to 255."""
    image = draw_detection(0, "val", 0, PICTURE).image[..., ::-1].copy()
    return torch.from_numpy(image).permute(2, 0, 1).float()


def _channels(key: str) -> Tensor:
    return torch.tensor(TORCHVISION_INPUT[f"MODEL.PIXEL_{key}"]).view(-1, 1, 1)


def _whose(detectron2: ModuleType | None) -> str:
    return "Detectron2's" if detectron2 else "this package's"


def _detectron2(cfg: CfgNode) -> ModuleType | None:
    """Return the module `detectron2`; None if it does not import or cannot run `cfg`."""
    if cfg.MODEL.BACKBONE.NAME.endswith("fpn_backbone") and "res5" not in cfg.MODEL.FPN.IN_FEATURES:
        return None  # Detectron2's FPN always makes its last map from p5
    try:
        import detectron2.layers
        import detectron2.modeling
    except ImportError:
        return None
    return detectron2


def _detectron2_config(cfg: CfgNode):
    from detectron2.config import get_cfg

    theirs = get_cfg()
    for key, value in leaves(cfg):
        if key.startswith(("MODEL.", "INPUT.", "TEST.")) and not key.startswith("MODEL.REFBN."):
            theirs.merge_from_list([key, value])
    return theirs
