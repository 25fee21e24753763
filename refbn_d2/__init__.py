"""Reference batch normalization for detection and segmentation.

Importing it registers "RefBN" with Detectron2, where that is installed.
"""

from refbn_d2.env import register_if_installed
from refbn_d2.layers import RefBatchNorm2d

__version__ = "0.1.0"
__all__ = ["RefBatchNorm2d"]

register_if_installed()
