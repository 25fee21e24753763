"""Run a model in training mode without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from refbn_d2.utils.random_state import seeded


@contextmanager
def untouched(model: nn.Module, seed: int) -> Iterator[None]:
    """Put the model in training mode without gradient; restore everything else afterwards.

    Restored are buffers, what modules keep as plain numbers (training flags, RetinaNet's loss
    normalizer), and the random generators, which are seeded meanwhile so that every worker samples
    the same.
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
