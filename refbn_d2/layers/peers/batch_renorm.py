"""Provide BatchRenorm2d: BatchNorm corrected toward its running statistics.

Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
NeurIPS 2017 (arXiv 1702.03275), Algorithm 1.

Shapes:
    x, y                        (N, C, H, W)
    mu, var, r, d, gamma, beta  (C,)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refbn_d2.layers.functional import batch_moments
from refbn_d2.layers.peers.base import PeerBatchNorm2d, check_steps


class BatchRenorm2d(PeerBatchNorm2d):
    """y = gamma (r (x - mu_B) / sigma_B + d) + beta,   sigma = sqrt(var + eps)

        r = clip(sigma_B / sigma, 1/r_max, r_max),   d = clip((mu_B - mu) / sigma, -d_max, d_max)

    mu_B, var_B are the batch's moments; mu, var are the running statistics before this batch is
    averaged into them. r and d are constants in the backward pass. With r_max = 1 and d_max = 0
    this is BatchNorm2d. Where nothing is clipped, x is normalized by the running statistics.

    The clips grow linearly in the paper's proportions, scaled by `ramp_steps`. The paper (section
    4.1) starts with 5,000 steps of BatchNorm, and reaches d_max = 5 after 25,000 steps and
    r_max = 3 after 40,000.

        step                 0 .. ramp/8     5/8 ramp     ramp ..
        r_max                1               linear       r_max
        d_max                0               d_max        d_max

    The running variance averages variances with Bessel's correction, as BatchNorm does, so that
    checkpoints are interchangeable with BatchNorm's. The paper averages standard deviations.

    Args:
        num_features, eps, affine: those of BatchNorm2d.
        momentum: of the running statistics. The paper has 0.01. Take 0.1 if `ramp_steps` is below
            about 4,000: the statistics must be accurate when the clips begin to grow.
        r_max, d_max: the final clips.
        ramp_steps: training-mode calls of this layer until both clips are final; 0: from the start.
            The paper has 40,000, a quarter of its run. Take a quarter of your run too.

    Raises:
        ValueError: r_max < 1, d_max < 0, or `ramp_steps` is not an integer >= 0; or a forward pass
            in training has one element per channel, for which BatchNorm2d raises too.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        ramp_steps: int = 40_000,
        device=None,
        dtype=None,
    ) -> None:
        if not isinstance(r_max, int | float) or not r_max >= 1:
            raise ValueError(f"r_max must be a number >= 1, not {r_max!r}")
        if not isinstance(d_max, int | float) or not d_max >= 0:
            raise ValueError(f"d_max must be a number >= 0, not {d_max!r}")
        check_steps(ramp_steps=ramp_steps)
        super().__init__(num_features, eps, momentum, affine, device, dtype)
        self.r_max, self.d_max, self.ramp_steps = r_max, d_max, ramp_steps

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"r_max={self.r_max}, d_max={self.d_max}, ramp_steps={self.ramp_steps}"
        )

    def clips(self) -> tuple[Tensor, Tensor]:
        """Return (r_max, d_max) of the current step as 0-dim tensors, without a device sync."""
        ramp = (self.steps - 1) / max(self.ramp_steps, 1)  # the first step is step 0
        if self.ramp_steps == 0:
            ramp = torch.ones_like(ramp)
        r = ((ramp - 1 / 8) / (7 / 8)).clamp(0, 1)
        d = ((ramp - 1 / 8) / (4 / 8)).clamp(0, 1)
        return 1 + (self.r_max - 1) * r, self.d_max * d

    def normalize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean, var = batch_moments(x)
            r_max, d_max = self.clips()
            sigma = (self.running_var + self.eps).sqrt()
            r = ((var + self.eps).sqrt() / sigma).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / sigma).clamp(-d_max, d_max)
        # gamma (r z + d) + beta is gamma' z + beta', which BatchNorm's kernels compute.
        weight, bias = r, d
        if self.affine:
            weight, bias = self.weight * r, self.bias + self.weight * d
        dtype = self.running_var.dtype  # a half-precision module's kernels want one dtype
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            weight.to(dtype),
            bias.to(dtype),
            True,
            self.average_factor(),
            self.eps,
        )
