"""Checkpoint files: written whole or not at all, read without running them, loaded loudly.

Formats: `.pth` and `.pt` (torch.save); `.pkl` (Detectron2's, {"model": {name: array}, "__author__":
...}); `.safetensors`.
"""

import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from refbn_d2.checkpoint.unpickling import holds_code, not_a_checkpoint, read_pickle
from refbn_d2.utils.errors import CheckpointError, listing
from refbn_d2.utils.file_io import written_whole

logger = logging.getLogger(__name__)


# Where training loops put the weights, in the order of preference; the others stay in the rest.
WRAPPERS = ("model", "state_dict", "model_state", "model_ema", "state_dict_ema", "ema")
_PARALLEL_PREFIX = re.compile(r"(module\.|_orig_mod\.)+")


_LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how torch < 1.6 begins a file


class Caffe2Checkpoint(CheckpointError):
    """A file in Caffe2's format, which Detectron2 reads."""


def save_checkpoint(obj: dict, path: str | os.PathLike) -> None:
    """Write `obj` to `path`: by torch.save, for `.pkl` in Detectron2's format, or `.safetensors`.

    The file appears whole, or what stood there stays. Folders are made. For `.pkl`, tensors become
    arrays, and the rest must be plain containers, or `load_checkpoint` refuses it. A `.safetensors`
    holds a state dict and nothing else.

    Raises:
        ValueError: `obj` has no "model" for a .pkl, or a bfloat16 tensor; or is not a state dict
            for a .safetensors.
    """
    path = Path(path)
    write = torch.save
    if path.suffix == ".pkl":
        if "model" not in obj:
            raise ValueError(f'{path}: Detectron2\'s .pkl format needs the weights under "model".')
        obj, write = _arrays(path, {"__author__": "refbn_d2", **obj}), pickle.dump
    elif path.suffix == ".safetensors":
        others = [name for name, value in obj.items() if not isinstance(value, Tensor)]
        if others:
            raise ValueError(f"{path}: .safetensors holds tensors alone, not {listing(others)}.")
        write = _write_safetensors
    with written_whole(path) as file:
        write(obj, file)


def _write_safetensors(state: dict[str, Tensor], file: BinaryIO) -> None:
    # each in a memory of its own: the format has no views
    state = {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    file.write(safetensors.torch.save(state, {"format": "pt"}))


def _arrays(path: Path, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _arrays(path, inner) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bfloat16:
        raise ValueError(
            f"{path}: numpy has no bfloat16, and .pkl holds its arrays: write a .pth instead."
        )
    return value.detach().cpu().numpy()


def file_format(path: str | os.PathLike) -> str:
    """ "torch" (torch.save), "pickle" or "safetensors", as the first bytes (or the suffix) tell

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint file.")
    with open(path, "rb") as file:
        head = file.read(len(_LEGACY_TORCH))
    if not head:
        raise CheckpointError(f"{path} is empty: a copy or a download was cut off? Fetch it again.")
    if path.suffix == ".safetensors":
        return "safetensors"
    return "torch" if head.startswith(b"PK") or head == _LEGACY_TORCH else "pickle"


def load_checkpoint(
    path: str | os.PathLike, map_location: str | torch.device = "cpu", key: str | None = None
) -> dict:
    """{"model": {name: tensor}, ...what else the file holds, as it is}

    The format is told by the content, whatever the suffix (but for .safetensors). The weights may
    stand under "model", "state_dict" and the like, or be the whole file; "module." before all names
    is dropped. Nothing in the file is run: it may hold tensors, arrays and plain containers alone.

    Args:
        key: where in the file the weights stand, instead of the first known name.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is empty, cut off or no checkpoint; holds code, or no tensors; is of a
            format that is not read (Caffe2).
    """
    path = Path(path)
    form = file_format(path)
    if form == "safetensors":
        data = _read_safetensors(path)
    elif form == "torch":
        data = _read_torch(path, map_location)
    else:
        data = read_pickle(path)
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a dict of tensors.")
    if key is not None and not isinstance(data.get(key), Mapping):
        raise CheckpointError(
            f"{path} has no weights under {key!r}; it has {listing(map(str, data), 8)}."
        )
    wrapper = key or next((key for key in WRAPPERS if isinstance(data.get(key), Mapping)), None)
    rest = {} if wrapper is None else {key: data[key] for key in data if key != wrapper}
    weights = data if wrapper is None else data[wrapper]
    _refuse_caffe2(path, data)
    return {**rest, "model": _tensors(path, weights, map_location)}


def _read_torch(path: Path, map_location: str | torch.device) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # by the content: unpickling, zip and runtime errors alike
        text = str(error)
        if "TorchScript" in text:
            raise CheckpointError(
                f"{path} is a TorchScript program, not a checkpoint: save the model's state_dict()."
            ) from error
        if code := re.search(r"GLOBAL (\S+)", text):
            raise holds_code(path, code[1]) from error
        raise not_a_checkpoint(path, text) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise not_a_checkpoint(path, str(error)) from error


def _refuse_caffe2(path: Path, data: Mapping) -> None:
    names = [name for name in data if isinstance(name, str)]
    if "blobs" in data or any(re.fullmatch(r"(conv1|res\w+)_w", name) for name in names):
        raise Caffe2Checkpoint(
            f"{path} is in Caffe2's format (MSRA's and Detectron's weights), which is not read "
            "here: use Detectron2 for it, or a checkpoint of torchvision's or Detectron2's."
        )


def _tensors(path: Path, weights: Mapping, map_location: str | torch.device) -> dict[str, Tensor]:
    tensors, dropped = {}, []
    for name, value in weights.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.tensor(value)
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value.detach().to(map_location)
        else:
            dropped.append(str(name))
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors under {', '.join(WRAPPERS[:2])} or at its top; it has "
            f"{listing(map(str, weights), 8) or 'nothing'}."
        )
    if dropped:
        logger.warning("%s: not tensors, and ignored: %s", path, listing(dropped))
    names = [name for name in tensors if name != "n_averaged"]  # of torch's AveragedModel
    if names and all(_PARALLEL_PREFIX.match(name) for name in names):
        tensors = {_PARALLEL_PREFIX.sub("", name, count=1): tensors[name] for name in names}
    return tensors
