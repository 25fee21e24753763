"""Provide RefBatchNorm2d: BatchNorm with moments mixed with those of a fixed reference batch.

Luo, Li, Zuo, "Improved Batch Normalization Algorithm for Deep Learning", Computer Systems &
Applications 2020, 29(4):187-194. `functional.py` holds the arithmetic, this file the state;
`refbn_d2.reference` selects the reference batch and runs it.
"""

import enum
import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
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
from refbn_d2.utils.torch_compat import is_compiling

WEIGHTINGS = ("fixed", "count")

logger = logging.getLogger(__name__)


class Moments(NamedTuple):
    """Mean and biased variance (C,), taken over `count` elements per channel."""

    mean: Tensor
    var: Tensor
    count: int  # type: ignore[assignment]  # not tuple.count


class Recording(enum.Enum):
    """Modes of a forward pass in training: how it normalizes, and what it records.

    Moments recorded in several calls of a pass are pooled by count. Only `RefBatchNorm2d.commit`
    puts them into the reference. Running statistics change only in the modes OFF and CONCAT. A
    pass that activation checkpointing repeats in the backward pass records and changes nothing.
    """

    OFF = enum.auto()
    """Normalize by the mixture; record nothing."""
    CAPTURE = enum.auto()
    """Normalize by the batch's own moments, and record them."""
    SLICE = enum.auto()
    """Normalize by the reference's moments, and record the batch's. Without a reference yet:
    as CAPTURE."""
    CONCAT = enum.auto()
    """Normalize by the mixture. The last `concat_rows` rows belong to the reference. Record their
    moments, and average them into the reference for this pass."""


