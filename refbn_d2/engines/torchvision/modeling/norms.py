"""Make the norms that a config can name, and freeze them.

x, y        (N, C, H, W)
weight, bias, running_mean, running_var     (C,)
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d
from refbn_d2.layers.convert import BATCH_NORMS, replace_modules
from refbn_d2.layers.peers import PEERS
from refbn_d2.utils.errors import ConfigError

Norm = Callable[[int], nn.Module | None]


class FrozenBatchNorm2d(nn.Module):
    """y = weight (x - running_mean) / sqrt(running_var + eps) + bias, all four constant buffers

    A new layer is the identity. It has `num_batches_tracked` only if it was made from a BatchNorm.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    @classmethod
    def of(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> "FrozenBatchNorm2d":
        """Return a frozen copy of `norm`; a RefBatchNorm2d's reference is dropped."""
        frozen = cls(norm.num_features, norm.eps)
        frozen.weight.copy_(norm.weight.detach())
        frozen.bias.copy_(norm.bias.detach())
        frozen.running_mean.copy_(norm.running_mean)
        frozen.running_var.copy_(norm.running_var)
        frozen.num_batches_tracked = norm.num_batches_tracked
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and x.dtype == torch.float32:  # one pass that need not keep x
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1))
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


_NORMS: dict[str, Norm] = {
    "RefBN": RefBatchNorm2d,
    "RefIN": RefInstanceNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": functools.partial(nn.GroupNorm, 32),
    **PEERS,
    "": lambda channels: None,
}
NORMS = tuple(_NORMS)  # their names in a config


def norm_factory(name: str, device: str) -> Norm:
    """Return `norm(channels)`, which makes a layer for (N, channels, H, W), or None for "".

    Args:
        name: one of `NORMS`; GN has 32 groups.
        device: MODEL.DEVICE. On the CPU torch has no synchronized BatchNorm, and SyncBN is BN.

    Raises:
        ConfigError: `name` is not one of `NORMS`.
    """
    if name not in _NORMS:
        raise ConfigError(f"unknown norm {name!r}; known: {', '.join(map(repr, NORMS))}")
    if name == "SyncBN" and torch.device(device).type == "cpu":
        name = "BN"
    return _NORMS[name]


def freeze(module: nn.Module) -> None:
    """Freeze every parameter in `module`, and replace every BatchNorm by FrozenBN, in place."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    replace_modules(
        module, lambda m: FrozenBatchNorm2d.of(m) if isinstance(m, BATCH_NORMS) else None
    )
