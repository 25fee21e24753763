"""Load a checkpoint's weights into a model, and say what fits."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refbn_d2.checkpoint.names import backbone_prefix, to_detectron2
from refbn_d2.checkpoint.prefixes import resnet_of, without_prefix
from refbn_d2.checkpoint.resnets import ResNetSpec, recognize_unsupported
from refbn_d2.checkpoint.tensors import check_weight
from refbn_d2.utils.errors import CheckpointError, listing

logger = logging.getLogger(__name__)


# The share of the backbone's tensors that have to fit, for both the model's and the file's.
MIN_BACKBONE_FILLED = 0.95
# State beside the weights that one kind of norm has and another lacks: neither is an error.
_BOOKKEEPING = re.compile(r"(.*\.)?(num_batches_tracked|ref_mean|ref_var|ref_count)")
# In old Detectron2 checkpoints, since then made from the config; a classifier behind a backbone.
EXPENDABLE = re.compile(r"pixel_(mean|std)|.*anchor_generator\.cell_anchors\..*")
_CLASSIFIER = re.compile(r"(backbone\.)?(bottom_up\.)?(stem\.)?(linear|fc)\.\w+")


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, in the model's names."""

    loaded: list[str]
    missing: list[str]  # the model's, not in the file
    unexpected: list[str]  # the file's, not in the model
    shape_mismatch: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, file's, model's


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str | os.PathLike,
    allow_partial: bool = False,
    arch: str = "",
) -> LoadReport:
    """Load a state dict into `model` by names, and say what fitted.

    Names may be torchvision's, timm's or Detectron2's, with or without the backbone's place
    (`names.to_detectron2`), or another prefix (`prefixes.without_prefix`). BN, RefBN and FrozenBN
    load into each other: a RefBN layer's reference starts from running statistics where the file
    has none. Outside the backbone, tensors of another shape (a predictor of other classes) are
    skipped with a warning. If an error is raised, the model is as it was.

    Args:
        state: as "model" of `load_checkpoint`.
        source: the file it is from, for messages.
        allow_partial: let pass a backbone that fits in part, or is of another architecture.
        arch: the name of the file's model, where it has one ("arch" of timm's checkpoints).

    Raises:
        CheckpointError: nothing fits; the file is of an architecture that the model is not
            (`resnets.recognize_unsupported`); more than 5 % of the backbone's tensors are without
            counterpart, the model's in the file or the file's in the model; or a tensor is no
            weight (`tensors.check_weight`).
    """
    target = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    given = list(state)
    _check_architecture(source, state, target, allow_partial, arch)
    state = without_prefix(state, source, target)
    _check_architecture(source, state, target, allow_partial, arch)
    state = to_detectron2(state, target)

    loaded = [name for name in target if name in state and state[name].shape == target[name].shape]
    mismatch = [
        (name, tuple(state[name].shape), tuple(target[name].shape))
        for name in target
        if name in state and state[name].shape != target[name].shape
    ]
    missing = [name for name in target if name not in state and not _BOOKKEEPING.fullmatch(name)]
    unexpected = [
        name
        for name in state
        if name not in target
        and not _BOOKKEEPING.fullmatch(name)
        and not EXPENDABLE.fullmatch(name)
    ]
    weights = [name for name in loaded if not _BOOKKEEPING.fullmatch(name)]
    if not weights:
        raise CheckpointError(
            f"{source}: no tensor fits the model.\n  The file has: {listing(given, 5)}\n"
            f"  The model has: {listing(target, 5)}"
        )
    _check_backbone(source, target, state, allow_partial)

    for name in loaded:
        check_weight(source, name, state[name])
    _fill(model, {name: state[name] for name in loaded}, target, source)

    logger.info(
        "%s: %d of the model's %d tensors loaded; %d not in the file, %d of another shape, "
        "%d of the file's not in the model.",
        source,
        len(weights),
        len(weights) + len(missing) + len(mismatch),
        len(missing),
        len(mismatch),
        len(unexpected),
    )
    for name, theirs, ours in mismatch:
        logger.warning(
            "Skip loading '%s' due to incompatible shapes: %s in the checkpoint but %s in the "
            "model! You might want to double check if this is expected.",
            name,
            theirs,
            ours,
        )
    if missing:
        logger.warning("Not in the file, left as initialized: %s", listing(missing))
    if unexpected:
        logger.warning("In the file, but not used by the model: %s", listing(unexpected))
    return LoadReport(loaded, missing, unexpected, mismatch)


def _fill(
    model: nn.Module, state: dict[str, Tensor], target: dict[str, Tensor], source: str | os.PathLike
) -> None:
    """Load `state`; where that raises, every tensor of the model is as it was."""
    before = {name: tensor.clone() for name, tensor in target.items()}
    try:
        model.load_state_dict(state, strict=False)
    except Exception as error:
        with torch.no_grad():
            for name, tensor in target.items():
                tensor.copy_(before[name])
        raise CheckpointError(
            f"{source} does not load into the model, which stays as it was: {error}"
        ) from error


def _check_architecture(
    source: str | os.PathLike,
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    allow_partial: bool,
    arch: str,
) -> None:
    theirs, ours = recognize_unsupported(state, arch), recognize_unsupported(target)
    if theirs is None or theirs == ours:
        return
    if ours is None:
        resnet = resnet_of(target)
        ours = f"a {resnet}" if resnet else "something else"
    message = (
        f"{source} is {theirs}, and the model is {ours}: it would compute something else with "
        "these weights. Take a checkpoint of the model's own "
        f"architecture.\n  The file has: {listing(state, 5)}\n  The model has: {listing(target, 5)}"
    )
    if not allow_partial:
        raise CheckpointError(message)
    logger.warning(message)


def _check_backbone(
    source: str | os.PathLike,
    target: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    allow_partial: bool,
) -> None:
    prefix = backbone_prefix(target)

    def backbone(names: Iterable[str]) -> list[str]:
        return [
            name
            for name in names
            if name.startswith(prefix)
            and not _BOOKKEEPING.fullmatch(name)
            and not _CLASSIFIER.fullmatch(name)
        ]

    ours, theirs = backbone(target), backbone(state)
    unfilled = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(target[name].shape)} in the model"
        if name in state
        else f"{name} not in the file"
        for name in ours
        if name not in state or state[name].shape != target[name].shape
    ]
    unused = [f"{name} not in the model" for name in theirs if name not in target]
    for what, misfits, total in (("model", unfilled, ours), ("file", unused, theirs)):
        if len(misfits) > (1 - MIN_BACKBONE_FILLED) * len(total):
            message = (
                f"{source}: {len(misfits)} of the {len(total)} backbone tensors of the {what} do "
                f"not fit. {_why(resnet_of(state), resnet_of(target))}\n  "
                + listing(misfits, separator="\n  ")
            )
            if not allow_partial:
                raise CheckpointError(message)
            logger.warning(message)


def _why(theirs: ResNetSpec | None, ours: ResNetSpec | None) -> str:
    if theirs and ours and str(theirs) != str(ours):
        return f"The file holds a {theirs}, the model a {ours} (MODEL.RESNETS)."
    return "The ResNet's depth, width or norm (MODEL.RESNETS) probably differs."
