"""Compute reference batch normalization (RefBN): moments, mixture, forward and backward pass.

Luo, Li, Zuo, "Improved Batch Normalization Algorithm for Deep Learning", Computer Systems &
Applications 2020, 29(4):187-194. Where its abstract is silent, `docs/algorithm.md` decides.

Shapes:
    x, y, dy, dx                (N, C, H, W), any memory format
    mean, var, gamma, beta      (C,), float32 for half-precision x, else x's dtype; var is biased
    w                           a number in [0, 1] or a 0-dim tensor
    n = N * H * W               the number of elements in a channel
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from refbn_d2.utils.errors import RefBNError
from refbn_d2.utils.torch_compat import is_compiling

GRADIENTS = ("pooled", "batch", "reference")
REFERENCE_WEIGHT, GRADIENT, PRIOR_COUNT = 0.9, "batch", 64.0  # the defaults


def mix_moments(
    mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor, w: float | Tensor
) -> tuple[Tensor, Tensor]:
    """mean = (1-w) mean_a + w mean_b;  var = (1-w) var_a + w var_b + w (1-w) (mean_a - mean_b)^2

    Return the moments of the mixture that draws from a with probability 1-w and from b with w.
    They are exact, and the variance is never negative. With w = n_b / (n_a + n_b) they are the
    moments of both samples together.
    """
    difference = mean_b - mean_a
    mean = mean_a + w * difference
    var = (1 - w) * var_a + w * var_b + (w * (1 - w)) * difference.square()
    return mean, var


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of x (N, C, H, W) over N, H, W: two (C,) tensors.

    They are accumulated and returned in float32 or wider, under autocast too.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    if is_compiling():  # plain operations, for the compiler to fuse
        var, mean = torch.var_mean(x.float() if half else x, dim=(0, 2, 3), correction=0)
        return mean, var
    if not half:
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    # The kernel returns moments in x's own dtype, but a running statistic keeps its dtype: with
    # momentum 1 it receives the moments themselves, the variance times n / (n-1).
    n = x.numel() // x.shape[1]
    mean, var = torch.empty(2, x.shape[1], dtype=torch.float32, device=x.device)
    torch.batch_norm_update_stats(x, mean.zero_(), var.zero_(), 1.0)
    return mean, var * ((n - 1) / n) if n > 1 else torch.zeros_like(var)


class _Normalize(torch.autograd.Function):
    """y = gamma (x - mean) / sqrt(var + eps) + beta, with `ref_batch_norm`'s gradients."""

    @staticmethod
    def forward(ctx, x, gamma, beta, mean, var, batch_mean, batch_var, w, gradient, eps, appended):
        ctx.save_for_backward(x, gamma, mean, var, batch_mean, batch_var)
        ctx.has_beta = beta is not None
        ctx.w, ctx.gradient, ctx.eps, ctx.appended = w, gradient, eps, appended
        return F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gamma, mean, var, batch_mean, batch_var = ctx.saved_tensors
        w, eps = ctx.w, ctx.eps
        r = (var + eps).rsqrt()
        has_gamma, has_beta = gamma is not None, ctx.has_beta
        gamma = gamma if has_gamma else torch.ones_like(mean)
        scale = gamma * r  # dy/dx with the moments held constant
        mask = [ctx.needs_input_grad[0], has_gamma, has_gamma or has_beta]

        def batch_norm_backward(factor, mean, r):
            """factor r [dy - mean(dy) - z mean(dy z)], sum(dy z), sum(dy); z = (x - mean) r."""
            return torch.ops.aten.native_batch_norm_backward(
                dy, x, factor, None, None, mean, r, True, eps, mask
            )

        if ctx.gradient == "batch":
            # y = gamma (a z + d) + beta: BN's own backward with the factor gamma a, a r_B = r.
            batch_r = (batch_var + eps).rsqrt()
            dx, dgamma, dbeta = batch_norm_backward(gamma * (r / batch_r), batch_mean, batch_r)
            if has_gamma:
                dgamma = (r / batch_r) * dgamma + ((batch_mean - mean) * r) * dbeta
        elif ctx.gradient == "pooled":
            # scale [dy - (1-w)(mean(dy) + xh mean(dy xh))] = (1-w) BN's + w scale dy
            dx, dgamma, dbeta = batch_norm_backward((1 - w) * gamma, mean, r)
            if mask[0]:
                _add_scaled(dx, dy, w * scale)
        else:
            # A row's share in the mean and in the mean of squares, times n, is 1-w. Appended rows
            # have w m n/n_s more. (1 - share) scale dy is then added to each row.
            dx, dgamma, dbeta = batch_norm_backward(gamma, mean, r)
            if mask[0]:
                rows, momentum = ctx.appended
                groups = [(slice(0, len(x) - rows), 1 - w)]
                if rows:
                    share = (1 - w) + w * momentum * (len(x) / rows)
                    groups.append((slice(len(x) - rows, None), share))
                for group, share in groups:
                    _add_scaled(dx[group].mul_(share), dy[group], (1 - share) * scale)
        # On a GPU the kernels return every gradient, whatever the mask says.
        return dx, dgamma if has_gamma else None, dbeta if has_beta else None, *[None] * 8


