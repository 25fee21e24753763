"""Name the pip command when an optional package is missing: `pip install "refbn_d2[train]"`."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from refbn_d2.utils.errors import MissingDependencyError

# The modules of the extras in pyproject.toml. Any other failing import is a bug, and stays one.
OPTIONAL = (
    *("torchvision", "pycocotools", "cv2", "PIL", "matplotlib", "tensorboard", "tqdm"),
    *("safetensors", "timm", "jinja2", "scipy", "onnx", "onnxscript", "onnxruntime"),
)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn the failing import of an optional package into an error that says what to install.

        with needs("pretrain"):
            import timm

    Raises:
        MissingDependencyError: the package is missing or broken, or it does not match torch.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in OPTIONAL:
            raise
        raise _missing(module, extra) from error
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        if isinstance(error, MissingDependencyError) or module not in OPTIONAL:
            raise
        raise MissingDependencyError(
            f"{module} is installed, but cannot be imported ({error}): install it again"
            + (" as opencv-python-headless, which needs no display" if module == "cv2" else "")
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):  # "operator torchvision::nms does not exist"
            raise
        raise MissingDependencyError(
            f"torchvision does not match torch ({error}): install the two of one release with one "
            "command, pip install --upgrade torch torchvision"
        ) from error


def require(extra: str, *modules: str) -> None:
    """Check that modules are installed, without their import: for the commands that start others.

    Raises:
        MissingDependencyError: one of them is missing.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise _missing(module, extra)


def _missing(module: str, extra: str) -> MissingDependencyError:
    return MissingDependencyError(f'{module} is not installed: pip install "refbn_d2[{extra}]"')
