"""Warn of two OpenCV packages: they install the same files, each over the other's."""

import functools
import importlib.metadata
import logging

logger = logging.getLogger(__name__)

PACKAGES = (
    *("opencv-python", "opencv-python-headless"),
    *("opencv-contrib-python", "opencv-contrib-python-headless"),
)


@functools.cache
def warn_of_two_packages() -> None:
    """Log a warning, once, if several packages of OpenCV are installed."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    found = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    if len(found) > 1:
        names = [text.partition(" ")[0] for text in found]
        logger.warning(
            "%s are installed at once, and each overwrites the files of the other: keep one. "
            "`pip uninstall %s`, then install the one that you need.",
            " and ".join(found), " ".join(names),
        )  # fmt: skip