def in_dtype_of(moments: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Return gamma and beta in the dtype of the moments: half precision is normalized in float32.

    `F.batch_norm` takes half-precision x with all of them in float32, or none.
    """
    # Even an idle `to` is a node in a traced graph. torch 2.1 cannot export a generator.
    dtype = moments.dtype
    return [p if p is None or p.dtype == dtype else p.to(dtype) for p in parameters]


def _average_in(running: Tensor, moments: Tensor, momentum: float) -> None:
    """running = (1 - momentum) running + momentum moments, in place."""
    if running.dtype == moments.dtype:
        running.mul_(1 - momentum).add_(momentum * moments)
    else:  # half precision is rounded once, as BN does
        running.copy_((1 - momentum) * running.to(moments.dtype) + momentum * moments)


def _add_scaled(dx: Tensor, dy: Tensor, scale: Tensor) -> None:
    """dx += scale dy in place, scale (C,)."""
    dx.addcmul_(dy, scale.to(dx.dtype).view(1, -1, 1, 1))


def ref_batch_norm(
    x: Tensor,
    ref_mean: Tensor,
    ref_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    reference_weight: float | Tensor = REFERENCE_WEIGHT,
    gradient: str = GRADIENT,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    appended: tuple[int, float] = (0, 0.0),
) -> Tensor:
    """y = gamma (x - mu) / sqrt(var + eps) + beta, (mu, var) the mixture of reference and batch

    With reference weight w, batch moments mu_B, var_B and reference moments mu_R, var_R:

        mu  = w mu_R + (1-w) mu_B
        var = w var_R + (1-w) var_B + w (1-w) (mu_R - mu_B)^2

    Gradients, with r = 1/sqrt(var+eps), xh = (x-mu) r, z = (x-mu_B)/sqrt(var_B+eps):

        "pooled":    dx = gamma r [dy - (1-w) mean(dy) - (1-w) xh mean(dy xh)]
        "batch":     dx = gamma r [dy - mean(dy) - z mean(dy z)]
        "reference": dx = gamma r [dy - c sum(dy) - c xh sum(dy xh)]

    "pooled" is the exact derivative with mu_R, var_R constant.

    "batch" is the derivative of BN, with the affine map from z to xh held constant (Ioffe, "Batch
    Renormalization", 2017, section 3).

    "reference" is the exact derivative if the last `rows` of x were averaged into mu_R, var_R.
    c is (1-w)/n; for those rows, w momentum / n_rows is added to it, with n_rows = rows H W. With
    w = momentum = 1 this is Virtual BatchNorm (Salimans et al., "Improved Techniques for Training
    GANs", 2016, section 3.4), except that there each example counts in its own moments.

    Args:
        x: (N, C, H, W), N > 0; float16 and bfloat16 are normalized by float32 moments.
        ref_mean, ref_var: (C,), the reference's mean and biased variance, constant.
        weight, bias: gamma and beta, (C,) or None, each independently of the other.
        reference_weight: w in [0, 1], a number or a 0-dim tensor.
        gradient: "pooled", "batch" or "reference".
        running_mean, running_var: (C,) or None. Updated in place by an EMA of (mu, var), in which
            var_B has Bessel's correction n/(n-1).
        momentum: the weight of (mu, var) in that EMA.
        eps: added to the variance.
        appended: (rows, slice momentum): the last `rows` of x belong to the reference, and were
            averaged into it with that momentum. Only `gradient="reference"` reads it.

    Returns:
        (N, C, H, W) in x's dtype and memory format.

    Raises:
        ValueError: `gradient` is unknown; or n = 1 and w = 0, for which `F.batch_norm` raises too.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, not {gradient!r}")
    n = x.numel() // x.shape[1]
    w = reference_weight
    if n == 1 and not isinstance(w, Tensor) and w == 0:
        raise RefBNError(
            f"Expected more than 1 value per channel when training, got {tuple(x.shape)}: with a "
            "reference_weight (MODEL.REFBN.REFERENCE_WEIGHT) of 0 one element has no variance. Set "
            "it above 0, or train on larger images or batches."
        )
    with torch.no_grad():
        batch_mean, batch_var = batch_moments(x)
        mean, var = mix_moments(batch_mean, batch_var, ref_mean, ref_var, w)
        if running_mean is not None and running_var is not None:
            bessel = (1 - w) * batch_var / max(n - 1, 1)
            _average_in(running_mean, mean, momentum)
            _average_in(running_var, var + bessel, momentum)
    weight, bias = in_dtype_of(mean, weight, bias)
    return _Normalize.apply(
        x, weight, bias, mean, var, batch_mean, batch_var, w, gradient, eps, appended
    )


def _image_by_image(x: Tensor) -> bool:
    """Return whether images in channels_last cost more to copy than to normalize one by one.

    In channels_last, an image with N C channels is a copy. On a CPU it takes longer than a call per
    image from about 32,000 values an image on, and 3 times as long at 1.4 million. On a GPU, calls
    are expensive and copies are cheap.
    """
    n, *image = x.shape
    copied = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return copied and n > 1 and x.device.type == "cpu" and math.prod(image) >= 2**15


def ref_instance_norm(
    x: Tensor,
    ref_mean: Tensor,
    ref_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    prior_count: float = PRIOR_COUNT,
    eps: float = 1e-5,
) -> Tensor:
    """y_i = gamma (x_i - mu_i) / sqrt(var_i + eps) + beta for each image i

    (mu_i, var_i) is the mixture of the image's moments m_i, v_i over H and W with the reference's,
    which count as n_0 elements:

        w     = n_0 / (n_0 + H W)
        mu_i  = w mu_R + (1-w) m_i
        var_i = w var_R + (1-w) v_i + w (1-w) (mu_R - m_i)^2

    The gradient is the exact derivative with mu_R, var_R constant. With n_0 = 0 this is instance
    normalization (Ulyanov et al., "Instance Normalization", 2016).

    Args:
        x: (N, C, H, W); float16 and bfloat16 are normalized by float32 moments.
        ref_mean, ref_var, weight, bias, eps: as in `ref_batch_norm`.
        prior_count: n_0 >= 0.

    Returns:
        (N, C, H, W) in x's dtype.
    """
    n, c, height, width = x.shape
    traced = torch.jit.is_tracing() or is_compiling()
    if not traced and not x.numel():  # every parameter stays in the graph, with gradient zero
        weight, bias = in_dtype_of(ref_mean, weight, bias)
        return F.batch_norm(x, ref_mean, ref_var, weight, bias, eps=eps)
    w = prior_count / (prior_count + height * width)
    # BatchNorm's kernels. They refuse a single element without a prior.
    if x.requires_grad and not traced and (w > 0 or height * width > 1):
        if _image_by_image(x):
            images = [
                ref_batch_norm(image, ref_mean, ref_var, weight, bias, w, "pooled", eps=eps)
                for image in x.split(1)
            ]
            return torch.cat(images)
        # All images at once, as one with N C channels.
        y = ref_batch_norm(
            x.reshape(1, n * c, height, width),
            ref_mean.repeat(n),
            ref_var.repeat(n),
            None if weight is None else weight.repeat(n),
            None if bias is None else bias.repeat(n),
            w,
            "pooled",
            eps=eps,
        )
        return y.view(x.shape)
    # Plain operations, which compilers fuse and exporters know.
    half = x.dtype in (torch.float16, torch.bfloat16)
    image_var, image_mean = torch.var_mean(x.float() if half else x, dim=(2, 3), correction=0)
    mean, var = mix_moments(image_mean, image_var, ref_mean, ref_var, w)
    scale = (var + eps).rsqrt()
    weight, bias = in_dtype_of(scale, weight, bias)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.addcmul(shift[..., None, None], x, scale[..., None, None]).to(x.dtype)
