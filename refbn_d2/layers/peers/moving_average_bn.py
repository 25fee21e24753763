"""Provide MovingAverageBatchNorm2d: moving averages in the forward and the backward pass.

Yan, Wan, Zhang, Zhang, Wei, Sun, "Towards Stabilizing Batch Statistics in Backward Propagation of
Batch Normalization", ICLR 2020 (arXiv 2001.06838), section 4. Where the paper and the authors' code
differ (clip, warm-up), this module follows the code.

Shapes:
    x, y, dy, dx                      (N, C, H, W)
    chi2, psi, r, gamma, beta         (C,); chi2 = mean(x^2), a second moment
    second_moments, gradient_moments  (window, C), chi2 and psi of the last `window` batches
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from refbn_d2.layers.functional import batch_moments
from refbn_d2.layers.peers.base import PeerBatchNorm2d, check_steps
from refbn_d2.layers.peers.linking import LinkError, preceding_convolutions
from refbn_d2.utils.torch_compat import register_forward_hook

logger = logging.getLogger(__name__)


class _Normalize(torch.autograd.Function):
    """y = gamma r z + beta, z = x / sqrt(chi2 + eps), with MABN's gradient of x."""

    @staticmethod
    def forward(ctx, x, gamma, beta, chi2, r, gradient_moments, slot, averages, eps):
        # not a saved tensor: the backward pass writes to gradient_moments
        ctx.save_for_backward(x, gamma, chi2, r, slot, averages)
        ctx.gradient_moments, ctx.eps = gradient_moments, eps
        return F.batch_norm(x, torch.zeros_like(chi2), chi2, gamma * r, beta, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gamma, chi2, r, slot, averages = ctx.saved_tensors
        inverse = (chi2 + ctx.eps).rsqrt()
        _, dy_z, dbeta = torch.ops.aten.native_batch_norm_backward(  # sums of dy z and of dy
            dy, x, gamma, None, None, torch.zeros_like(chi2), inverse, True, ctx.eps,
            [False, True, True],
        )  # fmt: skip
        psi = gamma * r * dy_z / (x.numel() // len(chi2))
        past, new = ctx.gradient_moments[slot], psi.to(ctx.gradient_moments)[None]
        kept = torch.where(new.isfinite(), new, past)  # a GradScaler's loss may overflow
        ctx.gradient_moments.index_copy_(0, slot, kept)
        psi = torch.where(averages, ctx.gradient_moments.mean(0).to(psi), psi)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy * _column(gamma * r * inverse, dy)
            dx.addcmul_(x, _column(inverse.square() * psi, x), value=-1)
        return dx, r * dy_z, dbeta, *[None] * 6


def _column(v: Tensor, like: Tensor) -> Tensor:
    return v.to(like.dtype).view(1, -1, 1, 1)


class MovingAverageBatchNorm2d(PeerBatchNorm2d):
    """y = gamma r z + beta,   z = x / sqrt(chi2 + eps),   dx = (g - z psi) / sqrt(chi2 + eps)

        chi2 = the mean of mean(x^2) over the last `window` batches
        psi  = the mean of mean(g z) over the last `window` batches,   g = gamma r dy
        r    = clip(sqrt((chi2 + eps) / (running_var + eps)), 1/r_max, r_max), a constant

    In eval mode y = gamma x / sqrt(running_var + eps) + beta. running_var is the exponential moving
    average of chi2; r is computed before this batch is averaged into it. running_mean stays 0.

    No mean is subtracted. Instead the weight of the convolution before the norm is centralized:
    call `link_mabn(model)` once the model is built. If a layer is called several times in a forward
    pass, each call counts as a batch.

    With a GradScaler, psi is that of the scaled loss. Where a step overflows, the window keeps an
    older value. After a change of scale, psi averages both scales for `window` steps.

    State: that of `PeerBatchNorm2d`, and both windows. A BatchNorm2d that loads it (`strict=False`)
    is the same map in eval mode. A BatchNorm2d's state dict loads, but MABN cannot resume from it:
    the means are dropped, with a warning, and the schedule starts at step 0.

    Args:
        num_features, eps, affine: those of BatchNorm2d.
        momentum: of running_var. The paper has 0.02.
        window: number of batches in an average. The paper's 32 images are 16 batches of 2.
        warmup_steps: training-mode calls of this layer that use their own chi2 and psi; at least
            `window` calls do.
        renorm_steps: training-mode calls with r = 1; at least `warmup_steps` calls have it.
        r_max: the clip of r.

    Raises:
        ValueError: `window` < 1, a number of steps < 0, or r_max < 1.
        LinkError: in a forward pass in training mode, the layer is not linked.
    """

    second_moments: Tensor
    gradient_moments: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        window: int = 16,
        warmup_steps: int = 100,
        renorm_steps: int = 1000,
        r_max: float = 5.0,
        device=None,
        dtype=None,
    ) -> None:
        check_steps(window=window, warmup_steps=warmup_steps, renorm_steps=renorm_steps)
        if window < 1:
            raise ValueError("window must be an integer >= 1, not 0")
        if not isinstance(r_max, int | float) or not r_max >= 1:
            raise ValueError(f"r_max must be a number >= 1, not {r_max!r}")
        super().__init__(num_features, eps, momentum, affine, device, dtype)
        self.window, self.r_max = window, r_max
        self.warmup_steps, self.renorm_steps = warmup_steps, renorm_steps
        empty = self.running_var.new_zeros(window, num_features)
        self.register_buffer("second_moments", empty)
        self.register_buffer("gradient_moments", empty.clone())
        self.slot: str | None = None  # this layer's name in the model, once linked

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"window={self.window}, warmup_steps={self.warmup_steps}, "
            f"renorm_steps={self.renorm_steps}, r_max={self.r_max}"
        )

    def normalize(self, x: Tensor) -> Tensor:
        if self.slot is None:
            raise LinkError(
                "a MovingAverageBatchNorm2d was not linked to the convolution before it: call "
                "refbn_d2.layers.peers.link_mabn(model) once the model is built."
            )
        with torch.no_grad():
            mean, var = batch_moments(x)
            chi2 = var + mean.square()
            slot = (self.steps % self.window).view(1)
            self.second_moments.index_copy_(0, slot, chi2.to(self.second_moments)[None])
            averages = self.steps > max(self.window, self.warmup_steps - 1)
            chi2 = torch.where(averages, self.second_moments.mean(0).to(chi2), chi2)
            r = ((chi2 + self.eps) / (self.running_var + self.eps)).sqrt()
            r = r.clamp(1 / self.r_max, self.r_max)
            renorm = self.steps > max(self.renorm_steps, self.warmup_steps)
            r = torch.where(renorm, r, torch.ones_like(r))
            factor = self.average_factor()
            self.running_var.mul_(1 - factor).add_(factor * chi2)
        if self.affine:
            gamma, beta = self.weight.to(chi2.dtype), self.bias.to(chi2.dtype)
        else:
            gamma, beta = torch.ones_like(chi2), torch.zeros_like(chi2)
        return _Normalize.apply(
            x, gamma, beta, chi2, r, self.gradient_moments, slot, averages, self.eps
        )

    def restart(self) -> None:
        super().restart()
        self.second_moments.zero_()
        self.gradient_moments.zero_()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        windows = {name: getattr(self, name) for name in ("second_moments", "gradient_moments")}
        if any(prefix + name not in state_dict for name in windows):
            for name, buffer in windows.items():
                state_dict[prefix + name] = torch.zeros_like(buffer)
            state_dict[prefix + "steps"] = torch.zeros_like(self.steps)
            mean = state_dict.get(prefix + "running_mean")
            if mean is not None and mean.any():
                logger.warning(
                    "%s: the running means of a BatchNorm are dropped, since MABN subtracts no "
                    "mean. Train before you evaluate.",
                    prefix.rstrip("."),
                )
                state_dict[prefix + "running_mean"] = torch.zeros_like(mean)
        super()._load_from_state_dict(state_dict, prefix, *args)


