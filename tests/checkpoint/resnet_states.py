"""State dicts of ResNets and of detectors, under the names of torchvision and Detectron2."""

import functools

import torch
import torchvision
from torch import nn

from refbn_d2.checkpoint.convert import convert_state, identify
from refbn_d2.checkpoint.names import torchvision_to_detectron2
from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"]
NAMES += ["resnext101_32x8d", "wide_resnet50_2"]
FROZEN = ["weight", "bias", "running_mean", "running_var"]
REFERENCE = ["ref_mean", "ref_var", "ref_count"]
TENSORS = {
    "FrozenBN": FROZEN,
    "BN": [*FROZEN, "num_batches_tracked"],
    "RefBN": [*FROZEN, "num_batches_tracked", *REFERENCE],
    "RefIN": ["weight", "bias", *REFERENCE],
}

LAYERS = {"RefBN": RefBatchNorm2d, "RefIN": RefInstanceNorm2d}


@functools.cache
def keys(name, norm):
    """Return the names and shapes of torchvision's model with that norm."""
    layer = {"FrozenBN": torchvision.ops.FrozenBatchNorm2d, "GN": lambda c: nn.GroupNorm(32, c)}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, norm_layer=layer.get(norm), num_classes=7)
    if norm in LAYERS:
        convert_to_refbn_without_data(model, LAYERS[norm])
    return {n: (tuple(t.shape), t.dtype) for n, t in model.state_dict().items()}


def convert_to_refbn_without_data(model, layer):
    for m in list(model.modules()):
        for child_name, child in list(m.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                m.register_module(child_name, layer(child.num_features, device="meta"))


def numbered(name, norm="BN"):
    """Return a state dict in which every tensor is one number, repeated without taking memory."""
    return {
        key: torch.tensor(i, dtype=dtype).expand(shape)
        for i, (key, (shape, dtype)) in enumerate(keys(name, norm).items(), start=1)
    }


def small(norm="BN"):
    """Return the state dict of a ResNet-18 with random numbers everywhere."""
    return dict(_small(norm))


@functools.cache
def _small(norm):
    generator = torch.Generator().manual_seed(0)
    return {
        key: (torch.rand(shape, generator=generator) + 0.5).to(dtype)
        for key, (shape, dtype) in keys("resnet18", norm).items()
    }


def converted(state, to, norm=None, **options):
    return convert_state(identify({"model": state}, "a.pth"), to, norm, **options)


def detectron2_names(state):
    return {torchvision_to_detectron2(name): tensor for name, tensor in state.items()}


def detector(norm="RefBN", stages=(2, 3, 4, 5), fpn=True, heads=True):
    """Return tensors under the names of a Mask R-CNN R-18, or of a C4 model (`fpn=False`)."""
    state = {}
    for name, tensor in detectron2_names(small(norm)).items():
        if name.startswith("linear") or (name[:3] == "res" and int(name[3]) not in stages):
            continue
        place = "backbone.bottom_up." if fpn else "backbone."
        state[("roi_heads." if not fpn and name.startswith("res5") else place) + name] = tensor
    generator = torch.Generator().manual_seed(1)

    def conv(name, *shape, own_norm=norm):
        state[f"{name}.weight"] = torch.rand(shape, generator=generator)
        for tensor in TENSORS.get(own_norm, FROZEN[:2] if own_norm == "GN" else []):
            value = torch.rand(shape[0], generator=generator) + 0.5
            scalar = tensor in ("num_batches_tracked", "ref_count")
            state[f"{name}.norm.{tensor}"] = torch.tensor(9) if scalar else value
        if own_norm == "":
            state[f"{name}.bias"] = torch.rand(shape[0], generator=generator)

    if fpn:
        conv("backbone.fpn_lateral2", 8, 64, 1, 1)
    conv("proposal_generator.rpn_head.conv", 8, 8, 3, 3, own_norm="")
    if heads:
        conv("roi_heads.box_head.conv1", 8, 8, 3, 3)
        conv("roi_heads.mask_head.mask_fcn1", 8, 8, 3, 3, own_norm="GN")
    return state


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, tensor in state.items():
        other = expected[name]
        same = tensor is other or (tensor.dtype == other.dtype and torch.equal(tensor, other))
        assert same, name
