"""Write the Detectron2 backbone of a trained classifier, and the config keys that it needs."""

from pathlib import Path

import torch
import yaml
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from refbn_d2.checkpoint import save_checkpoint, torchvision_to_detectron2
from refbn_d2.pretrain.models import classifier_weight
from refbn_d2.utils.file_io import write_text

_DEPTHS = {
    (BasicBlock, (2, 2, 2, 2)): 18,
    (BasicBlock, (3, 4, 6, 3)): 34,
    (Bottleneck, (3, 4, 6, 3)): 50,
    (Bottleneck, (3, 4, 23, 3)): 101,
    (Bottleneck, (3, 8, 36, 3)): 152,
}
_HEADER = """\
# Backbone of {name}, pretrained with {norm}. For a detector's config:
#   _BASE_: [base.yaml, {file}]
"""


def resnet_keys(model: nn.Module) -> dict[str, int] | None:
    """Return the MODEL.RESNETS keys with which Detectron2 builds the backbone of timm's `model`.

    Return None if Detectron2 cannot build it: it is not a ResNet or ResNeXt of a known depth, or a
    module other than a norm differs (deep stem, squeeze and excitation, anti-aliasing).
    """
    if type(model) is not ResNet:
        return None
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    block = model.layer1[0]
    layers = tuple(len(stage) for stage in stages)
    if (type(block), layers) not in _DEPTHS:
        return None
    groups, width = block.conv2.groups, block.conv2.out_channels
    with torch.device("meta"):
        plain = ResNet(
            type(block), layers, model.num_classes, cardinality=groups, base_width=width // groups
        )
    if _modules(model) != _modules(plain):
        return None
    return {
        "DEPTH": _DEPTHS[type(block), layers],
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": width // groups,
        "RES2_OUT_CHANNELS": 64 * block.expansion,
    }


def _modules(model: nn.Module) -> dict[str, str]:
    """Return the model's modules, regardless of its norms and drop rates."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return {
        name: "norm" if isinstance(module, norms) else repr(module)
        for name, module in model.named_modules()
        if not list(module.children()) and not name.endswith("drop_path")
    }


def write_backbone(
    cfg, model: nn.Module, state: dict[str, Tensor], output_dir: Path
) -> dict | None:
    """Write backbone.pkl, for Detectron2's MODEL.WEIGHTS, and backbone.yaml, which names it.

    The .pkl holds everything but the classifier under Detectron2's names without a prefix
    (`res2.0.conv1.weight`). It asks for Detectron2's matching heuristics, like the files of
    Detectron2's converter of torchvision's models.

    Args:
        cfg: the config of the pretraining.
        model: a model of timm.
        state: the weights to write, a state dict of `model`.

    Returns:
        The Detectron2 config keys in backbone.yaml; None, and nothing is written, if Detectron2
        cannot build the backbone.
    """
    resnets = resnet_keys(model)
    if resnets is None:
        return None
    weights, keys = output_dir / "backbone.pkl", output_dir / "backbone.yaml"
    classifier = classifier_weight(model)[0].removesuffix("weight")
    renamed = {
        torchvision_to_detectron2(name): tensor
        for name, tensor in state.items()
        if not name.startswith(classifier)
    }
    save_checkpoint({"model": renamed, "matching_heuristics": True}, weights)
    norm = cfg.MODEL.NORM
    config = {
        "VERSION": 2,
        "MODEL": {
            "WEIGHTS": str(weights.resolve()),
            "PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
            "PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
            "RESNETS": {**resnets, "NORM": norm, "STRIDE_IN_1X1": False},
            # In frozen stages they could not adapt to the detector's data.
            **({"BACKBONE": {"FREEZE_AT": 0}} if norm in ("RefBN", "RefIN") else {}),
            **({"REFBN": {"PRIOR_COUNT": cfg.MODEL.REFBN.PRIOR_COUNT}} if norm == "RefIN" else {}),
        },
        "INPUT": {"FORMAT": "RGB"},
    }
    header = _HEADER.format(name=cfg.MODEL.NAME, norm=norm, file=keys.resolve())
    write_text(keys, header + yaml.safe_dump(config, sort_keys=False))
    return config