def link_mabn(model: nn.Module) -> None:
    """Centralize the weight of the convolution before every MovingAverageBatchNorm2d in `model`.

        W <- W - mean(W) over (C_in / groups, kH, kW)

    Each forward pass of the convolution does so, and the gradient goes through it. The parameter
    itself is centralized in place now, and whenever the model's state dict is read. So an ordinary
    convolution can load the checkpoint.

    Call this once, after the model is built. No module, parameter or state-dict key is added.
    Copies and pickles of the model stay linked. A model without such norms is not changed.

    Raises:
        LinkError: some norms cannot be linked, or their convolution has a single weight per output;
            they are named.
    """
    pairs = preceding_convolutions(model, MovingAverageBatchNorm2d)
    single = [name for name, (_, conv) in pairs.items() if conv.weight[0].numel() == 1]
    if single:
        raise LinkError(
            f"MovingAverageBatchNorm2d at {', '.join(single)}: the convolution before it has a "
            "single weight per output, which is 0 once centralized. Use another norm there "
            "(BN, GN)."
        )
    for name, (norm, conv) in pairs.items():
        if norm.slot is None:
            conv.register_forward_pre_hook(_shadow_weight)
            register_forward_hook(conv, _unshadow_weight, always_call=True)
            conv.register_state_dict_pre_hook(_centralize_in_place)
            _centralize_in_place(conv)
        norm.slot = name


def _centralized(weight: Tensor) -> Tensor:
    return weight - weight.mean((1, 2, 3), keepdim=True)


def _parameter(conv: nn.Module) -> Tensor:
    """Return the registered weight, which a shadow may hide."""
    weight = conv._parameters["weight"]
    assert weight is not None  # preceding_convolutions refuses a convolution without it
    return weight


def _shadow_weight(conv: nn.Module, inputs: tuple) -> None:
    # An instance attribute takes precedence over the registered parameter, which is not changed.
    conv.__dict__["weight"] = _centralized(_parameter(conv))


def _unshadow_weight(conv: nn.Module, inputs: tuple, output: object) -> None:
    conv.__dict__.pop("weight", None)


@torch.no_grad()
def _centralize_in_place(conv: nn.Module, prefix: str = "", keep_vars: bool = False) -> None:
    # Outputs and SGD steps stay the same, except for rounding, since gradients are centralized.
    # A mean as small as rounding stays, so that reading the state twice changes nothing more.
    weight = _parameter(conv)
    mean = weight.mean((1, 2, 3), keepdim=True)
    rounding = 8 * torch.finfo(weight.dtype).eps * weight.abs().mean((1, 2, 3), keepdim=True)
    weight.sub_(torch.where(mean.abs() > rounding, mean, 0))
