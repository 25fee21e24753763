"""Load a checkpoint's weights into a model, and report what fits."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refbn_d2.checkpoint.convert import norm_of
from refbn_d2.checkpoint.names import backbone_prefix, resnet_name, to_detectron2
from refbn_d2.checkpoint.prefixes import resnet_of, without_prefix
from refbn_d2.checkpoint.resnets import RUN_STATE, SCALARS, ResNetSpec, recognize_unsupported
from refbn_d2.checkpoint.tensors import check_weight
from refbn_d2.utils.errors import CheckpointError, listing

logger = logging.getLogger(__name__)


# The share of the backbone's tensors that must fit: of the model's, and of the file's.
MIN_BACKBONE_FILLED = 0.95
# State that only some kinds of norm have: it may be missing or unexpected.
_BOOKKEEPING = re.compile(rf"(.*\.)?({'|'.join((*SCALARS, 'ref_mean', 'ref_var', *RUN_STATE))})")
# Tensors of old Detectron2 checkpoints, which now follow from the config; and a classifier.
EXPENDABLE = re.compile(r"pixel_(mean|std)|.*anchor_generator\.cell_anchors\..*")
_CLASSIFIER = re.compile(r"(backbone\.)?(bottom_up\.)?(stem\.)?(linear|fc)\.\w+")


@dataclass(frozen=True)
class LoadReport:
    """The result of `load_weights`, in the model's names."""

    loaded: list[str]
    missing: list[str]  # in the model, not in the file
    unexpected: list[str]  # in the file, not in the model
    shape_mismatch: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, file's, model's


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str | os.PathLike,
    allow_partial: bool = False,
    arch: str = "",
) -> LoadReport:
    """Load a state dict into `model` by names, and report what fits.

    Names may be torchvision's, timm's or Detectron2's, with or without the backbone's place
    (`names.to_detectron2`) or another prefix (`prefixes.without_prefix`). BN, RefBN, FrozenBN and
    the peers load into each other, RefIN only into itself. If the file has no reference, RefBN's
    starts from the running statistics. Outside the backbone, tensors of another shape (a predictor
    for other classes) are skipped with a warning. If an error is raised, the model is unchanged.

    Args:
        state: "model" of `load_checkpoint`'s result.
        source: the file it is from, for messages.
        allow_partial: accept a backbone that fits only in part, or another architecture or norm.
        arch: the name of the file's model, if it stores one ("arch" in timm's checkpoints).

    Raises:
        CheckpointError: nothing fits; the file and the model have different architectures
            (`resnets.recognize_unsupported`); one has RefIN where the other has another norm; over
            5 % of the model's backbone tensors are not in the file, or over 5 % of the file's not
            in the model; or a tensor cannot be a weight (`tensors.check_weight`).
    """
    target = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    given = list(state)
    _check_architecture(source, state, target, allow_partial, arch)
    state = without_prefix(state, source, target)
    _check_architecture(source, state, target, allow_partial, arch)
    state = to_detectron2(state, target)
    _check_form(source, state, target, allow_partial)

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
            f"{source}: no tensor fits the model. Take a checkpoint of the model's architecture.\n"
            f"  The file has: {listing(given, 5)}\n  The model has: {listing(target, 5)}"
        )
    _check_backbone(source, target, state, allow_partial)

    for name in loaded:
        check_weight(source, name, state[name])
    _fill(model, {name: state[name] for name in loaded}, target, source)

    logger.info(
        "%s: loaded %d of the model's %d tensors. %d are not in the file, %d have another shape. "
        "%d of the file's tensors are not in the model.",
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
    """Load `state`; if that raises, restore every tensor of the model."""
    before = {name: tensor.clone() for name, tensor in target.items()}
    try:
        model.load_state_dict(state, strict=False)
    except Exception as error:
        with torch.no_grad():
            for name, tensor in target.items():
                tensor.copy_(before[name])
        raise CheckpointError(
            f"{source} does not load into the model, which is unchanged: {error}"
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
        f"{source} is {theirs}, but the model is {ours}: with these weights it would compute "
        "something else. Take a checkpoint of the model's architecture.\n"
        f"  The file has: {listing(state, 5)}\n  The model has: {listing(target, 5)}"
    )
    if not allow_partial:
        raise CheckpointError(message)
    logger.warning(message)


def _check_form(
    source: str | os.PathLike,
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    allow_partial: bool,
) -> None:
    """Tell RefIN from the other norms, which have tensors of the same names."""

    def own_names(names: Iterable[str]) -> dict[str, str]:
        """Return {Detectron2's name without its place: name}: timm's classifiers have others."""
        return {(resnet_name(name) or ("", name))[1]: name for name in names}

    def refin(names: Iterable[str]) -> set[str]:
        layers = {name.rpartition(".")[0] for name in names if name.endswith(".ref_mean")}
        return {layer for layer in layers if f"{layer}.running_mean" not in names}

    theirs, ours = own_names(state), own_names(target)
    differing = refin(theirs) ^ refin(ours)
    both = [name.rpartition(".")[0] for name in ours if name in theirs and name.endswith("weight")]
    wrong = [layer for layer in both if layer in differing]
    if not wrong:
        return

    def norm(names: Iterable[str]) -> str:
        return norm_of(name for name in names if name.startswith(f"{wrong[0]}."))

    layer = ours[f"{wrong[0]}.weight"].removesuffix(".weight")
    message = (
        f"{source}: {layer} is {norm(theirs)} in the file and {norm(ours)} in the model, which "
        f"computes something else ({len(wrong)} such norms). Set the config's NORM to "
        f"{norm(theirs)}"
    )
    if norm(ours) == "RefIN" and norm(theirs) != "GN":
        message += ", or convert the file with tools/convert_checkpoint.py --norm RefIN"
    if not allow_partial:
        raise CheckpointError(f"{message}.")
    logger.warning("%s.", message)


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
