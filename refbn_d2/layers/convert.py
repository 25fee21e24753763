"""Convert the norms of any model: BatchNorm to RefBN, and RefBN back.

At inference RefBN is one affine map per channel, as BatchNorm is. So the models that
`convert_from_refbn` and `fold` return do not need this package.
"""

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from refbn_d2.layers.ref_batch_norm import RefBatchNorm2d
from refbn_d2.layers.reference_norm import Moments, ReferenceNorm, is_initial, refbn_layers

logger = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def convert_to_refbn(
    model: nn.Module, norm: type[ReferenceNorm] = RefBatchNorm2d, **options
) -> nn.Module:
    """Replace every BatchNorm2d, SyncBatchNorm and FrozenBatchNorm2d in `model` by a `norm`.

    The model is changed in place. Use the return value: a model that is itself a norm is replaced.

    Parameters and running statistics stay the same objects, so an optimizer that holds them stays
    valid. A frozen norm's weight and bias buffers become parameters. The reference starts from the
    running statistics, unless the norm has never seen a batch.

    Some norms are not converted, and a warning names them: those without running statistics,
    those with a weight but no bias, and subclasses with their own forward (timm's BatchNormAct2d).

    Args:
        norm: RefBatchNorm2d or RefInstanceNorm2d. The latter has no running statistics.
        options: of `norm`: `reference_weight`, `weighting` and `gradient`, or `prior_count`.

    Raises:
        ValueError: an option has a value that `norm` does not accept.
    """

    def convert(old: Any) -> nn.Module | None:
        if isinstance(old, ReferenceNorm) or not is_norm(old):
            return None
        mean = old.running_mean
        frozen = _is_frozen(old)
        new: Any = norm(
            len(mean), old.eps, affine=old.weight is not None, device=mean.device,
            dtype=mean.dtype, **options,
        )  # fmt: skip
        if isinstance(new, RefBatchNorm2d) and not frozen:
            new.momentum = old.momentum
        new.weight = nn.Parameter(old.weight) if frozen else old.weight
        new.bias = nn.Parameter(old.bias) if frozen else old.bias
        start_from(old, new)
        return new.train(old.training)

    left = [
        name
        for name, m in model.named_modules()
        if isinstance(m, BATCH_NORMS) and not isinstance(m, RefBatchNorm2d) and not is_norm(m)
    ]
    if left:
        logger.warning("Not converted to %s: %s", norm.__name__, ", ".join(left))
    return replace_modules(model, convert)


def convert_from_refbn(
    model: nn.Module, norm: Callable[..., nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    """Replace every RefBatchNorm2d in `model` by a `norm`; outputs in eval mode stay the same.

    The model is changed in place. Use the return value: a model that is itself a norm is replaced.

    BatchNorm2d and SyncBatchNorm take over the parameters and running statistics as the same
    objects; FrozenBatchNorm2d gets copies. Two kinds are not converted, and a warning names them:
    subclasses of RefBatchNorm2d with their own forward, and RefInstanceNorm2d, which depends on the
    image and so is no BatchNorm.

    Args:
        norm: nn.BatchNorm2d, nn.SyncBatchNorm, or torchvision's or Detectron2's FrozenBatchNorm2d.

    Raises:
        ValueError: `norm` is none of these.
    """

    def convert(refbn: nn.Module) -> nn.Module | None:
        new: Any
        if not isinstance(refbn, RefBatchNorm2d) or not is_norm(refbn):
            return None
        new = norm(refbn.num_features, eps=refbn.eps)
        if _is_frozen(new):
            new.to(refbn.running_mean)
            for name in ("weight", "bias", "running_mean", "running_var"):
                if (value := getattr(refbn, name)) is not None:
                    getattr(new, name).copy_(value.detach())
        elif isinstance(new, BATCH_NORMS):
            new.momentum, new.affine = refbn.momentum, refbn.affine
            new.weight, new.bias = refbn.weight, refbn.bias
            _share_statistics(refbn, new)
        else:
            raise ValueError(
                "norm must be BatchNorm2d, SyncBatchNorm or a FrozenBatchNorm2d, not "
                f"{type(new).__name__}."
            )
        return new.train(refbn.training)

    left = [name for name, m in refbn_layers(model) if not is_norm(m)]
    if left:
        logger.warning("Not converted from RefBN or RefIN: %s", ", ".join(left))
    return replace_modules(model, convert)


def _is_frozen(module: nn.Module) -> bool:
    """Return whether this is a FrozenBatchNorm2d: torchvision's, Detectron2's or another."""
    buffers = {"weight", "bias", "running_mean", "running_var"}
    return type(module).__name__ == "FrozenBatchNorm2d" and buffers <= dict(module._buffers).keys()


def is_norm(module: nn.Module) -> bool:
    """Return whether this is a plain RefBN, BN, SyncBN or FrozenBN with running statistics.

    Subclasses with their own forward are not plain, except Detectron2's NaiveSyncBatchNorm.
    """
    if _is_frozen(module):
        return True
    forward = type(module).forward
    return (
        isinstance(module, BATCH_NORMS)
        and (
            forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, RefBatchNorm2d.forward)
            or type(module).__name__ == "NaiveSyncBatchNorm"  # Detectron2's
        )
        and module.running_mean is not None
        and (module.weight is None) == (module.bias is None)
    )


def start_from(norm: Any, refbn: ReferenceNorm) -> None:
    """Give `refbn` the running statistics of `norm`, and its reference unless they are initial."""
    if isinstance(refbn, RefBatchNorm2d):
        _share_statistics(norm, refbn)
    if not is_initial(norm.running_mean, norm.running_var):
        refbn.commit(Moments(norm.running_mean, norm.running_var, 1))


def _share_statistics(source: Any, target: Any) -> None:
    target.running_mean, target.running_var = source.running_mean, source.running_var
    if getattr(source, "num_batches_tracked", None) is not None:
        target.num_batches_tracked = source.num_batches_tracked


def replace_modules(
    model: nn.Module, convert: Callable[[nn.Module], nn.Module | None]
) -> nn.Module:
    """Replace each module m in `model` by `convert(m)`; None keeps m.

    A shared module is replaced by one shared module. The model is changed in place. Use the return
    value: the model itself may be replaced.
    """
    new = {m: c for m in model.modules() if (c := convert(m)) is not None}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)
