"""Reference batch normalization for detection and segmentation.

Importing it registers "RefBN" with Detectron2, where that is installed.
"""

import importlib.util
import logging
import os

from refbn_d2.layers import RefBatchNorm2d

__all__ = ["RefBatchNorm2d"]


def _register() -> None:
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # not installed, or a folder that is called so
        return
    if os.environ.get("DETECTRON2_ENV_MODULE") == "refbn_d2.env":
        import detectron2  # noqa: F401  it calls refbn_d2.env, which registers

        return
    try:
        from refbn_d2 import plugin

        plugin.register()
    except Exception as error:  # all but the plugin works without
        logging.getLogger(__name__).warning("RefBN is not registered with Detectron2: %s", error)


_register()
