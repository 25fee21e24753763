"""Register RefBN with Detectron2: at import, or by DETECTRON2_ENV_MODULE=refbn_d2.env.

With that variable, Detectron2's unmodified scripts and the worker processes that they spawn know
RefBN. If you used that variable for another module, put that one into REFBN_D2_ENV_MODULE (a module
or the path of a .py file, as for Detectron2). It is set up first.
"""

import importlib.util
import logging
import os


def setup_environment() -> None:
    """Set up REFBN_D2_ENV_MODULE, then register RefBN; Detectron2 calls this at its import.

    Raises:
        PluginError: RefBN cannot be registered with this Detectron2.
    """
    from detectron2.utils.env import setup_custom_environment

    if chained := os.environ.get("REFBN_D2_ENV_MODULE"):
        setup_custom_environment(chained)
    from refbn_d2 import plugin

    plugin.register()


def register_if_installed() -> None:
    """Register RefBN with Detectron2 if that is installed; log a warning if that fails."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # not installed, or a folder of that name
        return
    if os.environ.get("DETECTRON2_ENV_MODULE") == "refbn_d2.env":
        import detectron2  # noqa: F401  it calls setup_environment

        return
    try:
        from refbn_d2 import plugin

        plugin.register()
    except Exception as error:  # everything but the plugin works without it
        logging.getLogger(__name__).warning("RefBN is not registered with Detectron2: %s", error)
