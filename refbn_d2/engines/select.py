"""Which engine runs a config: Detectron2, or torchvision's operators where it is not installed."""

import importlib.util
import sys
from types import ModuleType

from refbn_d2.utils.errors import MissingDependencyError

ENGINES = ("auto", "detectron2", "torchvision")


def select_engine(name: str) -> ModuleType:
    """Return the engine's module, which has `run(args)`; "auto" is Detectron2 where it imports.

    Raises:
        MissingDependencyError: "detectron2", and it cannot be imported.
    """
    why = ""
    if name != "torchvision":
        try:
            from refbn_d2.engines import detectron2

            _say("Engine: Detectron2.")
            return detectron2
        except Exception as error:  # half installed, or not one that RefBN can be registered with
            if name == "detectron2":
                raise MissingDependencyError(
                    f"Detectron2 cannot be imported ({error}). Its guide says "
                    "how to install it: https://detectron2.readthedocs.io/en/latest/tutorials/"
                    "install.html; tools/train_net.py --engine torchvision needs none."
                ) from error
            installed = importlib.util.find_spec("detectron2")
            why = f" ({error})" if installed else " (Detectron2 is not installed)"
    from refbn_d2.engines import torchvision

    _say(f"Engine: torchvision's operators{why}.")
    return torchvision


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # the log is set up later, in each worker
