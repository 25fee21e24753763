"""Read pickles of numpy arrays without running their code.

A pickle is a program: it names functions and calls them on its own bytes. numpy's functions are
unsafe: `numpy.ndarray(shape, "O", buffer)` turns any address into an object. So a pickle gets
stand-ins instead. They build only arrays of booleans and numbers, from bytes that the file holds.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refbn_d2.utils.errors import CheckpointError

_BYTE_ORDERS = ("<", ">", "=", "|")
_MAX_DEPTH = 100  # of nested tuples
_MAX_SHARING = 10  # parts of a tuple, repeated ones included, per byte of the file
_MUTATORS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


class Refused(Exception):
    """A pickle asks for something that no checkpoint needs; the message names it."""


class Oversized(Exception):
    """A file declares more than it holds; the message says what."""


class Function:
    """A function that a pickle can only call."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __setstate__(self, state: Any) -> None:
        raise Refused("a change of a function")


class Name:
    """A name that a pickle can only pass on as an argument."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        raise Refused(f"a call of {self.name}")

    def __setstate__(self, state: Any) -> None:
        raise Refused(f"a change of {self.name}")


class Namespace(Mapping):
    """A stand-in for argparse.Namespace, which training scripts save with the weights."""

    __slots__ = ("_values",)

    def __new__(cls) -> "Namespace":
        self = super().__new__(cls)
        self._values = {}
        return self

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise Refused("a Namespace without a dict")
        self._values = state  # not copied, because a pickle can repeat this a million times

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class PlainDict(dict):
    """A stand-in for OrderedDict, whose instance attributes can hide its methods."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        # A state_dict() of torch has _metadata.
        if not isinstance(state, dict) or state.keys() - {"_metadata"}:
            raise Refused("an OrderedDict with attributes")


class _Dtype:
    """A stand-in for numpy.dtype: a boolean or a number, and its byte order."""

    __slots__ = ("dtype",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, code: str, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise Refused(f"numpy.dtype {code!r:.40}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, *parts = state
        if order not in _BYTE_ORDERS or any(part is not None for part in parts[:3]):
            raise Refused("numpy.dtype with fields")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """A stand-in for the array that `_reconstruct` makes and the next instruction fills."""

    __slots__ = ("_build", "array")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, build: Callable[..., np.ndarray]) -> None:
        self._build = build
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.array = self._build(data, dtype, shape, "F" if fortran else "C")


_NDARRAY = Name("numpy.ndarray")


class _ArrayUnpickler(pickle.Unpickler):
    """Read numpy arrays and plain containers, and import nothing."""

    def __init__(self, data: bytes) -> None:
        # Python 2 wrote some of Detectron2's files, which it too reads as latin1.
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._left = 2 * len(data)  # bytes that may be copied: in decoding, and into an array
        self._known = {
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): Function(_Dtype),
            ("collections", "OrderedDict"): Function(self._dict),
            ("argparse", "Namespace"): Namespace,
            ("builtins", "set"): Function(self._set),
            ("__builtin__", "set"): Function(self._set),
            # How protocols below 3 write bytes, and b"".
            ("_codecs", "encode"): Function(self._encode),
            ("__builtin__", "bytes"): Function(bytes_of_nothing),
            ("builtins", "bytes"): Function(bytes_of_nothing),
        }
        for core in ("core", "_core"):  # in numpy 1 and in numpy 2
            self._known |= {
                (f"numpy.{core}.multiarray", "_reconstruct"): Function(self._reconstruct),
                (f"numpy.{core}.multiarray", "scalar"): Function(self._scalar),
                (f"numpy.{core}.numeric", "_frombuffer"): Function(self._from_buffer),
            }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise Refused(f"{module}.{name}")
        return self._known[module, name]

    def _take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise Oversized("its parts are repeated so often that they would fill the memory")

    def _dict(self, pairs: Any = ()) -> PlainDict:
        self._take(len(pairs))
        return PlainDict(pairs)

    def _set(self, items: Any = ()) -> set:
        self._take(len(items))
        return set(items)

    def _encode(self, text: str, codec: str) -> bytes:
        self._take(len(text))
        return text.encode("latin1")

    def _reconstruct(self, kind: Any, shape: Any, code: Any) -> _Array:
        if kind is not _NDARRAY:
            raise Refused("a numpy array of another class")
        return _Array(self._array)

    def _scalar(self, dtype: Any, data: Any = b"") -> Any:
        return self._array(data, dtype, ())[()]

    def _from_buffer(
        self, data: Any, dtype: Any, shape: Any, order: Any, axes: tuple | None = None
    ) -> _Array:
        filled = _Array(self._array)
        array = self._array(data, dtype, shape, "F" if order == "F" else "C")
        filled.array = array if axes is None else array.transpose(axes)
        return filled

    def _array(
        self, data: Any, dtype: Any, shape: Any, order: Literal["C", "F"] = "C"
    ) -> np.ndarray:
        if not isinstance(dtype, _Dtype):
            raise Refused("numpy arrays of objects")
        if isinstance(data, str):  # Python 2's bytes
            data = data.encode("latin1")
        if not isinstance(data, bytes | bytearray):
            raise Refused("numpy arrays of objects")
        if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
            raise Refused(f"a numpy array of shape {type(shape).__name__}")
        declared = math.prod(shape) * dtype.dtype.itemsize
        if declared != len(data):
            raise Oversized(f"an array of {declared} bytes, of which it holds {len(data)}")
        self._take(len(data))
        return np.ndarray(shape, dtype.dtype, bytes(data), order=order).copy(order="K")