class RefBatchNorm2d(nn.BatchNorm2d):
    """y = gamma (x - mu) / sqrt(var + eps) + beta, (mu, var) the mixture of reference and batch

    The mixture and the gradients in training mode are those of `functional.ref_batch_norm`. In
    eval mode (mu, var) are the running statistics, an EMA of the (mu, var) of training. With
    `reference_weight=0` the layer computes what `nn.BatchNorm2d` does.

    State: BatchNorm2d's keys, and `ref_mean`, `ref_var` (C,), `ref_count` (int64, elements per
    channel in the reference; 0: no reference yet). The state dict of a BatchNorm2d loads: the
    reference then starts from the running statistics, with a count of 1, unless these are the
    initial ones (mean 0, variance 1). This layer's state dict loads into BatchNorm2d with
    `strict=False`. `reset_parameters` drops the reference, `reset_running_stats` keeps it.

    In a half-precision module `ref_mean` and `ref_var` stay float32: they are an average that
    half precision would stop from moving. The other tensors take the module's dtype, as in BN.

    A layer without a reference takes its first training batch as the reference, with a warning.
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
    ref_mean: Tensor
    ref_var: Tensor
    ref_count: Tensor

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
        self.register_buffer("ref_mean", _wide(torch.zeros_like(self.running_mean)))
        self.register_buffer("ref_var", _wide(torch.ones_like(self.running_var)))
        self.register_buffer("ref_count", torch.zeros_like(self.num_batches_tracked))
        self._has_reference = False
        self.start_recording(Recording.OFF)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"reference_weight={self.reference_weight}, gradient={self.gradient}, "
            f"weighting={self.weighting}"
        )

    def start_recording(
        self, recording: Recording, concat_rows: int = 0, slice_momentum: float = 0.0
    ) -> None:
        """Set the mode of the next forward passes, and discard recorded moments."""
        self.recording = recording
        self.concat_rows = concat_rows
        self.slice_momentum = slice_momentum
        self.recorded_moments: Moments | None = None

    def stop_recording(self) -> Moments | None:
        """Set the mode OFF, and return the recorded moments; None if there are none."""
        recorded = self.recorded_moments
        self.start_recording(Recording.OFF)
        return recorded

    @torch.no_grad()
    def commit(self, moments: Moments, momentum: float = 1.0) -> None:
        """Mix `moments` into the reference (mu_R, var_R) with weight `momentum`.

        With momentum 1, or without a reference yet, `moments` become the reference.
        """
        if momentum == 1 or not self.has_reference():
            mean, var = moments.mean, moments.var
            self.ref_count.fill_(moments.count)
            self._has_reference = True
        else:
            mean, var = mix_moments(
                self.ref_mean, self.ref_var, moments.mean, moments.var, momentum
            )
        self.ref_mean.copy_(mean)
        self.ref_var.copy_(var)

    def has_reference(self) -> bool:
        """Return whether there are reference moments. Once there are, the device is not read.

        There are if `ref_count` is not 0; on the meta device there are none.
        """
        if not self._has_reference and not self.ref_count.is_meta:
            self._has_reference = bool(self.ref_count > 0)
        return self._has_reference

    @torch.no_grad()
    def reset_reference(self) -> None:
        """Drop the reference, as in a new layer."""
        self.ref_mean.zero_()
        self.ref_var.fill_(1)
        self.ref_count.zero_()
        self._has_reference = False

    def reset_parameters(self) -> None:
        """Set parameters, running statistics and reference as in a new layer."""
        super().reset_parameters()
        if "ref_count" in self._buffers:  # BatchNorm2d's constructor calls this too
            self.reset_reference()

    def _apply(self, fn, *args, **kwargs):  # torch 2.1 has added `recurse`
        mean, var, count = self.ref_mean, self.ref_var, self.ref_count
        super()._apply(fn, *args, **kwargs)
        if _is_half(self.ref_mean):  # `.half()`: converted from the values before
            self.ref_mean = mean.to(self.ref_mean.device).float()
            self.ref_var = var.to(self.ref_var.device).float()
        if not self.ref_count.is_meta and not _same(count, self.ref_count):
            self.reset_reference()  # `.to_empty()`: the buffers have no values yet
        return self

    def forward(self, x: Tensor) -> Tensor:
        if _is_traced(x):
            return self._traced(x)
        self._check_input_dim(x)
        if not self.training:
            return self._affine(x, self.running_mean, self.running_var)
        if x.numel() == 0:  # every parameter stays in the graph, with gradient zero
            return self._affine(x, self.running_mean, self.running_var)
        if self.recording is Recording.SLICE and self.has_reference():
            self._accumulate(x)
            return self._affine(x, self.ref_mean, self.ref_var)
        if self.recording in (Recording.CAPTURE, Recording.SLICE):
            mean, var, _ = self._accumulate(x)
            return self._affine(x, mean, var)
        return self._normalize(x)

    def _affine(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        weight, bias = in_dtype_of(mean, self.weight, self.bias)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    def _traced(self, x: Any) -> Any:
        """Stay one module in a graph of torch.fx, as layers of torch.nn do."""
        if type(self).forward is RefBatchNorm2d.forward:
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        if self.training:
            raise fx.proxy.TraceError(f"{type(self).__name__} can be traced in eval mode only.")
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _normalize(self, x: Tensor) -> Tensor:
        n = x.numel() // self.num_features
        if not self.has_reference():
            _warn_no_reference()
            self.commit(Moments(*batch_moments(x.detach()), n))
        ref_mean, ref_var = self.ref_mean, self.ref_var
        if self.recording is Recording.CONCAT:
            part = self._accumulate(x[len(x) - self.concat_rows :])
            ref_mean, ref_var = mix_moments(
                ref_mean, ref_var, part.mean, part.var, self.slice_momentum
            )
        w: float | Tensor = self.reference_weight
        if self.weighting == "count":
            w = self.ref_count / (self.ref_count + n)
        repeated = _in_backward()
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

    def _accumulate(self, x: Tensor) -> Moments:
        """Return the moments of x, and pool them into `recorded_moments`."""
        moments = Moments(*batch_moments(x.detach()), x.numel() // self.num_features)
        if _in_backward():
            return moments
        if self.recorded_moments is None:
            self.recorded_moments = moments
        else:
            mean, var, count = self.recorded_moments
            total = count + moments.count
            pooled = mix_moments(mean, var, moments.mean, moments.var, moments.count / total)
            self.recorded_moments = Moments(*pooled, total)
        return moments

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        names = [prefix + name for name in ("ref_mean", "ref_var", "ref_count")]
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        if names[0] not in state_dict and mean is not None and var is not None:
            count = torch.zeros((), dtype=torch.int64, device=mean.device)
            values = [mean, var, count.fill_(not is_initial(mean, var))]
            state_dict.update(zip(names, values, strict=True))
        for name, running in zip(names, (mean, var), strict=False):
            if name in state_dict:
                value = state_dict[name]
                # With `assign=True` the layer would have one tensor for two statistics.
                state_dict[name] = _wide(value.clone() if value is running else value)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._has_reference = False  # read the loaded `ref_count` when next asked


def is_initial(running_mean: Tensor, running_var: Tensor) -> bool:
    """Return whether these are the statistics of a norm that has seen no batch: mean 0, variance 1.

    They are no reference then. On the meta device nothing has been seen.
    """
    return running_mean.is_meta or bool((running_mean == 0).all() and (running_var == 1).all())


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider."""
    return tensor.float() if _is_half(tensor) else tensor


def _same(before: Tensor, after: Tensor) -> bool:
    """Return whether a buffer kept its value when it was moved or converted."""
    return after is before or (not before.is_meta and bool(before.to(after.device) == after))


def _is_traced(x: Any) -> bool:
    """Return whether torch.fx traces the model, with a stand-in for the batch."""
    return isinstance(x, fx.Proxy)


def _in_backward() -> bool:
    """Return whether autograd runs a backward pass in this thread.

    A layer is called there only when activation checkpointing repeats a forward pass.
    """
    if is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks for it


@functools.cache
def _warn_no_reference() -> None:
    logger.warning(
        "A RefBatchNorm2d without a reference takes its first training batch as the reference. "
        "To choose the reference, capture it before training (refbn_d2.ReferenceBatch)."
    )


def refbn_layers(model: nn.Module) -> Iterator[tuple[str, RefBatchNorm2d]]:
    """Yield (name, layer) of every RefBatchNorm2d in `model`, each layer once."""
    for name, module in model.named_modules():
        if isinstance(module, RefBatchNorm2d):
            yield name, module


def has_refbn(model: nn.Module) -> bool:
    """Return whether `model` has a RefBatchNorm2d."""
    return any(isinstance(module, RefBatchNorm2d) for module in model.modules())
