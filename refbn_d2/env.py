"""For DETECTRON2_ENV_MODULE: `DETECTRON2_ENV_MODULE=refbn_d2.env python tools/train_net.py ...`

Detectron2's own scripts, unmodified, and the worker processes that they spawn then know RefBN. An
environment module that was set before goes into REFBN_D2_ENV_MODULE (a module or the path of a .py
file, as for Detectron2), and is set up first.
"""

import os

from detectron2.utils.env import setup_custom_environment


def setup_environment() -> None:
    """What Detectron2 calls when it is imported.

    Raises:
        PluginError: RefBN cannot be registered with this Detectron2.
    """
    if chained := os.environ.get("REFBN_D2_ENV_MODULE"):
        setup_custom_environment(chained)
    from refbn_d2 import plugin

    plugin.register()
