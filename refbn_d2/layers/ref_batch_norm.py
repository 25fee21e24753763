"""Provide RefBatchNorm2d: BatchNorm with moments mixed with those of a fixed reference batch.

Luo, Li, Zuo, "Improved Batch Normalization Algorithm for Deep Learning", Computer Systems &
Applications 2020, 29(4):187-194. `functional.py` holds the arithmetic, `reference_norm.py` the
reference; `refbn_d2.reference` selects the reference batch and runs it.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from refbn_d2.layers.functional import (
    GRADIENT,
    GRADIENTS,
    REFERENCE_WEIGHT,
    batch_moments,
    in_dtype_of,
    mix_moments,
    ref_batch_norm,
)
from refbn_d2.layers.reference_norm import (
    Moments,
    Recording,
    ReferenceNorm,
    in_backward,
    is_traced,
    warn_no_reference,
)

WEIGHTINGS = ("fixed", "count")


class RefBatchNorm2d(ReferenceNorm, nn.BatchNorm2d):
    """y = gamma (x - mu) / sqrt(var + eps) + beta, (mu, var) the mixture of reference and batch

    The mixture and the gradients in training mode are those of `functional.ref_batch_norm`. In
    eval mode (mu, var) are the running statistics, an EMA of the (mu, var) of training. With
    `reference_weight=0` the layer computes what `nn.BatchNorm2d` does.

    State: BatchNorm2d's keys, and the reference (`ReferenceNorm`). The state dicts of both load
    into each other, this layer's into BatchNorm2d with `strict=False`. `reset_running_stats` keeps
    the reference.

    An empty batch (N = 0) passes through with zero gradients and changes no statistic.

    Args:
        num_features: C of an (N, C, H, W) input.
        eps: added to the variance.
        momentum: of the running statistics' EMA; None: cumulative average.
        affine: learn gamma and beta.
        reference_weight: w in [0, 1], the reference's weight in the mixture.
        gradient: "pooled", "batch" or "reference", see `functional.ref_batch_norm`.
        weighting: "fixed": w is `reference_weight`; "count": w = n_R / (n_R + n_B) with
            n = N * H * W, which pools the reference and the batch.

    Raises:
        ValueError: `reference_weight`, `gradient` or `weighting` has another value; or a forward
            pass in training has w = 0 and one element per channel.
    """

    # these buffers are never None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        reference_weight: float = REFERENCE_WEIGHT,
        gradient: str = GRADIENT,
        weighting: str = WEIGHTINGS[0],
        device=None,
        dtype=None,
    ) -> None:
        if not (isinstance(reference_weight, int | float) and 0 <= reference_weight <= 1):
            raise ValueError(f"reference_weight must be in [0, 1], not {reference_weight!r}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, not {gradient!r}")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, not {weighting!r}")
        super().__init__(num_features, eps, momentum, affine, True, device=device, dtype=dtype)
        self.reference_weight = reference_weight
        self.gradient = gradient
        self.weighting = weighting
        self._init_reference(device, dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"reference_weight={self.reference_weight}, gradient={self.gradient}, "
            f"weighting={self.weighting}"
        )

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x):
            return self._traced(x)
        self._check_input_dim(x)
        if not self.training:
            return self._affine(x, self.running_mean, self.running_var)
        if x.numel() == 0:  # every parameter stays in the graph, with gradient zero
            return self._affine(x, self.running_mean, self.running_var)
        if self.recording is Recording.SLICE and self.has_reference():
            self.accumulate(x)
            return self._affine(x, self.ref_mean, self.ref_var)
        if self.recording in (Recording.CAPTURE, Recording.SLICE):
            mean, var, _ = self.accumulate(x)
            return self._affine(x, mean, var)
        return self._normalize(x)

    def _affine(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        weight, bias = in_dtype_of(mean, self.weight, self.bias)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    def _traced(self, x: Any) -> Any:
        if type(self).forward is RefBatchNorm2d.forward:
            return self._call_traced(x)
        if self.training:
            raise fx.proxy.TraceError(f"{type(self).__name__} can be traced in eval mode only.")
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _normalize(self, x: Tensor) -> Tensor:
        n = x.numel() // self.num_features
        if not self.has_reference():
            warn_no_reference()
            self.commit(Moments(*batch_moments(x.detach()), n))
        ref_mean, ref_var = self.ref_mean, self.ref_var
        if self.recording is Recording.CONCAT:
            part = self.accumulate(x[len(x) - self.concat_rows :])
            ref_mean, ref_var = mix_moments(
                ref_mean, ref_var, part.mean, part.var, self.slice_momentum
            )
        w: float | Tensor = self.reference_weight
        if self.weighting == "count":
            w = self.ref_count / (self.ref_count + n)
        repeated = in_backward()
        if not repeated:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        return ref_batch_norm(
            x,
            ref_mean,
            ref_var,
            self.weight,
            self.bias,
            reference_weight=w,
            gradient=self.gradient,
            running_mean=None if repeated else self.running_mean,
            running_var=None if repeated else self.running_var,
            momentum=momentum,
            eps=self.eps,
            appended=(self.concat_rows, self.slice_momentum),
        )
