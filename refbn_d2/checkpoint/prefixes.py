"""Find the ResNet in a state dict whose names stand behind someone else's prefix."""

import logging
import os
from collections.abc import Collection, Mapping

from torch import Tensor

from refbn_d2.checkpoint.names import resnet_name, resnet_prefix
from refbn_d2.checkpoint.resnets import ResNetSpec, infer_resnet
from refbn_d2.utils.errors import CheckpointError, listing

logger = logging.getLogger(__name__)


def resnet_of(tensors: Mapping[str, Tensor]) -> ResNetSpec | None:
    """Return the ResNet that `tensors` are, or have in a backbone's place; None if none."""
    own = {name: resnet_name(name) for name in tensors}
    try:
        return infer_resnet({new[1]: tuple(tensors[n].shape) for n, new in own.items() if new})
    except CheckpointError:
        return None


def without_prefix(
    state: Mapping[str, Tensor], source: str | os.PathLike, model_keys: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return `state` without the one prefix that stands before a whole ResNet, and say so.

    The prefix may be of any depth: `model.`, `net.encoder.`. A ResNet without prefix comes first.
    Nothing changes where the model has the ResNet's names as they are.

    Args:
        source: the file it is from, for messages.
        model_keys: the names of the model that is to be loaded.

    Raises:
        CheckpointError: there are ResNets behind several prefixes; names them and what chooses.
    """
    groups: dict[str, dict[str, Tensor]] = {}  # prefix -> the tensors behind it, by their own names
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
            f"{source} holds several ResNets, under {listing(keys, 8)}: choose by --key {keys[0]}, "
            f"or as MODEL.WEIGHTS {source}?key={keys[0]}"
        )
    prefix = found[0]
    logger.info("%s: its ResNet stands behind %r, which is dropped.", source, prefix)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
