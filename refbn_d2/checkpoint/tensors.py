"""Check that tensors can be weights, and make tensors of arrays."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refbn_d2.utils.errors import CheckpointError


def check_weight(source: str | os.PathLike, name: str, tensor: Tensor) -> None:
    """Return if `tensor` can be a weight: dense, and of finite real numbers.

    Args:
        source: the file it is from, for the message.

    Raises:
        CheckpointError: it cannot; says why.
    """
    if reason := _refusal(tensor):
        raise CheckpointError(
            f"{source}: {name} {reason}. Weights are dense tensors of finite real numbers: take "
            "another checkpoint of the run, or leave this tensor out of the state_dict()."
        )


def to_tensor(source: str | os.PathLike, name: str, array: np.ndarray) -> Tensor:
    """Return a copy of `array` as a tensor, in the machine's byte order.

    Raises:
        CheckpointError: torch has no such data type.
    """
    try:
        return torch.tensor(array.astype(array.dtype.newbyteorder("=")))
    except TypeError:
        raise CheckpointError(
            f"{source}: {name} is an array of {array.dtype}, a type that torch does not have: save "
            "it as float32."
        ) from None


def _refusal(tensor: Any) -> str:
    if tensor.is_meta:
        return "has no values (it is on the meta device)"
    if tensor.is_quantized:
        return "is quantized"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "is sparse or nested"
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        return f"is {'complex' if tensor.dtype.is_complex else 'boolean'}"
    if tensor.is_floating_point():
        numbers = tensor.float() if tensor.element_size() == 1 else tensor
        if not bool(torch.isfinite(numbers).all()):
            return "has NaN or infinite values"
    return ""
