"""Provide RefInstanceNorm2d: each image's moments, mixed with those of a fixed reference batch.

`functional.py` holds the arithmetic, `reference_norm.py` the reference. `docs/algorithm.md` says
what RefInstanceNorm2d gains and costs beside RefBatchNorm2d.
"""

import torch
from torch import Tensor, nn

from refbn_d2.layers.functional import (
    PRIOR_COUNT,
    batch_moments,
    mix_moments,
    ref_instance_norm,
)
from refbn_d2.layers.reference_norm import (
    Moments,
    Recording,
    ReferenceNorm,
    is_traced,
    warn_no_reference,
)
from refbn_d2.utils.errors import RefBNError


class RefInstanceNorm2d(ReferenceNorm, nn.InstanceNorm2d):
    """y_i = gamma (x_i - mu_i) / sqrt(var_i + eps) + beta for each image i

    (mu_i, var_i) is the mixture of the reference's moments and those of the image over H and W,
    with weight w for the reference:

        w = n_0 / (n_0 + H W)

    The reference counts as n_0 elements: an image with few elements, whose own moments are noisy,
    is normalized by the reference, an image with many by itself. mu_i and var_i are the moments of
    the image's H W elements and n_0 of the reference together. With n_0 = 0 this is instance
    normalization.

    Nothing depends on the other images of a batch, and evaluation computes what training does. In
    a batch of images of different sizes, padding counts as a part of the image.

    State: weight and bias (C,), and the reference (`ReferenceNorm`). There are no running
    statistics; those of a BatchNorm2d's state dict become the reference. An empty batch (N = 0)
    passes through with zero gradients.

    Args:
        num_features: C of an (N, C, H, W) input.
        eps: added to the variance.
        affine: learn gamma and beta.
        prior_count: n_0 >= 0, in elements of a channel.

    Raises:
        ValueError: `prior_count` is not a number >= 0; a forward pass has an input of another
            shape than (N, num_features, H, W), or, in training, n_0 = 0 and H W = 1.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        prior_count: float = PRIOR_COUNT,
        device=None,
        dtype=None,
    ) -> None:
        if not (isinstance(prior_count, (int, float)) and 0 <= prior_count < float("inf")):
            raise ValueError(f"prior_count must be a number >= 0, not {prior_count!r}")
        super().__init__(num_features, eps, affine=affine, device=device, dtype=dtype)
        self.prior_count = prior_count
        self._init_reference(device, dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, affine={self.affine}, "
            f"prior_count={self.prior_count}"
        )

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x) and type(self).forward is RefInstanceNorm2d.forward:
            return self._call_traced(x)
        if not torch.jit.is_tracing():
            self._check_input_dim(x)
        mean, var = self.ref_mean, self.ref_var
        if self.training and x.numel():
            mean, var = self._reference_of(x)
        return ref_instance_norm(x, mean, var, self.weight, self.bias, self.prior_count, self.eps)

    def _check_input_dim(self, input: Tensor) -> None:
        shape = tuple(input.shape)
        if len(shape) != 4 or shape[1] != self.num_features:
            raise ValueError(f"Expected the shape (N, {self.num_features}, H, W), got {shape}")
        if self.training and self.prior_count == 0 and shape[2:] == (1, 1):
            raise RefBNError(
                f"Expected more than 1 value per channel when training, got {shape}: with a "
                "prior_count (MODEL.REFBN.PRIOR_COUNT) of 0 an image of one element has no "
                "variance. Set it above 0, or train on larger images."
            )

    def _reference_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reference's moments for a training batch, and record what is asked for."""
        has_reference = self.has_reference()
        if self.recording is Recording.OFF and not has_reference:
            warn_no_reference()
            self.commit(Moments(*batch_moments(x.detach()), x.numel() // self.num_features))
        if self.recording is Recording.OFF:
            return self.ref_mean, self.ref_var
        rows = self.concat_rows if self.recording is Recording.CONCAT else len(x)
        recorded = self.accumulate(x[len(x) - rows :])
        if self.recording is Recording.CAPTURE or not has_reference:
            return recorded.mean, recorded.var
        if self.recording is Recording.SLICE:
            return self.ref_mean, self.ref_var
        momentum = self.slice_momentum
        return mix_moments(self.ref_mean, self.ref_var, recorded.mean, recorded.var, momentum)
