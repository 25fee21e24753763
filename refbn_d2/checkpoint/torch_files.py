"""Read files of torch.save, after a check of the sizes that they declare.

torch.load(weights_only=True) runs no code, but its unpickler calls the functions on its list. Among
them are `bytearray(6_000_000_000)` and `FloatTensor(64)`, which is 64 numbers of uninitialized
memory. So another unpickler reads the pickle first. It builds nothing, and compares every declared
size with the file's.
"""

import io
import math
import pickle
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path
from typing import Any

import torch

from refbn_d2.checkpoint.unpickling import (
    Function,
    Name,
    Namespace,
    Oversized,
    PlainDict,
    Refused,
    check_instructions,
    declares_too_much,
    holds_code,
    not_a_checkpoint,
)
from refbn_d2.utils.errors import CheckpointError
from refbn_d2.utils.torch_compat import itemsize_of, safe_globals, torch_version

LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # begins a file of torch < 1.6
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the keys of its storages

# Bytes per element of a storage with this name; to ask the classes raises a warning.
_ITEMSIZES = {"ComplexDouble": 16, "ComplexFloat": 8, "Double": 8, "Long": 8}
_ITEMSIZES |= dict.fromkeys(("Float", "Int", "QInt32"), 4)
_ITEMSIZES |= dict.fromkeys(("Half", "BFloat16", "Short"), 2)
_ITEMSIZES |= dict.fromkeys(("Char", "Byte", "Bool", "QInt8", "QUInt8", "Untyped"), 1)
_ITEMSIZES |= dict.fromkeys(("QUInt4x2", "QUInt2x4"), 1)


# torch 2.6 reads these, and what else it reads older ones do too; remove with torch < 2.6.
_HARMLESS = {"argparse.Namespace", "builtins.set", "__builtin__.set", "collections.Counter"}
_HARMLESS |= {"torch.device", "torch.bfloat16", "torch.bool", "torch.uint8", "_codecs.encode"}
_HARMLESS |= {"torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_qtensor"}


def too_new(path: Path, what: str) -> CheckpointError:
    """Return the error for a file with an object that this torch does not read; `what` names it."""
    return CheckpointError(
        f"{path} holds {what}, which torch reads safely since 2.6, and here is torch "
        f"{torch.__version__}. Save only the state_dict(), or use a newer torch."
    )


def read_torch(path: Path, map_location: str | torch.device) -> Any:
    """Return what torch.save wrote to `path`, without running code from the file.

    Raises:
        CheckpointError: the file holds code, declares more than it holds, is cut off, or is a
            TorchScript program.
    """
    try:
        _check_sizes(path)
        with safe_globals([(Namespace, "argparse.Namespace")]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Refused as refused:
        raise holds_code(path, str(refused)) from None
    except Oversized as oversized:
        raise declares_too_much(path, str(oversized)) from None
    except Exception as error:  # the content decides: unpickling, zip or runtime errors
        text = str(error)
        if code := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", text):
            if torch_version() < (2, 6) and code[1] in _HARMLESS:
                raise too_new(path, code[1]) from error
            raise holds_code(path, code[1]) from error
        raise not_a_checkpoint(path, text) from error


def _check_sizes(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # torch's rule
    if not is_zip:
        data, end = path.read_bytes(), 0
        for _ in range(_LEGACY_PICKLES):
            start, end = end, check_instructions(data, end)
            _Sizes(data[start:end], size).load()
        return
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise CheckpointError(
                f"{path} is a TorchScript program, not a checkpoint: save the model's state_dict()."
            )
        unpacked = sum(record.file_size for record in archive.infolist())
        if unpacked > size:
            raise Oversized(f"an archive of {size} bytes that unpacks to {unpacked}")
        for record in archive.infolist():
            if record.filename.lower().endswith("data.pkl"):  # torch finds DATA.PKL too
                data = archive.read(record)
                check_instructions(data)
                _Sizes(data, size).load()


class _Anything:
    """A stand-in for every object that takes hardly any memory."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Storage:
    """A storage in the file, of `numel` elements of `itemsize` bytes."""

    def __init__(self, numel: int, itemsize: int) -> None:
        self.numel, self.itemsize = numel, itemsize


class _Sizes(pickle.Unpickler):
    """Read torch's pickles without building anything; raise if a declared size is impossible."""

    def __init__(self, data: bytes, file_size: int) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._file_size = file_size
        self._storages: dict[str, int] = {}  # key -> bytes
        self._left = file_size  # elements that may still be copied between containers
        copies = ("builtins.bytearray", "builtins.set", "collections.Counter", "_codecs.encode")
        self._known: dict[str, Any] = {
            **dict.fromkeys((*copies, "collections.OrderedDict"), Function(self._copy)),
            "argparse.Namespace": Namespace,
            "torch._tensor._rebuild_from_type_v2": Function(lambda run, kind, args, _: run(*args)),
            "torch._utils._rebuild_tensor": Function(self._tensor),
            "torch._utils._rebuild_tensor_v2": Function(self._tensor),
            "torch._utils._rebuild_tensor_v3": Function(self._tensor_v3),
            "torch._utils._rebuild_qtensor": Function(self._tensor),
        }

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (module, name))  # as torch reads them
        full = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name.endswith(("Tensor", "Storage")):
            return Name(full)  # cannot be called
        return self._known.get(full, _Anything)

    def _copy(self, content: Any = (), *codec: Any) -> PlainDict:
        if isinstance(content, int):
            raise Oversized(f"{content} bytes of nothing")
        self._left -= len(content)
        if self._left < 0:
            raise Oversized("its parts are repeated so often that they would fill the memory")
        return PlainDict()

    def persistent_load(self, pid: tuple) -> _Storage:
        _, kind, key, _, numel, *_ = pid
        itemsize = _ITEMSIZES[kind.name.rpartition(".")[2].removesuffix("Storage")]
        if type(numel) is not int or numel < 0 or not isinstance(key, str):
            raise ValueError("a storage without a size")
        self._storages[key] = max(numel * itemsize, self._storages.get(key, 0))
        declared = sum(self._storages.values())
        if declared > self._file_size:
            raise Oversized(f"{declared} bytes of tensors in {self._file_size}")
        return _Storage(numel, itemsize)

    def _tensor_v3(
        self, storage: _Storage, offset: int, size: tuple, stride: tuple,
        requires_grad: Any, hooks: Any, dtype: Name, *more: Any,
    ) -> _Anything:  # fmt: skip
        itemsize = itemsize_of(getattr(torch, dtype.name.rpartition(".")[2]))
        return self._tensor(_Storage(storage.numel // itemsize, itemsize), offset, size, stride)

    def _tensor(
        self, storage: _Storage, offset: int, size: tuple, stride: tuple, *more: Any
    ) -> _Anything:
        numbers = (offset, *size, *stride)
        if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
            raise ValueError("a tensor without a shape")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        declared = count * storage.itemsize
        if count and (last >= storage.numel or declared > self._file_size):
            held = storage.numel * storage.itemsize
            raise Oversized(f"a tensor of {declared} bytes, shape {tuple(size)}, in {held}")
        return _Anything()
