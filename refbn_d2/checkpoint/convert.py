"""Identify what a checkpoint's tensors are, and convert them to another layout and norm.

The layouts are "torchvision" (its names, which timm's plain ResNets share) and "detectron2" (its
names, which this package's models share).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refbn_d2.checkpoint.names import detectron2_to_torchvision, resnet_name
from refbn_d2.checkpoint.prefixes import without_prefix
from refbn_d2.checkpoint.resnets import (
    RUN_STATE,
    SCALARS,
    VECTORS,
    ResNetSpec,
    infer_resnet,
    recognize_unsupported,
)
from refbn_d2.checkpoint.tensors import check_weight, to_tensor
from refbn_d2.layers.fold import affine
from refbn_d2.layers.reference_norm import is_initial
from refbn_d2.utils.errors import CheckpointError, listing

logger = logging.getLogger(__name__)

TARGET_NORMS = ("RefBN", "RefIN", "BN", "FrozenBN", "folded")
EPS = 1e-5  # of every norm in torchvision's, timm's and Detectron2's ResNets; no file stores it

# Keys that torchvision's weights (and most of timm's) need in addition to the architecture's.
TORCHVISION_INPUT = {
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
}

# Config keys of the norms outside the ResNet, and the beginning of their tensors' names.
_SECTIONS = {
    "MODEL.FPN.NORM": "backbone.fpn_",
    "MODEL.ROI_BOX_HEAD.NORM": "roi_heads.box_head.",
    "MODEL.ROI_MASK_HEAD.NORM": "roi_heads.mask_head.",
    "MODEL.SEM_SEG_HEAD.NORM": "sem_seg_head.",
}
FROZEN = ("weight", "bias", "running_mean", "running_var")  # what a FrozenBatchNorm2d keeps
_DETECTOR = ("backbone.", "proposal_generator.", "roi_heads.")


@dataclass(frozen=True)
class Contents:
    """A file's tensors, and what they are."""

    source: str  # the file, for messages
    tensors: dict[str, Tensor]  # by the file's names
    resnet_names: dict[str, str]  # the ResNet's tensors: the file's name -> Detectron2's, no place
    resnet: ResNetSpec
    layout: str  # "torchvision" or "detectron2"
    is_detector: bool

    @property
    def classes(self) -> int | None:
        """Return a classifier's number of classes; None for anything else."""
        for name, own in self.resnet_names.items():
            if own == "linear.weight" and self.tensors[name].ndim == 2:
                return len(self.tensors[name])
        return None

    @property
    def norms(self) -> dict[str, str]:
        """Return {"MODEL.RESNETS.NORM": "BN", ...}, for each section of a config in the file."""
        norms = {"MODEL.RESNETS.NORM": norm_of(self.resnet_names.values())}
        for key, beginning in _SECTIONS.items():
            if names := [name for name in self.tensors if name.startswith(beginning)]:
                norms[key] = norm_of(names)
        return norms

    def config(self) -> dict[str, Any]:
        """Return {key: value}: what differs from Detectron2's defaults, and the depth and norms."""
        usual = ResNetSpec(50).config()
        own = self.resnet.config().items()
        keys = {key: value for key, value in own if value != usual[key] or key.endswith("DEPTH")}
        return keys | self.norms | (TORCHVISION_INPUT if self.layout == "torchvision" else {})


def norm_of(names: Iterable[str]) -> str:
    """Return the norm of tensors with Detectron2's `names`.

    It is "RefBN", "RefIN", "BN", "FrozenBN", "GN" or "" (none). If only some layers are frozen
    (FREEZE_AT), it is the norm of the others.
    """
    tensors = {name.rpartition(".")[2] for name in names if ".norm." in name}
    if "ref_mean" in tensors and "running_mean" not in tensors:
        return "RefIN"
    signs = {
        "RefBN": "ref_mean",
        "BN": "num_batches_tracked",
        "FrozenBN": "running_mean",
        "GN": "weight",
    }
    return next((norm for norm, sign in signs.items() if sign in tensors), "")


