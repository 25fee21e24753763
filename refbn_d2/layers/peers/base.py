"""Provide PeerBatchNorm2d, the base class of RefBN's peers: a BatchNorm2d with a step counter."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PeerBatchNorm2d(nn.BatchNorm2d):
    """y = gamma (x - running_mean) / sqrt(running_var + eps) + beta in eval mode

    In training mode a subclass's `normalize` computes y. An empty batch (N = 0) passes through with
    zero gradients and changes no statistic.

    State: BatchNorm2d's keys and `steps` (int64), the number of training-mode calls of this layer.
    Schedules depend on `steps`, not on `num_batches_tracked`, which a pretrained BatchNorm brings
    along. A BatchNorm2d's state dict loads, with `steps` 0. This layer's state dict loads with its
    `steps`, as a resumed run needs; a run that starts from another's weights calls `restart`. The
    state dict loads into BatchNorm2d with `strict=False`.

    Args:
        num_features: C of an (N, C, H, W) input.
        eps: added to the variance.
        momentum: of the running statistics' moving average; None: cumulative average.
        affine: learn gamma and beta.
    """

    # these buffers are never None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    steps: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.register_buffer("steps", torch.zeros_like(self.num_batches_tracked))

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training or x.numel() == 0:  # parameters stay in the graph, gradient zero
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        self.num_batches_tracked.add_(1)
        self.steps.add_(1)
        return self.normalize(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, H, W), N > 0, as in training, and update the statistics."""
        raise NotImplementedError

    def restart(self) -> None:
        """Forget earlier steps: the next call is the first of a new run."""
        self.steps.zero_()

    def average_factor(self) -> float:
        """Return the weight of this batch in the running statistics."""
        if self.momentum is None:
            return 1.0 / float(self.num_batches_tracked)
        return self.momentum

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.setdefault(prefix + "steps", torch.zeros_like(self.steps))
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_steps(**steps: int) -> None:
    """Check that every value is an integer >= 0.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name, value in steps.items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an integer >= 0, not {value!r}")
