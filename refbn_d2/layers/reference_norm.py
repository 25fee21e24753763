"""Provide what RefBatchNorm2d and RefInstanceNorm2d share: the reference, and its recording."""

import enum
import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from refbn_d2.layers.functional import batch_moments, mix_moments
from refbn_d2.utils.torch_compat import is_compiling

logger = logging.getLogger(__name__)


class Moments(NamedTuple):
    """Mean and biased variance (C,), taken over `count` elements per channel."""

    mean: Tensor
    var: Tensor
    count: int  # type: ignore[assignment]  # not tuple.count


class Recording(enum.Enum):
    """Modes of a forward pass in training: how it normalizes, and what it records.

    Moments recorded in several calls of a pass are pooled by count. Only `ReferenceNorm.commit`
    puts them into the reference. Running statistics change only in the modes OFF and CONCAT. A
    pass that activation checkpointing repeats in the backward pass records and changes nothing.
    """

    OFF = enum.auto()
    """Normalize by the mixture; record nothing."""
    CAPTURE = enum.auto()
    """Record the batch's moments. RefBN normalizes by them, RefIN with them as the reference."""
    SLICE = enum.auto()
    """Record the batch's moments. RefBN normalizes by the reference's, RefIN by the mixture.
    Without a reference yet: as CAPTURE."""
    CONCAT = enum.auto()
    """Normalize by the mixture. The last `concat_rows` rows belong to the reference. Record their
    moments, and average them into the reference for this pass."""


class ReferenceNorm(nn.Module):
    """Hold reference moments, record new ones, and commit them. The layers add the arithmetic.

    State: `ref_mean`, `ref_var` (C,), `ref_count` (int64, elements per channel in the reference;
    0: no reference yet). The state dict of a BatchNorm2d loads: the reference then starts from the
    running statistics, with a count of 1, unless these are the initial ones (mean 0, variance 1).
    `reset_parameters` drops the reference.

    In a half-precision module `ref_mean` and `ref_var` stay float32: they are an average that half
    precision would stop from moving. The other tensors take the module's dtype, as in BN.

    A layer without a reference takes its first training batch as the reference, with a warning.
    """

    # these buffers are never None
    ref_mean: Tensor
    ref_var: Tensor
    ref_count: Tensor

    num_features: int

    def _init_reference(self, device=None, dtype=None) -> None:
        """Register the buffers; the constructors of the layers call this last."""
        zeros = torch.zeros(self.num_features, device=device, dtype=dtype)
        self.register_buffer("ref_mean", _wide(zeros))
        self.register_buffer("ref_var", _wide(torch.ones_like(zeros)))
        self.register_buffer("ref_count", torch.zeros((), dtype=torch.int64, device=device))
        self._has_reference = False
        self.start_recording(Recording.OFF)

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
        """Set parameters, reference and, if there are any, running statistics as in a new layer."""
        super().reset_parameters()  # type: ignore[misc]  # of torch's norm
        if "ref_count" in self._buffers:  # the constructors of torch's norms call this too
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

    def _call_traced(self, x: Any) -> Any:
        """Stay one module in a graph of torch.fx, as layers of torch.nn do."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def accumulate(self, x: Tensor) -> Moments:
        """Return the moments of x, and pool them into `recorded_moments`."""
        moments = Moments(*batch_moments(x.detach()), x.numel() // self.num_features)
        if in_backward():
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
        if getattr(self, "running_mean", None) is None and mean is not None:  # of a BatchNorm
            _warn_other_form()
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                state_dict.pop(prefix + name, None)
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


def is_traced(x: Any) -> bool:
    """Return whether torch.fx traces the model, with a stand-in for the batch."""
    return isinstance(x, fx.Proxy)


def in_backward() -> bool:
    """Return whether autograd runs a backward pass in this thread.

    A layer is called there only when activation checkpointing repeats a forward pass.
    """
    if is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks for it


@functools.cache
def warn_no_reference() -> None:
    logger.warning(
        "A layer of RefBN or RefIN takes its first training batch as the reference. To choose the "
        "reference, capture it before training (refbn_d2.ReferenceBatch)."
    )


@functools.cache
def _warn_other_form() -> None:
    logger.warning(
        "RefIN layers were loaded with the weights of batch norms, whose running statistics became "
        "the reference. They compute something else until they are trained."
    )


def refbn_layers(model: nn.Module) -> Iterator[tuple[str, ReferenceNorm]]:
    """Yield (name, layer) of every RefBatchNorm2d and RefInstanceNorm2d, each layer once."""
    for name, module in model.named_modules():
        if isinstance(module, ReferenceNorm):
            yield name, module


def has_refbn(model: nn.Module) -> bool:
    """Return whether `model` has a RefBatchNorm2d or RefInstanceNorm2d."""
    return any(isinstance(module, ReferenceNorm) for module in model.modules())