def all_tensors(checkpoint: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Return the weights of `load_checkpoint`'s dict, with the classifier that `pack` set apart."""
    tensors, beside = dict(checkpoint["model"]), checkpoint.get("classifier")
    for name, value in beside.items() if isinstance(beside, dict) else ():
        if isinstance(name, str) and isinstance(value, np.ndarray):
            value = to_tensor(source, name, value)
        if isinstance(name, str) and isinstance(value, Tensor):
            check_weight(source, name, value)
            tensors[name] = value
    return tensors


def identify(checkpoint: Mapping[str, Any], source: str) -> Contents:
    """Identify the ResNet in `checkpoint`, its layout, and whether it is in a detector.

    Args:
        checkpoint: as `load_checkpoint` returns it.
        source: the file it is from, for messages.

    Raises:
        CheckpointError: it holds no ResNet that Detectron2 can build.
    """
    tensors, arch = all_tensors(checkpoint, source), str(checkpoint.get("arch"))
    other = recognize_unsupported(tensors, arch)
    if other is None:
        tensors = without_prefix(tensors, source)
        other = recognize_unsupported(tensors)
    if other:
        raise CheckpointError(
            f"{source} is {other}, which cannot be converted. Allowed: a ResNet or ResNeXt of "
            "depth 18, 34, 50, 101 or 152 whose stem is one 7x7 convolution, or a detector of "
            "Detectron2's with such a backbone."
        )
    is_detector = any(name.startswith(_DETECTOR) for name in tensors)
    resnet_names: dict[str, str] = {}
    for name in tensors:
        place, own = resnet_name(name) or ("", "")
        if own and (place or not is_detector):
            resnet_names[name] = own
    times = Counter(resnet_names.values())
    twice = [name for name, own in resnet_names.items() if times[own] > 1]
    if twice:
        raise CheckpointError(
            f"{source}: {listing(twice, 2)} name the same tensor: keep one of them."
        )
    try:
        shapes = {own: tuple(tensors[name].shape) for name, own in resnet_names.items()}
        resnet = infer_resnet(shapes)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} holds no ResNet that Detectron2 can build: {error}. Its first tensors are "
            f"{listing(tensors, 5)}."
        ) from None
    if not is_detector:  # a detector may leave out the last stages
        resnet = replace(resnet, last_stage=5)
    detectron2 = all(name.endswith(own) for name, own in resnet_names.items())
    layout = "detectron2" if detectron2 else "torchvision"
    return Contents(source, tensors, resnet_names, resnet, layout, is_detector)


def convert_state(
    contents: Contents, to: str, norm: str | None = None, allow_partial: bool = False
) -> dict[str, Tensor]:
    """Return the state dict in the layout `to`.

    A ResNet gets the layout's names. A detector keeps Detectron2's names; in torchvision's layout,
    only its ResNet is returned. The file's order is kept. So is, to the last bit, every tensor that
    `norm` does not change. BRN, CBN and MABN become BN, without their state of a run.

    Args:
        to: "detectron2" or "torchvision".
        norm: one of TARGET_NORMS, see `change_norms`; None keeps the file's norms.
        allow_partial: accept a ResNet with missing tensors, and leave out tensors without a
            counterpart; the log lists both.

    Raises:
        CheckpointError: an error of `change_norms`; a tensor has another shape than the ResNet's;
            or, without `allow_partial`, a tensor is missing or has no counterpart.
    """
    resnet, source = contents.resnet, contents.source
    if to == "torchvision" and not resnet.is_torchvisions:
        raise CheckpointError(f"{source} holds a {resnet}, which torchvision cannot build.")
    wrong, missing, without = misfits(contents, to)
    if wrong:
        raise CheckpointError(
            f"{source}: most tensors are those of a {resnet}, but some have another shape: "
            f"{listing(wrong, 8, '; ')}. Convert a file that holds a single model."
        )
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensors of a {resnet}: {listing(missing)}")
    if without:
        where = f"without a counterpart in {to}'s {resnet}"
        problems.append(f"has {len(without)} tensors {where}: {listing(without)}")
    if problems:
        message = f"{source} {'; it '.join(problems)}."
        if not allow_partial:
            raise CheckpointError(f"{message} To convert it anyway, give --allow-partial.")
        logger.warning(message)

    keeps_names = contents.is_detector and to == "detectron2"
    state = {
        name if keeps_names else contents.resnet_names[name]: tensor
        for name, tensor in contents.tensors.items()
        if name not in without and not _is_run_state(contents.resnet_names.get(name, name))
    }
    if norm is not None:
        state = change_norms(state, norm, source)
    if to == "torchvision":
        state = {detectron2_to_torchvision(name): tensor for name, tensor in state.items()}
    return state


