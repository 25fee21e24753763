"""Register RefBN when Detectron2 is imported, or by DETECTRON2_ENV_MODULE=refbn_d2.env.

With that variable, Detectron2's unmodified scripts and the worker processes that they spawn know
RefBN. If you used that variable for another module, put that one into REFBN_D2_ENV_MODULE (a module
or the path of a .py file, as for Detectron2). It is set up first.
"""

import importlib.machinery
import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


def setup_environment() -> None:
    """Set up REFBN_D2_ENV_MODULE, then register RefBN; Detectron2 calls this at its import.

    Raises:
        PluginError: RefBN cannot be registered with this Detectron2.
    """
    from detectron2.utils.env import setup_custom_environment

    if chained := os.environ.get("REFBN_D2_ENV_MODULE"):
        setup_custom_environment(chained)
    from refbn_d2.plugin.registration import register

    register()


def register_with_detectron2() -> None:
    """Register RefBN with Detectron2, now if it is imported already, else when it is.

    Detectron2 itself is not imported here: it takes seconds. A failure is logged as a warning.
    """
    if "detectron2" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Detectron2Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Detectron2Finder())


def _register() -> None:
    if os.environ.get("DETECTRON2_ENV_MODULE") == "refbn_d2.env":
        return  # Detectron2 calls setup_environment
    try:
        from refbn_d2.plugin.registration import register

        register()
    except Exception as error:  # everything but the plugin works without it
        logging.getLogger(__name__).warning("RefBN is not registered with Detectron2: %s", error)


class _Detectron2Finder(MetaPathFinder):
    """Find Detectron2 as without it, and register RefBN after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "detectron2":
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None and spec.origin is not None:
            execute = spec.loader.exec_module  # origin is None: a folder of that name

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
