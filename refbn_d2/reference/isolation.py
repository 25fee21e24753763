"""Run a model in training mode, and restore its state afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from refbn_d2.utils.random_state import seeded


@contextmanager
def untouched(model: nn.Module, seed: int) -> Iterator[None]:
    """Put the model in training mode without gradient; restore its state afterwards.

    The state is the buffers, the plain numbers that modules keep (training flags, RetinaNet's loss
    normalizer) and the random generators. Inside, the generators are seeded, so that every worker
    draws the same samples.
    """

    def numbers(module: nn.Module) -> dict[str, float]:
        return {key: value for key, value in vars(module).items() if isinstance(value, int | float)}

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    before = [(module, numbers(module)) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with seeded(seed, devices), torch.no_grad():
        try:
            if not model.training:
                model.train()
            yield
        finally:
            for module, values in before:
                for name in numbers(module).keys() - values.keys():
                    delattr(module, name)
                vars(module).update(values)
            for buffer, value in buffers:
                buffer.copy_(value)
