"""Provide CrossIterationBatchNorm2d: BatchNorm over k batches, corrected to the current weights.

Yao, Cao, Zheng, Huang, Lin, "Cross-Iteration Batch Normalization", CVPR 2021 (arXiv 2002.05712),
section 3.

Shapes:
    x, y                (N, C, H, W), x = conv(input; theta), n = N * H * W
    theta               (C, C_in / groups, kH, kW), the convolution's weight
    mu, nu, var         (C,); mu = mean(x), nu = mean(x^2)
    dmu                 (groups, C_in / groups, kH, kW); it is the same for all outputs of a group
    dnu                 the shape of theta
"""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from refbn_d2.layers.functional import batch_moments, ref_batch_norm
from refbn_d2.layers.peers.base import PeerBatchNorm2d, check_steps
from refbn_d2.layers.peers.linking import LinkError, preceding_convolutions
from refbn_d2.utils.torch_compat import register_forward_hook


class PastMoments(NamedTuple):
    """mu(theta) = mu_0 + dmu theta,   nu(theta) = nu_0 + dnu theta,   for one past batch"""

    mu_0: Tensor
    dmu: Tensor
    nu_0: Tensor
    dnu: Tensor

    def at(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mu, nu) at the weight theta, with nu >= mu^2 (the paper's equation of nu-bar)."""
        mu = self.mu_0 + _slope(self.dmu, weight)
        nu = self.nu_0 + _slope(self.dnu, weight)
        return mu, torch.maximum(nu, mu.square())


class CrossIterationBatchNorm2d(PeerBatchNorm2d):
    """y = gamma (x - mu) / sqrt(nu - mu^2 + eps) + beta, (mu, nu) averaged over the last k batches

        mu = 1/k sum_s mu_s(theta),   nu = 1/k sum_s max(nu_s(theta), mu_s(theta)^2)
        mu_s(theta) = mu_s(theta_s) + dmu_s/dtheta (theta - theta_s)
        nu_s(theta) = nu_s(theta_s) + dnu_s/dtheta (theta - theta_s)

    s runs over this step and the k - 1 before it. theta is the current weight of the convolution
    before the norm, theta_s its weight at step s. Derivatives by the weights of earlier layers are
    left out; the paper finds them negligible.

    The gradient flows through the moments of the current batch, with weight 1/k. Past moments are
    constants. So this is `ref_batch_norm` with the past batches as the reference, w = (k-1)/k and
    the "pooled" gradient. With k = 1 it is BatchNorm2d.

    k is 1 during burn-in. After it, k is at most the number of past batches plus 1. Running
    statistics average the moments of single batches, as in BatchNorm and in the authors' code.

    Call `link_cbn(model)` once the model is built, so that the layer knows the convolution. Past
    batches are not in the state dict: a resumed run fills the window again.

    Args:
        num_features, eps, momentum, affine: those of BatchNorm2d.
        window: k. The authors use 4 for COCO, with 4 images per GPU.
        burn_in: training-mode calls of this layer with k = 1. The authors use 8 for COCO, with a
            pretrained backbone. From scratch take an epoch or more.

    Raises:
        ValueError: `window` < 1 or `burn_in` < 0; or a forward pass during burn-in has one element
            per channel.
        LinkError: in a forward pass: the layer is not linked; or it is called twice in one forward
            pass of the model; or its input is not the output of the linked convolution.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        window: int = 4,
        burn_in: int = 8,
        device=None,
        dtype=None,
    ) -> None:
        check_steps(window=window, burn_in=burn_in)
        if window < 1:
            raise ValueError("window must be an integer >= 1, not 0; 1 is BatchNorm2d")
        super().__init__(num_features, eps, momentum, affine, device, dtype)
        self.window, self.burn_in = window, burn_in
        self.past: deque[PastMoments] = deque(maxlen=window - 1)
        self.slot: str | None = None  # this layer's name in the model, once linked
        self._seen: tuple[nn.Conv2d, Tensor] | None = None  # the convolution and its input
        self._checked = False
        self._steps: int | None = 0  # `steps`, read from the device once
        self._calls: int | None = None  # in the current forward pass of the model

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"window={self.window}, burn_in={self.burn_in}"
        )

    def see(self, conv: nn.Conv2d, inputs: tuple) -> None:
        """Keep the input of `conv` until this layer's next call (a forward pre-hook of conv)."""
        self._seen = (conv, inputs[0].detach()) if self.training and self.window > 1 else None

    def normalize(self, x: Tensor) -> Tensor:
        if self._steps is None:
            self._steps = int(self.steps) - 1
        self._steps += 1
        self._count_call()
        past = self._past_at_present_weight() if self._steps > self.burn_in else []
        with torch.no_grad():
            mean, var = batch_moments(x)
            self._update_running_statistics(mean, var, x.numel() // self.num_features)
            k = len(past) + 1
            if k > 1:
                mu, nu = (torch.stack(t).mean(0) for t in zip(*past, strict=True))
                reference = mu, (nu - mu.square()).clamp_(min=0)
            else:
                reference = mean, var  # not used: w is 0
            if self._seen is not None and self._steps > self.burn_in - (self.window - 1):
                self.past.append(self._moments_and_slopes(*self._seen, x, mean, var))
            self._seen = None
        return ref_batch_norm(
            x, *reference, self.weight, self.bias, (k - 1) / k, "pooled", eps=self.eps
        )

    def _count_call(self) -> None:
        if self.window > 1 and self.slot is None:
            raise LinkError(
                "a CrossIterationBatchNorm2d was not linked to the convolution before it: call "
                "refbn_d2.layers.peers.link_cbn(model) once the model is built."
            )
        if self.window > 1 and self._seen is None:
            raise LinkError(
                f"{self.slot}: the convolution that link_cbn found before this norm did not run "
                "before it. Use another norm there (BN, GN, RefBN)."
            )
        if self._calls is not None and self.window > 1:
            self._calls += 1
            if self._calls > 1:
                raise LinkError(
                    f"{self.slot}: this norm is called several times in a forward pass, so that "
                    "its past batches are not comparable. Use another norm there (BN, GN, RefBN)."
                )

    @torch.no_grad()
    def _past_at_present_weight(self) -> list[tuple[Tensor, Tensor]]:
        if self._seen is None:  # the window is 1
            return []
        weight = _weight(self._seen[0])
        return [moments.at(weight) for moments in self.past]

    def _update_running_statistics(self, mean: Tensor, var: Tensor, n: int) -> None:
        factor = self.average_factor()
        unbiased = var * (n / max(n - 1, 1))
        self.running_mean.mul_(1 - factor).add_(factor * mean)
        self.running_var.mul_(1 - factor).add_(factor * unbiased)

    def _moments_and_slopes(
        self, conv: nn.Conv2d, conv_input: Tensor, x: Tensor, mean: Tensor, var: Tensor
    ) -> PastMoments:
        weight = _weight(conv)
        nu = var + mean.square()
        with torch.autocast(x.device.type, enabled=False):
            x, conv_input = x.detach().to(mean.dtype), conv_input.to(mean.dtype)
            n = x.numel() // self.num_features

            def weight_gradient(like: Tensor, dy: Tensor) -> Tensor:
                return conv2d_weight(
                    conv_input, like.shape, dy, conv.stride, conv.padding, conv.dilation,
                    conv.groups,
                ) / n  # fmt: skip

            # dmu is the mean input patch: one output per group is enough to get it.
            one_each = weight[:: weight.shape[0] // conv.groups]
            dmu = weight_gradient(one_each, torch.ones_like(x[:, : conv.groups]))
            dnu = 2 * weight_gradient(weight, x)
        mu_0, nu_0 = mean - _slope(dmu, weight), nu - _slope(dnu, weight)
        if not self._checked:
            self._check_input(conv, mu_0, var)
        return PastMoments(mu_0, dmu, nu_0, dnu)

    def _check_input(self, conv: nn.Conv2d, mu_0: Tensor, var: Tensor) -> None:
        """Check that mu_0 is the bias, except for rounding: the mean is linear in the weight."""
        bias = 0 if conv.bias is None else conv.bias.to(mu_0)
        if ((mu_0 - bias).abs() / (var + self.eps).sqrt()).mean() > 0.1:
            raise LinkError(
                f"{self.slot}: the input of this norm is not the output of the convolution that "
                "link_cbn found before it. Use another norm there (BN, GN, RefBN)."
            )
        self._checked = True

    def restart(self) -> None:
        super().restart()
        self.past.clear()
        self._steps = 0

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.past.clear()
        self._steps = None


def link_cbn(model: nn.Module) -> None:
    """Give every CrossIterationBatchNorm2d in `model` the weight of the convolution before it.

    Call this once, after the model is built. `preceding_convolutions` finds the convolutions. No
    module, parameter or state-dict key is added. Copies and pickles of the model stay linked. A
    model without such norms is not changed.

    Raises:
        LinkError: some norms cannot be linked; they are named.
    """
    pairs = preceding_convolutions(model, CrossIterationBatchNorm2d)
    for name, (norm, conv) in pairs.items():
        if norm.slot is None:
            conv.register_forward_pre_hook(norm.see)
        norm.slot = name
    if pairs and _begin_pass not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin_pass)
        register_forward_hook(model, _end_pass, always_call=True)


def _begin_pass(model: nn.Module, inputs: tuple) -> None:
    _set_calls(model, 0)


def _end_pass(model: nn.Module, inputs: tuple, outputs: object) -> None:
    _set_calls(model, None)  # calls of parts of the model are not counted


def _set_calls(model: nn.Module, calls: int | None) -> None:
    for module in model.modules():
        if isinstance(module, CrossIterationBatchNorm2d):
            module._calls = calls


def _weight(conv: nn.Conv2d) -> Tensor:
    weight = conv.weight.detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _slope(derivative: Tensor, weight: Tensor) -> Tensor:
    """Return the inner products (C,) of derivative (C or groups, ...) and weight (C, ...)."""
    groups = len(derivative)
    products = weight.reshape(groups, len(weight) // groups, -1) * derivative.reshape(groups, 1, -1)
    return products.sum(-1).flatten()
