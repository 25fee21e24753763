"""Provide RoIAlign with a fast backward pass for small feature maps on the CPU.

torchvision's CPU kernel scatters the gradient sample by sample, in one thread. That takes a third
of a training step on small images. RoIAlign is separable, so its transpose is two matrix products.

Shapes:
    N images; C channels; H x W the feature map; s x s the pooled size
    S RoIs, R of them in one image
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align as torchvision_roi_align

# The matrix products run over all cells H * W: they are faster up to this number of cells.
MAX_CELLS = 64 * 64
MAX_ROIS = 64  # in one matrix product, to keep the intermediate in the cache


def roi_align(
    features: Tensor, rois: Tensor, size: int, stride: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Compute torchvision's `roi_align`: the same output, and the same gradient up to rounding.

    Args:
        features: (N, C, H, W) float32, with `stride` pixels per cell.
        rois: (S, 5), (image, x0, y0, x1, y1) in pixels, sorted by image.
        size: s, the side of the output.
        sampling_ratio, aligned: those of torchvision.

    Returns:
        (S, C, size, size)
    """
    options = size, 1.0 / stride, sampling_ratio, aligned
    height, width = features.shape[-2:]
    if features.device.type == "cpu" and features.requires_grad and height * width <= MAX_CELLS:
        return _RoIAlign.apply(features, rois, *options)
    return torchvision_roi_align(features, rois, *options)


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, rois, *options):
        ctx.save_for_backward(rois)
        ctx.shape, ctx.options = features.shape, options
        return torchvision_roi_align(features, rois, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """d(feature)[c, y, x] = sum over r, i, j of  Y[r, i, y] X[r, j, x] d(pooled)[r, c, i, j]"""
        (rois,) = ctx.saved_tensors
        N, C, H, W = ctx.shape
        along_x = sampling_weights(rois[:, 1], rois[:, 3], W, *ctx.options).transpose(1, 2)
        along_y = sampling_weights(rois[:, 2], rois[:, 4], H, *ctx.options)
        d_features = grad.new_zeros(N, H, W, C)
        start = 0
        with torch.autocast("cpu", enabled=False):
            for image, count in enumerate(torch.bincount(rois[:, 0].long(), minlength=N).tolist()):
                d_image = d_features[image].view(H, W * C)
                for first in range(start, start + count, MAX_ROIS):
                    own = slice(first, min(first + MAX_ROIS, start + count))
                    d_pooled = grad[own].permute(0, 2, 3, 1).contiguous()  # (R, s, s, C)
                    d_rows = along_x[own, None] @ d_pooled  # (R, s, W, C)
                    d_image.addmm_(along_y[own].flatten(0, 1).t(), d_rows.view(-1, W * C))
                start += count
        return d_features.permute(0, 3, 1, 2), *[None] * 5


def sampling_weights(
    low: Tensor, high: Tensor, cells: int, size: int, scale: float, ratio: int, aligned: bool
) -> Tensor:
    """Return the weight of each of a map's `cells` in each of a RoI's `size` bins, on one axis.

    A bin averages `ratio` samples, each interpolated between two cells. If `ratio` is 0, it
    averages as many samples as the cells that it covers, rounded up. Samples more than a cell
    outside the map count as zeros.

    Args:
        low, high: (S,), start and end of the RoIs, in pixels.

    Returns:
        (S, size, cells)
    """
    low, high = (low * scale - 0.5, high * scale - 0.5) if aligned else (low * scale, high * scale)
    length = high - low if aligned else (high - low).clamp(min=1)
    step = length / size  # size of a bin
    samples = torch.full_like(step, ratio) if ratio > 0 else step.ceil()
    center = torch.arange(cells, dtype=low.dtype)
    first = low[:, None] + torch.arange(size) * step[:, None]  # (S, size), start of the bins
    weights = low.new_zeros(len(low), size, cells)
    for k in range(int(samples.max()) if len(samples) else 0):
        at = first + ((k + 0.5) * step / samples.clamp(min=1))[:, None]
        counts = (at >= -1) & (at <= cells) & (k < samples)[:, None]
        near = (1 - (at.clamp(0, cells - 1)[..., None] - center).abs()).clamp(min=0)
        weights += near * (counts / samples.clamp(min=1)[:, None])[..., None]
    return weights