def bytes_of_nothing() -> bytes:
    """Return b""; the real bytes(6_000_000_000) would fill the memory."""
    return b""


def read_pickle(path: Path) -> Any:
    """Return what the pickle at `path` holds: arrays and plain containers.

    Raises:
        CheckpointError: it asks for anything else, declares more than it holds, or is not a pickle.
    """
    try:
        data = path.read_bytes()
        check_instructions(data)
        return _plain(_ArrayUnpickler(data).load(), {})
    except Refused as refused:
        raise holds_code(path, str(refused)) from None
    except Oversized as oversized:
        raise declares_too_much(path, str(oversized)) from None
    except Exception as error:  # bytes that are not a pickle can raise anything
        raise not_a_checkpoint(path, str(error)) from error


def check_instructions(data: bytes, start: int = 0) -> int:
    """Check the pickle that begins at `start` without running it, and return where it ends.

    Python's unpickler takes the memory that an instruction declares before it reads the data. It
    also hashes tuples. A tuple that is nested a million times crashes the process. A tuple that
    holds the same tuple twice, and so on for 60 levels, takes forever to hash.

    Raises:
        Oversized: an instruction declares more than the file holds, or there is such a tuple.
        ValueError, IndexError, KeyError: it is not a pickle.
    """
    file = io.BytesIO(data)
    file.seek(start)
    stack: list[tuple[int, int] | None] = []  # depth and size of each object; None is a mark
    memo: dict[int, tuple[int, int] | None] = {}
    argument: Any
    for instruction, argument, _ in pickletools.genops(file):
        name = instruction.name
        if "PUT" in name and argument > len(data):  # the unpickler grows its table to this index
            raise Oversized(f"{name} {argument} in {len(data)} bytes")
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[int(argument)])
        elif name in ("MARK", "DUP"):
            stack.append(None if name == "MARK" else stack[-1])
        else:
            parts = _popped(stack, instruction)
            if name.startswith("TUPLE") or name == "FROZENSET":
                depth = 1 + max((part[0] for part in parts), default=0)
                size = 1 + sum(part[1] for part in parts)
                if depth > _MAX_DEPTH or size > _MAX_SHARING * len(data):
                    raise Oversized(f"a tuple of {size} parts, {depth} deep")
                stack.append((depth, size))
            elif name in _MUTATORS:
                stack.append(parts[0])
            else:  # a new object, which is not hashed by its content
                stack += [(1, 1)] * len(instruction.stack_after)
    return file.tell()


def _popped(stack: list, instruction: pickletools.OpcodeInfo) -> list[tuple[int, int]]:
    """Pop from `stack` what `instruction` pops, down to a mark if it asks for one."""
    before, parts = instruction.stack_before, []
    count = len(before)
    if pickletools.markobject in before:
        while (part := stack.pop()) is not None:
            parts.append(part)
        count = before.index(pickletools.markobject)
    for _ in range(count):
        if (part := stack.pop()) is None:
            raise ValueError("a mark instead of an object")
        parts.append(part)
    return parts[::-1]


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Return `value` with its stand-ins replaced by arrays, dtypes and dicts.

    `done` holds the results by id, so that shared objects stay shared and cycles end.
    """
    if isinstance(value, _Array):
        if value.array is None:
            raise ValueError("an array without content")
        return value.array
    if isinstance(value, _Dtype):
        return value.dtype
    if isinstance(value, Name | Function) or isinstance(value, type):
        raise Refused("a name that is never used")
    if isinstance(value, Namespace):
        return _plain(value._values, done)
    if id(value) in done or not isinstance(value, dict | list | tuple):
        return done.get(id(value), value)
    if isinstance(value, tuple):
        done[id(value)] = tuple(_plain(item, done) for item in value)
    elif isinstance(value, list):
        items: list[Any] = []
        done[id(value)] = items
        items.extend(_plain(item, done) for item in value)
    else:
        pairs: dict[Any, Any] = {}
        done[id(value)] = pairs
        pairs.update((key, _plain(item, done)) for key, item in value.items())
    return done[id(value)]


def holds_code(path: Path, what: str) -> CheckpointError:
    """Return the error for a file that would run code; `what` names the code."""
    return CheckpointError(
        f"{path} holds code or objects ({what}). It was refused, and none of it was run. A "
        "checkpoint may hold only tensors, arrays and plain containers: save a state_dict()."
    )


def declares_too_much(path: Path, what: str) -> CheckpointError:
    """Return the error for a file that declares more than it holds; `what` says what."""
    return CheckpointError(
        f"{path} declares more data than it holds ({what}). It was refused before it took any "
        "memory. Copy or download it again, or save it again."
    )


def not_a_checkpoint(path: Path, why: str) -> CheckpointError:
    """Return the error for a file that cannot be read; `why` is the reader's error."""
    lines = why.strip().splitlines()
    return CheckpointError(
        f"{path} is cut off or not a checkpoint ({lines[-1] if lines else 'unreadable'}). Download "
        "it again, and check that it is not a web page or a Git LFS pointer."
    )
