"""Reference batch normalization for detection and segmentation.

Importing it registers "RefBN" and "RefIN" with Detectron2, if that is imported before or after.
"""

from refbn_d2.config import RefBNOptions
from refbn_d2.env import register_with_detectron2
from refbn_d2.layers import (
    RefBatchNorm2d,
    RefInstanceNorm2d,
    convert_from_refbn,
    convert_to_refbn,
    fold,
)
from refbn_d2.reference import ReferenceBatch

__version__ = "0.1.0"
__all__ = [
    "RefBNOptions",
    "RefBatchNorm2d",
    "RefInstanceNorm2d",
    "ReferenceBatch",
    "convert_from_refbn",
    "convert_to_refbn",
    "fold",
]

register_with_detectron2()
