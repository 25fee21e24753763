"""Run a model in training mode, and restore its state afterwards."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from refbn_d2.utils.random_state import seeded


@contextmanager
def untouched(model: nn.Module, seed: int) -> Iterator[None]:
    """Put the model in training mode without gradient; restore its state afterwards.

    The state is the buffers, the numbers that modules keep (training flags, RetinaNet's loss
    normalizer), also where they are None before, the deques (CBN's past batches), and the random
    generators. Inside, the generators are seeded, so that every worker draws the same samples.
    """
    buffers = [(part := _written_once(buffer), part.clone()) for buffer in model.buffers()]
    before = [
        (m, {k: v.copy() if isinstance(v, deque) else v for k, v in vars(m).items()})
        for m in model.modules()
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with seeded(seed, devices), torch.no_grad():
        try:
            if not model.training:
                model.train()
            yield
        finally:
            for module, values in before:
                now = vars(module)
                for name in [n for n in now if n not in values and _is_restored(now[n])]:
                    delattr(module, name)
                for name, value in values.items():
                    if _is_restored(value) or (value is None and _is_restored(now.get(name))):
                        now[name] = value
            for buffer, value in buffers:
                buffer.copy_(value)


def _is_restored(value: object) -> bool:
    return isinstance(value, int | float | deque)


def _written_once(buffer: Tensor) -> Tensor:
    """Return a view with each element of `buffer` once, also if `expand` repeats them."""
    for dim, stride in enumerate(buffer.stride()):
        if stride == 0:
            buffer = buffer.narrow(dim, 0, min(1, buffer.shape[dim]))
    return buffer


@contextmanager
def with_weights_of(other: nn.Module, model: nn.Module) -> Iterator[None]:
    """Let `model` compute with the parameters and buffers of `other`, without copying them.

    Inside, `other` must not change. Afterwards `model` has its own tensors again.

    Raises:
        ValueError: `other` has other parameters or buffers.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    theirs = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    shapes, wanted = ({k: v.shape for k, v in tensors.items()} for tensors in (theirs, own))
    if shapes != wanted:
        different = sorted(k for k, _ in shapes.items() ^ wanted.items())
        raise ValueError(
            f"The averaged model is not a copy of the reference's model: {different[0]} is "
            f"missing in one of them, or has another shape ({len(different)} such names)."
        )
    data = {name: tensor.data for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            tensor.data = theirs[name].detach().to(tensor)
        yield
    finally:
        for name, tensor in own.items():
            tensor.data = data[name]
