"""Which engine runs a config: Detectron2, or torchvision's operators where it is not installed."""

import logging
from types import ModuleType

logger = logging.getLogger(__name__)

ENGINES = ("auto", "detectron2", "torchvision")


def select(name: str) -> ModuleType:
    """The engine's module, which has `run(args)`; "auto" is Detectron2 where it imports.

    Raises:
        ImportError: "detectron2", and it cannot be imported.
    """
    if name != "torchvision":
        try:
            from refbn_d2.engines import detectron2

            logger.info("Engine: Detectron2.")
            return detectron2
        except ImportError as error:  # not installed, or not one that RefBN can be registered with
            if name == "detectron2":
                raise ImportError(
                    f"--engine detectron2: Detectron2 cannot be imported ({error}). Its guide says "
                    "how to install it: https://detectron2.readthedocs.io/en/latest/tutorials/"
                    "install.html; --engine torchvision needs none."
                ) from error
    from refbn_d2.engines import torchvision

    logger.info("Engine: torchvision's operators.")
    return torchvision
