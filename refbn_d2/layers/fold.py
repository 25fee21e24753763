"""Fold the norms of any model into the convolutions before them, for inference."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from refbn_d2.layers.call_graph import Conv, observe_calls, trace_calls
from refbn_d2.layers.convert import BATCH_NORMS, convert_from_refbn, is_norm, replace_modules
from refbn_d2.layers.reference_norm import ReferenceNorm

logger = logging.getLogger(__name__)


def fold(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Return a copy of `model` in eval mode, each norm folded into the convolution before it.

        w <- w s,   b <- (b - mean) s + beta,   s = gamma / sqrt(var + eps)

    mean and var are the running statistics. nn.Identity takes the norm's place. The outputs are
    those of `model` in eval mode.

    The convolution before a norm is found in one of three ways:

    - The norm is the convolution's child `norm` (Detectron2). A run on random input confirms it.
    - For other norms, the model is run on `example_inputs`.
    - Without `example_inputs`, torch.fx traces the model.

    RefBN, BN, SyncBN and FrozenBN are folded. A norm stays, with RefBN as BN, if there is no
    convolution before it, or if the norm or that convolution is used in other places too. RefIN
    depends on the image and stays. The log lists these norms.

    Args:
        example_inputs: the model's argument, or a tuple of its arguments, for models that torch.fx
            cannot trace (detectors). The run must reach every norm that is to be folded.

    Raises:
        ValueError: some norm is no child `norm` of a convolution, torch.fx cannot trace the model,
            and there are no `example_inputs`.
    """
    model = copy.deepcopy(model).eval()
    names = {m: name for name, m in model.named_modules() if is_norm(m)}
    children = [child for m in model.modules() for child in m._modules.values()]
    folded = set()
    for conv in model.modules():
        norm: Any = conv._modules.get("norm")
        if (
            isinstance(conv, Conv)
            and norm in names
            and len(norm.running_mean) == conv.out_channels
            and children.count(norm) == 1
            and _is_foldable(conv, model)
            and _normalizes_output(conv)
        ):
            _fuse(conv, norm)
            folded.add(norm)
    if remaining := names.keys() - folded:
        if example_inputs is None:
            calls = trace_calls(model, remaining)
        else:
            calls = observe_calls(model, remaining, example_inputs)
        for norm in remaining:
            before = calls.only_before(norm)
            if before is not None and _is_foldable(before, model):
                _fuse(before, norm)
                folded.add(norm)
    model = replace_modules(model, lambda m: nn.Identity() if m in folded else None)
    kinds = (*BATCH_NORMS, ReferenceNorm)
    left = [name for name, m in model.named_modules() if is_norm(m) or isinstance(m, kinds)]
    logger.info(
        "Folded %d norms into convolutions%s",
        len(folded),
        f"; left as they are: {', '.join(left)}" if left else "",
    )
    return convert_from_refbn(model)


def _is_foldable(conv: Conv, model: nn.Module) -> bool:
    """Return whether the weight is the convolution's own: not computed, and not shared."""
    weight = conv._parameters.get("weight")
    owners = sum(p is weight for m in model.modules() for p in m._parameters.values())
    return weight is not None and owners == 1


def affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) such that a norm in eval mode is scale x + shift.

        scale = weight / sqrt(var + eps),   shift = bias - mean scale

    Both are (C,), float64, on the CPU. A `weight` of None stands for ones, a `bias` of None for
    zeros.
    """

    def double(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", torch.float64)

    scale = (double(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * double(weight)
    shift = -double(mean) * scale
    if bias is not None:
        shift = shift + double(bias)
    return scale, shift


@torch.no_grad()
def _fuse(conv: Conv, norm: Any) -> None:
    scale, shift = affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    bias = shift if conv.bias is None else shift + conv.bias.to(scale) * scale
    if isinstance(conv, nn.ConvTranspose2d):  # weight (in, out / groups, kH, kW)
        rows = conv.in_channels // conv.groups
        scale = scale.view(conv.groups, -1).repeat_interleave(rows, dim=0)[..., None, None]
    else:
        scale = scale.view(-1, 1, 1, 1)
    old = conv.weight
    conv.weight = nn.Parameter((old.to(scale) * scale).to(old), old.requires_grad)
    conv.bias = nn.Parameter(bias.to(old), old.requires_grad)


@torch.no_grad()
def _normalizes_output(conv: Conv) -> bool:
    """Return whether `conv.norm` comes right after the convolution, by a run on random input."""
    probe = copy.deepcopy(conv).double()
    sides = [(k - 1) * d + 3 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, conv.in_channels, *sides, generator=generator).to(probe.weight)
    try:
        expected = probe(x)
    except Exception:  # not Detectron2's forward: it takes other inputs
        return False
    _fuse(probe, probe.norm)
    probe.norm = nn.Identity()
    return bool((probe(x) - expected).abs().max() <= 1e-9 * expected.abs().max())
