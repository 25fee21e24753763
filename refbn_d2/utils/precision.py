"""Automatic mixed precision, where it is faster than float32."""

import functools
import logging

import torch

logger = logging.getLogger(__name__)


@functools.cache
def lacks_bfloat16(device: str) -> bool:
    """Return whether torch computes bfloat16 on `device` without fast kernels.

    So it is on CPUs without AVX-512 (AMD before Zen 4, most laptops), where convolutions take
    several times as long as in float32.
    """
    if device != "cpu":
        return False
    if hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):  # not in torch 2.0
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "AVX512" not in torch.__config__.show()


def autocast(device: str, dtype: torch.dtype, enabled: bool) -> torch.autocast:
    """Return torch.autocast(device, dtype, enabled); it is off if `device` lacks bfloat16."""
    if enabled and dtype == torch.bfloat16 and lacks_bfloat16(device):
        _warn_once()
        enabled = False
    return torch.autocast(device, dtype, enabled=enabled)


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "SOLVER.AMP: in float32, which is faster on this CPU (torch needs AVX-512 for bfloat16)."
    )