def misfits(contents: Contents, to: str) -> tuple[list[str], list[str], list[str]]:
    """Find what keeps `contents` from being a complete ResNet or detector in the layout `to`.

    Returns:
        The tensors of another shape than the ResNet's, with both shapes; Detectron2's names of
        missing tensors; the file's names of tensors without a counterpart.
    """
    resnet, resnet_names = contents.resnet, contents.resnet_names
    shapes = {own: tuple(contents.tensors[name].shape) for name, own in resnet_names.items()}
    known = resnet.shapes((*VECTORS, *SCALARS))
    if contents.classes is not None:
        known["linear.weight"] = (contents.classes, 8 * resnet.res2)
        known["linear.bias"] = (contents.classes,)
    wrong = [
        f"{name} is {shapes[own]}, not {known[own]}"
        for name, own in resnet_names.items()
        if shapes[own] != known.get(own, shapes[own])
    ]
    norm = [t for t in FROZEN if any(own.endswith(f".norm.{t}") for own in shapes)]
    missing = [own for own in resnet.shapes(norm) if own not in shapes]
    without = []
    for name in contents.tensors:
        if name in resnet_names:
            own = resnet_names[name]
            has_counterpart = own in known or _is_run_state(own)  # it is left out
        else:
            has_counterpart = contents.is_detector and to == "detectron2"  # its heads stay
        if not has_counterpart:
            without.append(name)
    return wrong, missing, without


def _is_run_state(name: str) -> bool:
    """Return whether Detectron2's `name` is that of a peer's state of its run."""
    return ".norm." in name and name.endswith(RUN_STATE)


def change_norms(state: Mapping[str, Tensor], norm: str, source: str) -> dict[str, Tensor]:
    """Return `state`, which has Detectron2's names, with every batch norm turned into `norm`.

    - "FrozenBN": weight, bias and running statistics.
    - "BN": the same and the count of batches, 0 if the file has none.
    - "RefBN": the same as BN and a reference. If the file has none, the running statistics are the
      reference, with a count of 1.
    - "RefIN": weight, bias and the reference of RefBN. It computes something else than the batch
      norm: it is a start for training, not for evaluation.
    - "folded": the norm's scale is multiplied into the convolution's weight. In a ResNet, whose
      convolutions have no bias in either library, the norm stays as a FrozenBN that adds the shift.
      Elsewhere the shift becomes the convolution's bias, and the norm is removed.

    Group norms stay as they are.

    Raises:
        CheckpointError: there is no batch norm; or, for "folded", the convolution of one cannot be
            inferred from its name.
    """
    layers: dict[str, dict[str, Tensor]] = {}  # "res2.0.conv1.norm." -> {"weight": ...}
    for name, tensor in state.items():
        last = name.rpartition(".")[2]
        layers.setdefault(name.removesuffix(last), {})[last] = tensor
    batch_norms = {name: layer for name, layer in layers.items() if "running_mean" in layer}
    if not batch_norms:
        raise CheckpointError(
            f"{source} has no batch norms (its norm: {norm_of(state) or 'none'}), so it cannot be "
            f"converted to {norm}. Leave out --norm."
        )
    for name, layer in batch_norms.items():
        _check_batch_norm(source, name, layer, layers.get(_convolution(name), {}))
    if norm == "folded":
        unknown = [n for n in batch_norms if "weight" not in layers.get(_convolution(n), {})]
        if unknown:
            raise CheckpointError(
                f"{source}: the convolutions of {listing(unknown, 5)} cannot be inferred from the "
                "names, so the norms cannot be folded. Use FrozenBN, which computes the same."
            )
    for name, layer in batch_norms.items():
        if norm == "folded":
            layers[name] = _fold(
                layers[_convolution(name)], layer, bool(resnet_name(name + "weight"))
            )
        else:
            layers[name] = _as(layer, norm)
    return {name + last: tensor for name, layer in layers.items() for last, tensor in layer.items()}


