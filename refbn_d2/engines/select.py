"""Which engine runs a config: Detectron2, or torchvision's operators where it is not installed."""

import importlib.util
import logging
from types import ModuleType

logger = logging.getLogger(__name__)

ENGINES = ("auto", "detectron2", "torchvision")


def select(name: str) -> ModuleType:
    """The engine's module, which has `run(args)`; "auto" is torchvision, so far.

    Raises:
        NotImplementedError: "detectron2", which this package does not drive yet.
    """
    if name == "detectron2":
        raise NotImplementedError(
            "--engine detectron2 is not there yet; use --engine torchvision (the default)."
        )
    if name == "auto" and importlib.util.find_spec("detectron2"):
        logger.warning("Detectron2 is installed, but not driven yet; using torchvision.")
    from refbn_d2.engines import torchvision

    return torchvision
