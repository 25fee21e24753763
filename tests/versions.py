"""Skip what old versions of torch and others cannot do, with the version that can as the reason."""

import importlib.metadata
import re
import sys

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib  # noqa: F401
else:  # a dependency of pytest
    import tomli as tomllib  # noqa: F401


def installed(package):
    """Return (major, minor) of an installed package."""
    return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))[:2]))


def needs(package, major, minor, what):
    """Return the mark of a test of `what`, which `package` can do since major.minor."""
    return pytest.mark.skipif(
        installed(package) < (major, minor), reason=f"{what} needs {package} {major}.{minor}"
    )


FLOAT16 = pytest.param(torch.float16, marks=needs("torch", 2, 4, "float16 on the CPU"))
