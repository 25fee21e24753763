"""Select the engine: Detectron2, or torchvision's operators if Detectron2 is not installed."""

import importlib.util
import sys
from types import ModuleType

from refbn_d2.utils.errors import MissingDependencyError
from refbn_d2.utils.extras import needs

ENGINES = ("auto", "detectron2", "torchvision")


def select_engine(name: str) -> ModuleType:
    """Return the engine's module, which has `run(args)`; "auto" is Detectron2 if it imports.

    Raises:
        MissingDependencyError: `name` is "detectron2", and it cannot be imported, or an optional
            package is missing.
    """
    why = ""
    if name != "torchvision":
        try:
            with needs("train"):
                from refbn_d2.engines import detectron2

            _say("Engine: Detectron2.")
            return detectron2
        except Exception as error:  # an incomplete installation, or RefBN cannot be registered
            if name == "detectron2":
                if isinstance(error, MissingDependencyError):  # an extra, not Detectron2
                    raise
                raise MissingDependencyError(
                    f"Detectron2 cannot be imported ({error}). Install it by its guide, "
                    "https://detectron2.readthedocs.io/en/latest/tutorials/install.html, or use "
                    "--engine torchvision of the training tool, which does not need it."
                ) from error
            installed = importlib.util.find_spec("detectron2")
            why = f" ({error})" if installed else " (Detectron2 is not installed)"
    from refbn_d2.engines import torchvision

    _say(f"Engine: torchvision's operators{why}.")
    return torchvision


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # the log is set up later, in each worker