def _check_batch_norm(
    source: str, name: str, layer: dict[str, Tensor], convolution: dict[str, Tensor]
) -> None:
    shape = layer["running_mean"].shape
    wrong = [n for n in (*FROZEN, "ref_mean", "ref_var") if n in layer and layer[n].shape != shape]
    wrong += [n for n in ("running_var",) if n not in layer]
    weight = convolution.get("weight")
    if weight is not None and (weight.ndim != 4 or weight.shape[:1] != shape):
        wrong.append("the convolution before it")
    if len(shape) != 1 or wrong:
        raise CheckpointError(
            f"{source}: {name.rstrip('.')} is not a batch norm of {tuple(shape)} channels: "
            f"{listing(wrong) or 'running_mean'} is missing or of another shape."
        )


def _convolution(norm: str) -> str:
    return norm.removesuffix("norm.") if norm.endswith(".norm.") else ""


def _as(layer: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
    new = {name: layer[name] for name in FROZEN if name in layer}
    if norm == "FrozenBN":
        return new
    new["num_batches_tracked"] = layer.get("num_batches_tracked", torch.tensor(0))
    if norm == "BN":
        return new
    mean, var = layer["running_mean"], layer["running_var"]
    count = torch.tensor(int(not is_initial(mean, var)))
    reference = {"ref_mean": mean.clone(), "ref_var": var.clone(), "ref_count": count}
    reference = {name: layer.get(name, default) for name, default in reference.items()}
    if norm == "RefIN":
        return {name: new[name] for name in ("weight", "bias") if name in new} | reference
    return new | reference


def _fold(conv: dict[str, Tensor], norm: dict[str, Tensor], in_resnet: bool) -> dict[str, Tensor]:
    """Fold the norm into `conv`, in place; return what is left of the norm."""
    mean, var = norm["running_mean"], norm["running_var"]
    scale, shift = affine(mean, var, norm.get("weight"), norm.get("bias"), EPS)
    weight = conv["weight"]
    conv["weight"] = (weight * scale.view(-1, 1, 1, 1)).to(weight)
    if "bias" in conv:
        shift = shift + conv.pop("bias") * scale
    shift = shift.to(weight)
    if not in_resnet:
        conv["bias"] = shift
        return {}
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    return {"weight": one, "bias": shift, "running_mean": zero, "running_var": one - EPS}


def pack(state: Mapping[str, Tensor], to: str, suffix: str) -> dict[str, Any]:
    """Return the dict that `save_checkpoint` writes to a file with `suffix`.

    For torchvision and for .safetensors it is `state` itself, `convert_state`'s result. For
    Detectron2, a backbone asks for suffix matching ("matching_heuristics"), because a detector has
    a prefix before these names. Detectors do not use the classifier, so it is stored apart from the
    weights: Detectron2's loader does not warn about it there, and `identify` still finds it.
    """
    if to == "torchvision" or suffix == ".safetensors":
        return dict(state)
    classifier = {name: tensor for name, tensor in state.items() if name.startswith("linear.")}
    packed: dict[str, Any] = {
        "model": {name: tensor for name, tensor in state.items() if name not in classifier},
        "__author__": "refbn_d2",
    }
    if not any(name.startswith(_DETECTOR) for name in state):
        packed["matching_heuristics"] = True
    return packed | ({"classifier": classifier} if classifier else {})
