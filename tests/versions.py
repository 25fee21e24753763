"""Skip what old versions of torch, timm or others cannot do; the reason names the version that can."""

import importlib.metadata
import re

import pytest


def installed(package):
    """Return (major, minor) of an installed package."""
    return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))[:2]))


def needs(package, major, minor, what):
    """Return the mark of a test of `what`, which `package` can do since major.minor."""
    return pytest.mark.skipif(
        installed(package) < (major, minor), reason=f"{what} needs {package} {major}.{minor}"
    )
