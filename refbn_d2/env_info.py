"""Print what a bug report needs: `python -m refbn_d2.env_info`.

A part that fails shows its error, and the rest is printed all the same.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Line = tuple[str, str]
_MODULES = ("torchvision", "numpy", "PIL", "cv2", "fvcore", "yaml", "pycocotools", "matplotlib")
_MODULES += ("tensorboard", "safetensors", "timm", "jinja2", "scipy", "onnx", "onnxscript")


def env_info() -> str:
    """Return the report: one "name   value" line for each package, device and choice."""
    lines: list[Line] = []
    for part in (_system, _torch, _packages, _detectron2, _plugin, _engine):
        try:
            lines += part()
        except BaseException as error:  # whatever a broken package raises at import, SystemExit too
            lines.append((part.__name__.strip("_"), _shown(error)))
    text = "\n".join(f"{name:<22}{value}".rstrip() for name, value in lines)
    return f"{text}\n{_collect_env()}".rstrip()


def _shown(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _system() -> Iterator[Line]:
    yield "system", platform.platform()
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "refbn_d2", _version("refbn_d2", {})
    yield "DETECTRON2_DATASETS", os.environ.get("DETECTRON2_DATASETS", "not set: ./datasets")
    yield "DETECTRON2_ENV_MODULE", os.environ.get("DETECTRON2_ENV_MODULE", "not set")


def _torch() -> Iterator[Line]:
    import torch

    yield "torch", f"{torch.__version__} ({Path(torch.__file__).parent})"
    yield "CUDA of torch", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if not torch.cuda.is_available():
        yield "GPUs", "none"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"


def _packages() -> list[Line]:
    owners = importlib.metadata.packages_distributions()
    return [(name, _guarded(lambda name=name: _version(name, owners))) for name in _MODULES]


def _guarded(value: Callable[[], str]) -> str:
    try:
        return value()
    except BaseException as error:
        return _shown(error)


def _version(name: str, owners: dict[str, list[str]]) -> str:
    """Return the module's version, the packages that installed it, and its place."""
    module = importlib.import_module(name)
    packages = sorted(set(owners.get(name, ())))
    version = getattr(module, "__version__", "")
    if not version and packages:
        version = importlib.metadata.version(packages[0])
    if len(packages) > 1:
        return (
            f"{version} of {' and '.join(packages)}, which overwrite each other: pip uninstall all "
            "of them, then install one"
        )
    place = Path(module.__file__ or "").parent
    return f"{version} ({packages[0]}, {place})" if packages else f"{version} ({place})"


def _detectron2() -> Iterator[Line]:
    if importlib.util.find_spec("detectron2") is None:
        yield "Detectron2", "not installed"
        return
    import detectron2

    yield "Detectron2", f"{detectron2.__version__} ({Path(detectron2.__file__).parent})"


def _plugin() -> Iterator[Line]:
    if importlib.util.find_spec("detectron2") is None:
        yield "RefBN in Detectron2", "not registered: Detectron2 is not installed"
        return
    from refbn_d2 import plugin

    plugin.register()
    yield "RefBN in Detectron2", "registered"


def _engine() -> Iterator[Line]:
    from refbn_d2.engines.select import select_engine

    with contextlib.redirect_stderr(io.StringIO()) as said:  # the choice, and why
        select_engine("auto")
    yield "--engine auto", said.getvalue().splitlines()[-1]


def _collect_env() -> str:
    """Return Detectron2's own report, or why there is none; "" if Detectron2 is not installed."""
    try:
        if importlib.util.find_spec("detectron2") is None:
            return ""
        from detectron2.utils.collect_env import collect_env_info

        return f"\nDetectron2's collect_env:\n{collect_env_info()}"
    except BaseException as error:
        return f"\nDetectron2's collect_env: {_shown(error)}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # for --help
    print(env_info())


if __name__ == "__main__":
    main()
