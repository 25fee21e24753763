"""Reference batch normalization for detection and segmentation."""

from refbn_d2.layers import RefBatchNorm2d

__all__ = ["RefBatchNorm2d"]
