"""Any model's norms folded into the convolutions before them, for inference."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from refbn_d2.layers.call_graph import Conv, observe_calls, trace_calls
from refbn_d2.layers.convert import BATCH_NORMS, convert_from_refbn, is_norm, replace_modules

logger = logging.getLogger(__name__)


def fold(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A copy of `model` in eval mode, each norm folded into the convolution before it

        w <- w s,   b <- (b - mean) s + beta,   s = gamma / sqrt(var + eps)

    with the running statistics. nn.Identity takes the norm's place, and the outputs are the model's
    in eval mode. Which convolution precedes a norm is told by structure where the norm is the
    convolution's child `norm` (Detectron2's; tried on random input), else by tracing with torch.fx,
    else by running `example_inputs`. RefBN, BN, SyncBN and FrozenBN are folded; left, as BN, and
    listed in the log are those without a convolution before, and those whose convolution or whose
    self serves in other places too.

    Args:
        example_inputs: for models that torch.fx cannot trace (detectors): the model's argument, or
            a tuple of its arguments. It has to reach every norm that is to be folded.

    Raises:
        ValueError: norms are left to place, and torch.fx cannot trace the model, and there are no
            `example_inputs`.
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
            and _normalises_output(conv)
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
    left = [name for name, m in model.named_modules() if is_norm(m) or isinstance(m, BATCH_NORMS)]
    logger.info(
        "Folded %d norms into convolutions%s",
        len(folded),
        f"; left as they are: {', '.join(left)}" if left else "",
    )
    return convert_from_refbn(model)


def _is_foldable(conv: Conv, model: nn.Module) -> bool:
    """The weight is the convolution's own: not computed from others, and shared with none."""
    weight = conv._parameters.get("weight")
    owners = sum(p is weight for m in model.modules() for p in m._parameters.values())
    return weight is not None and owners == 1


def affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(scale, shift) (C,) in float64 on the CPU, for which a norm in eval mode is scale x + shift

        scale = weight / sqrt(var + eps),   shift = bias - mean scale

    None for `weight` and `bias` are ones and zeros.
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
def _normalises_output(conv: Conv) -> bool:
    """Whether `conv.norm` comes right behind the convolution in `conv`, as random input tells."""
    probe = copy.deepcopy(conv).double()
    sides = [(k - 1) * d + 3 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, conv.in_channels, *sides, generator=generator).to(probe.weight)
    try:
        expected = probe(x)
    except Exception:  # a forward that is not Detectron2's, and wants something else
        return False
    _fuse(probe, probe.norm)
    probe.norm = nn.Identity()
    return bool((probe(x) - expected).abs().max() <= 1e-9 * expected.abs().max())
