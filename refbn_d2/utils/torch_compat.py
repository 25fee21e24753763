"""Fill in for what torch has gained since 2.0; each function says when it can be removed.

A function has the name and the arguments of what it replaces.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import ProcessContext

from refbn_d2.utils.errors import MissingDependencyError

OLDEST = (2, 0)


def torch_version() -> tuple[int, int]:
    """Return torch's (major, minor)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def check_torch() -> None:
    """Check that torch is not older than this package supports.

    Raises:
        MissingDependencyError: it is older.
    """
    if torch_version() < OLDEST:
        oldest = "{}.{}".format(*OLDEST)
        raise MissingDependencyError(
            f"refbn_d2 needs torch {oldest} or newer, and torch {torch.__version__} is installed "
            f"({torch.__file__}); install `torch>={oldest}` and the torchvision that belongs to it."
        )


def need_torch(what: str, major: int, minor: int) -> None:
    """Check that torch is new enough for `what`, which opens the message.

    Raises:
        MissingDependencyError: it is older than `major`.`minor`.
    """
    if torch_version() < (major, minor):
        raise MissingDependencyError(
            f"{what} needs torch {major}.{minor} or newer, and torch {torch.__version__} is "
            "installed."
        )


check_torch()


def is_compiling() -> bool:
    """Return whether torch.compile or torch.export traces: torch.compiler.is_compiling (2.3)."""
    return _is_compiling()


# Remove with torch < 2.3. torch.compile makes torch._utils.is_compiling True before 2.3.
if hasattr(torch, "compiler") and hasattr(torch.compiler, "is_compiling"):
    _is_compiling = torch.compiler.is_compiling
else:
    from torch._utils import is_compiling as _is_compiling


GradScaler = Any  # torch.amp.GradScaler, once torch < 2.3 is gone


def grad_scaler(device: str, enabled: bool = True, **options) -> GradScaler:
    """Return torch.amp.GradScaler(device, enabled=enabled, **options) (2.3).

    Raises:
        MissingDependencyError: it is enabled on the CPU, which needs torch 2.3.
    """
    if hasattr(torch.amp, "GradScaler"):  # remove the rest with torch < 2.3
        return torch.amp.GradScaler(device, enabled=enabled, **options)
    if enabled and device == "cpu":
        need_torch("float16 on the CPU", 2, 3)
    return torch.cuda.amp.GradScaler(enabled=enabled, **options)


def get_total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors together: torch.nn.utils.get_total_norm (2.7)."""
    if hasattr(nn.utils, "get_total_norm"):  # remove the rest with torch < 2.7
        return nn.utils.get_total_norm(tensors)
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)


def itemsize_of(dtype: torch.dtype) -> int:
    """Return dtype.itemsize (2.1), the bytes of an element."""
    return torch.empty((), dtype=dtype).element_size()


def safe_globals(names: list) -> AbstractContextManager:
    """Return torch.serialization.safe_globals(names) (2.6), or do nothing: fewer files are read."""
    if torch_version() < (2, 6):
        return nullcontext()
    return torch.serialization.safe_globals(names)


def register_forward_hook(module: nn.Module, hook: Callable, always_call: bool) -> None:
    """Call module.register_forward_hook(hook, always_call=always_call) (2.1).

    Before torch 2.1 the hook is not called after a forward pass that has raised.
    """
    options = {"always_call": always_call} if torch_version() >= (2, 1) else {}
    module.register_forward_hook(hook, **options)


def join(context: ProcessContext, grace_period: float) -> bool:
    """Call context.join(grace_period=grace_period) (2.6): the time to end after another's error.

    Before torch 2.6 a failure of one process ends the others at once.
    """
    options = {"grace_period": grace_period} if torch_version() >= (2, 6) else {}
    return context.join(**options)


def destroy_process_group() -> None:
    """Call torch.distributed.destroy_process_group() (2.9).

    Before pytorch#154976 (June 2025) torch holds the interpreter's lock while it waits for its
    threads, of which one may need the lock to free the tensors of the last collective. Then they
    wait for each other forever.
    """
    if torch_version() < (2, 9):
        time.sleep(0.1)  # without the lock
    dist.destroy_process_group()
