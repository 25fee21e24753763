"""Translate the parameter names of ResNets between torchvision (and timm) and Detectron2.

Detectron2's models put a prefix before the names of their ResNet, "backbone.bottom_up." (with FPN)
or "backbone.". Here it is called the ResNet's place.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from refbn_d2.utils.errors import CheckpointError

Value = TypeVar("Value")

# (name in torchvision and timm, name in Detectron2). {n}: stage, from 1 in torchvision and from 2
# in Detectron2; {b}: block; {i}: convolution in the block; {t}: tensor of the layer ("weight").
_RULES = (
    ("conv1.{t}", "stem.conv1.{t}"),
    ("bn1.{t}", "stem.conv1.norm.{t}"),
    ("fc.{t}", "linear.{t}"),
    ("layer{n}.{b}.conv{i}.{t}", "res{n}.{b}.conv{i}.{t}"),
    ("layer{n}.{b}.bn{i}.{t}", "res{n}.{b}.conv{i}.norm.{t}"),
    ("layer{n}.{b}.downsample.0.{t}", "res{n}.{b}.shortcut.{t}"),
    ("layer{n}.{b}.downsample.1.{t}", "res{n}.{b}.shortcut.norm.{t}"),
)


def _pattern(template: str, stages: str) -> re.Pattern:
    fields = {"n": stages, "b": r"\d+", "i": r"\d", "t": r"\w+"}
    groups = {field: f"(?P<{field}>{pattern})" for field, pattern in fields.items()}
    return re.compile(template.replace(".", r"\.").format(**groups))


# (pattern of the old name, template of the new name, number added to the stage)
_TO_DETECTRON2 = [(_pattern(theirs, "[1-4]"), ours, 1) for theirs, ours in _RULES]
_TO_TORCHVISION = [(_pattern(ours, "[2-5]"), theirs, -1) for theirs, ours in _RULES]

# The places of a ResNet in Detectron2's models; C4 models have res5 in their heads.
_BACKBONES = ("backbone.bottom_up.", "backbone.")
_PLACES = ("", *_BACKBONES, "roi_heads.")


def _rename(name: str, rules: list[tuple[re.Pattern, str, int]]) -> str | None:
    for pattern, template, shift in rules:
        if match := pattern.fullmatch(name):
            fields = match.groupdict()
            if "n" in fields:
                fields["n"] = int(fields["n"]) + shift
            return template.format(**fields)
    return None


def torchvision_to_detectron2(name: str) -> str:
    """Translate `layer1.0.bn2.weight` into `res2.0.conv2.norm.weight`.

    Raises:
        CheckpointError: no ResNet of torchvision or timm has this name.
    """
    renamed = _rename(name, _TO_DETECTRON2)
    if renamed is None:
        raise CheckpointError(
            f"{name!r} is not a parameter name of a torchvision or timm ResNet with a plain stem. "
            'Allowed: conv1.*, bn1.*, fc.* or layer<N>.<block>.*, as "layer1.0.conv2.weight".'
        )
    return renamed


def detectron2_to_torchvision(name: str) -> str:
    """Translate `res2.0.conv2.norm.weight` into `layer1.0.bn2.weight`; a place is dropped.

    Raises:
        CheckpointError: no ResNet of Detectron2 has this name.
    """
    without_place = name.removeprefix("backbone.").removeprefix("bottom_up.")
    renamed = _rename(without_place, _TO_TORCHVISION)
    if renamed is None:
        raise CheckpointError(
            f"{name!r} is not a parameter name of a Detectron2 ResNet with a basic stem. Allowed: "
            'stem.conv1.*, linear.* or res<N>.<block>.*, as "res2.0.conv2.norm.weight".'
        )
    return renamed


def resnet_name(name: str) -> tuple[str, str] | None:
    """Split the name of a ResNet's tensor into (place, Detectron2's name); None for other names.

    `backbone.bottom_up.res2.0.conv1.weight` -> ("backbone.bottom_up.", "res2.0.conv1.weight");
    `layer1.0.conv1.weight` -> ("", "res2.0.conv1.weight"): torchvision's names have no place.
    """
    for place in _PLACES:
        own = name.removeprefix(place)
        if name.startswith(place) and _rename(own, _TO_TORCHVISION):
            return place, own
    renamed = _rename(name, _TO_DETECTRON2)
    return ("", renamed) if renamed else None


def resnet_prefix(name: str) -> str | None:
    """Return the prefix before a ResNet's name; None if `name` contains no such name.

    `net.encoder.layer1.0.conv1.weight` -> "net.encoder.". A place is not part of the prefix:
    `model.backbone.bottom_up.res2.0.conv1.weight` -> "model.".
    """
    parts = name.split(".")
    for start in range(len(parts)):
        if resnet_name(".".join(parts[start:])):
            return "".join(f"{part}." for part in parts[:start])
    return None


def backbone_prefix(model_keys: Iterable[str]) -> str:
    """Return the place of a model's ResNet: "backbone.bottom_up.", "backbone.", or "" for none."""
    model_keys = list(model_keys)
    return next((p for p in _BACKBONES if any(key.startswith(p) for key in model_keys)), "")


def to_detectron2(state: Mapping[str, Value], model_keys: Iterable[str]) -> dict[str, Value]:
    """Return `state` under the names of the model whose keys are `model_keys`, in the same order.

    A name that the model has stays. A ResNet's name, torchvision's or Detectron2's, becomes
    Detectron2's name at the place where the model has it. If the model does not have it, it gets
    the place of the model's backbone, so that the two can be compared. Every other name stays.

    Raises:
        CheckpointError: two names of `state` become the same name.
    """
    model_keys = set(model_keys)
    backbone = backbone_prefix(model_keys)
    renamed: dict[str, Value] = {}
    origins: dict[str, str] = {}
    for name, value in state.items():
        new = name if name in model_keys else _place(name, model_keys, backbone)
        if new in renamed:
            raise CheckpointError(
                f"{origins[new]!r} and {name!r} both become {new!r} in the model: keep one of them."
            )
        renamed[new], origins[new] = value, name
    return renamed


def _place(name: str, model_keys: set[str], backbone: str) -> str:
    own = _rename(name, _TO_DETECTRON2) or name
    if _rename(own, _TO_TORCHVISION) is None:
        return name
    return next((place + own for place in _PLACES if place + own in model_keys), backbone + own)
