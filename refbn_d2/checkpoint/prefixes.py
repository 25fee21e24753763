"""Find the ResNet in a state dict whose names have an unknown prefix."""

import logging
import os
from collections.abc import Collection, Mapping

from torch import Tensor

from refbn_d2.checkpoint.names import resnet_name, resnet_prefix
from refbn_d2.checkpoint.resnets import ResNetSpec, infer_resnet
from refbn_d2.utils.errors import CheckpointError, listing

logger = logging.getLogger(__name__)


def resnet_of(tensors: Mapping[str, Tensor]) -> ResNetSpec | None:
    """Return the ResNet that `tensors` are, or hold as a detector's backbone; None if none."""
    own = {name: resnet_name(name) for name in tensors}
    try:
        return infer_resnet({new[1]: tuple(tensors[n].shape) for n, new in own.items() if new})
    except CheckpointError:
        return None


def without_prefix(
    state: Mapping[str, Tensor], source: str | os.PathLike, model_keys: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return `state` without the prefix before its ResNet's names, and log that it is dropped.

    The prefix may have several parts: `model.`, `net.encoder.`. Nothing changes if there is a
    ResNet without a prefix, or if the model has the ResNet's names with the prefix.

    Args:
        source: the file it is from, for messages.
        model_keys: the names of the model that is to be loaded.

    Raises:
        CheckpointError: there are ResNets under several prefixes; lists them.
    """
    groups: dict[str, dict[str, Tensor]] = {}  # prefix -> {name without it: tensor}
    for name, tensor in state.items():
        if (prefix := resnet_prefix(name)) is not None:
            groups.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
    found = [prefix for prefix, group in groups.items() if resnet_of(group)]
    known = any(prefix + own in model_keys for prefix in found for own in groups[prefix])
    if not found or "" in found or known:
        return dict(state)
    if len(found) > 1:
        keys = [prefix.rstrip(".") for prefix in found]
        raise CheckpointError(
            f"{source} holds several ResNets, under {listing(keys, 8)}: choose with --key "
            f"{keys[0]}, or with MODEL.WEIGHTS {source}?key={keys[0]}"
        )
    prefix = found[0]
    logger.info("%s: dropped the prefix %r of its ResNet's names.", source, prefix)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
