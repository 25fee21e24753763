"""Build timm's classifiers, with the norm MODEL.NORM instead of BatchNorm."""

import difflib
import logging

import timm
import torch
from timm.layers import BatchNormAct2d, GroupNormAct, convert_sync_batchnorm
from torch import Tensor, nn

from refbn_d2.config import ConfigError, apply_options, refbn_options
from refbn_d2.layers import (
    RefBatchNorm2d,
    ReferenceNorm,
    RefInstanceNorm2d,
    convert_to_refbn,
)
from refbn_d2.layers.convert import replace_modules, start_from
from refbn_d2.layers.peers import PEERS

logger = logging.getLogger(__name__)

GN_GROUPS = 32  # as in Detectron2


class RefBatchNormAct2d(RefBatchNorm2d, BatchNormAct2d):
    """act(drop(RefBatchNorm2d(x))): timm's BatchNormAct2d with RefBN, and with RefBN's state.

    timm's own tools recognize it as a BatchNormAct2d, and keep its activation.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class RefInstanceNormAct2d(RefInstanceNorm2d):
    """act(drop(RefInstanceNorm2d(x))): timm's BatchNormAct2d with RefIN."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def build_model(cfg, num_classes: int) -> nn.Module:
    """Return timm's MODEL.NAME, with random weights, `num_classes` outputs and the norm MODEL.NORM.

    Raises:
        ConfigError: timm has no such model; it has no BatchNorm2d, or does not take the norm or a
            drop rate; or a value of MODEL.REFBN is not allowed.
    """
    name, norm = cfg.MODEL.NAME, cfg.MODEL.NORM
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ConfigError(
            f"MODEL.NAME = {name!r}: timm {timm.__version__} has no such model; {hint}"
            "timm.list_models() lists all"
        )
    rates = {"drop_rate": cfg.MODEL.DROP_RATE, "drop_path_rate": cfg.MODEL.DROP_PATH_RATE}
    try:
        model = timm.create_model(
            name, num_classes=num_classes, **{key: rate or None for key, rate in rates.items()}
        )
    except TypeError as error:  # the model does not take a drop rate
        raise ConfigError(f"MODEL.NAME = {name!r} does not take MODEL.DROP_*: {error}") from error
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        raise ConfigError(
            f"MODEL.NAME = {name!r} has no BatchNorm2d that MODEL.NORM = {norm!r} could replace; "
            "use a model with BatchNorm, such as resnet50"
        )
    if norm in ("RefBN", "RefIN"):
        options = refbn_options(cfg)
        layer = RefBatchNorm2d if norm == "RefBN" else RefInstanceNorm2d
        model = convert_timm_to_refbn(model, layer)
        apply_options(model, options)
        return model
    if norm in PEERS:
        return replace_modules(model, lambda m: _peer(m, norm))
    if norm == "GN":
        return replace_modules(model, _group_norm)
    if norm == "SyncBN":
        if cfg.MODEL.DEVICE == "cuda":
            return convert_sync_batchnorm(model)
        logger.warning("MODEL.NORM SyncBN needs CUDA in torch: using BN on the CPU.")
    return model


def convert_timm_to_refbn(
    model: nn.Module, norm: type[ReferenceNorm] = RefBatchNorm2d, **options
) -> nn.Module:
    """Convert a model of timm as `convert_to_refbn` does, its BatchNormAct2d included.

    Args and Raises: as `refbn_d2.layers.convert_to_refbn`.
    """

    with_act = RefBatchNormAct2d if norm is RefBatchNorm2d else RefInstanceNormAct2d

    def convert(old: nn.Module) -> nn.Module | None:
        if not isinstance(old, BatchNormAct2d) or isinstance(old, ReferenceNorm):
            return None
        new = with_act(
            old.num_features, old.eps, affine=old.affine,
            device=old.running_mean.device, dtype=old.running_mean.dtype, **options,
        )  # fmt: skip
        if isinstance(new, RefBatchNorm2d):
            new.momentum = old.momentum
        new.weight, new.bias = old.weight, old.bias
        new.drop, new.act = old.drop, old.act
        start_from(old, new)
        return new.train(old.training)

    return convert_to_refbn(replace_modules(model, convert), norm, **options)


def _peer(norm: nn.Module, name: str) -> nn.Module | None:
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    if isinstance(norm, BatchNormAct2d):
        raise ConfigError(
            f"MODEL.NORM = {name!r} does not work in models whose norms include the activation "
            "(BatchNormAct2d); use RefBN, BN or GN, or a plain ResNet"
        )
    new = PEERS[name](norm.num_features, norm.eps, affine=norm.affine)
    new.weight, new.bias = norm.weight, norm.bias  # as initialized: zero at a block's end
    return new


def _group_norm(norm: nn.Module) -> nn.Module | None:
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    channels = norm.num_features
    if channels % GN_GROUPS:
        raise ConfigError(
            f"MODEL.NORM = 'GN': a layer of {channels} channels cannot be split into {GN_GROUPS} "
            "groups; use another norm or another model"
        )
    if isinstance(norm, BatchNormAct2d):
        new = GroupNormAct(channels, GN_GROUPS, apply_act=False)
        new.drop, new.act = norm.drop, norm.act
    else:
        new = nn.GroupNorm(GN_GROUPS, channels)
    new.weight, new.bias = norm.weight, norm.bias  # as initialized: zero at a block's end
    return new


def classifier_weight(model: nn.Module) -> tuple[str, Tensor]:
    """Return name and value, (num_classes, features), of the last linear layer's weight."""
    layer = model.get_classifier()
    name = next(name for name, module in model.named_modules() if module is layer)
    return f"{name}.weight", layer.weight


def check_num_classes(model: nn.Module, state: dict[str, torch.Tensor], source: object) -> None:
    """Return if the checkpoint has no classifier, or one with the model's number of classes.

    Args:
        source: the checkpoint's file, for the message.

    Raises:
        ConfigError: it has another number of classes.
    """
    name, weight = classifier_weight(model)
    if name in state and len(state[name]) != len(weight):
        raise ConfigError(
            f"{source} was trained on {len(state[name])} classes, but the data in DATASETS.ROOT "
            f"has {len(weight)}: use data with the same classes"
        )
