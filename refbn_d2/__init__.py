"""Reference batch normalization for detection and segmentation.

Importing it registers "RefBN" with Detectron2, where that is installed.
"""

import logging

from refbn_d2.layers import RefBatchNorm2d

__all__ = ["RefBatchNorm2d"]


def _register() -> None:
    try:
        import detectron2.layers  # noqa: F401
    except ImportError:  # not installed, or a folder that is called so
        return
    try:
        from refbn_d2 import plugin

        plugin.register()
    except Exception as error:  # all but the plugin works without
        logging.getLogger(__name__).warning("RefBN is not registered with Detectron2: %s", error)


_register()
