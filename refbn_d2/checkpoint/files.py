"""Write checkpoint files whole or not at all, and read them without running code from them.

Formats: `.pth` and `.pt` (torch.save); `.pkl` (Detectron2's, {"model": {name: array}, "__author__":
...}); `.safetensors`.
"""

import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from refbn_d2.checkpoint.tensors import check_weight, to_tensor
from refbn_d2.checkpoint.torch_files import LEGACY_MAGIC, read_torch
from refbn_d2.checkpoint.unpickling import declares_too_much, not_a_checkpoint, read_pickle
from refbn_d2.utils.errors import CheckpointError, listing
from refbn_d2.utils.extras import needs
from refbn_d2.utils.file_io import written_whole

logger = logging.getLogger(__name__)


# Keys under which training loops store the weights. The first one present holds the weights.
WRAPPERS = (
    *("model", "state_dict", "model_state", "model_state_dict", "params", "weights"),
    *("model_ema", "state_dict_ema", "params_ema", "ema"),
)
_PARALLEL_PREFIX = re.compile(r"(module\.|_orig_mod\.)+")
_MAX_SHARING = 8  # bytes of weights per byte of the file: weights can share a storage


def save_checkpoint(obj: dict, path: str | os.PathLike) -> None:
    """Write `obj` to `path`: Detectron2's format for `.pkl`, `.safetensors`, else torch.save's.

    The file appears whole, or an old file stays as it was. Folders are created. In a `.pkl`,
    tensors become arrays, and everything else must be plain containers, or `load_checkpoint`
    refuses the file. A `.safetensors` holds only a state dict.

    Raises:
        ValueError: for a .pkl, `obj` has no "model" or holds a bfloat16 tensor; for a .safetensors,
            `obj` is not a state dict.
    """
    path = Path(path)
    write: Callable[[Any, BinaryIO], object] = torch.save
    if path.suffix == ".pkl":
        if "model" not in obj:
            raise ValueError(f'{path}: a .pkl needs the weights under "model": put them there.')
        obj, write = _arrays(path, {"__author__": "refbn_d2", **obj}), pickle.dump
    elif path.suffix == ".safetensors":
        others = [name for name, value in obj.items() if not isinstance(value, Tensor)]
        if others:
            raise ValueError(
                f"{path}: .safetensors can hold only tensors, not {listing(others)}: leave that "
                "out, or write a .pth."
            )
        write = _write_safetensors
    with written_whole(path) as file:
        write(obj, file)


def _write_safetensors(state: dict[str, Tensor], file: BinaryIO) -> None:
    # The format has no views: each tensor gets memory of its own.
    state = {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    with needs("train"):
        import safetensors.torch
    file.write(safetensors.torch.save(state, {"format": "pt"}))


def _arrays(path: Path, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _arrays(path, inner) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bfloat16:
        raise ValueError(
            f"{path}: a .pkl holds numpy arrays, and numpy has no bfloat16: write a .pth instead."
        )
    return value.detach().cpu().numpy()


def file_format(path: str | os.PathLike) -> str:
    """Infer "torch" (torch.save), "pickle" or "safetensors" from the first bytes or the suffix.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint file. Check the path.")
    with open(path, "rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if not head:
        raise CheckpointError(f"{path} is empty: copy or download it again.")
    if path.suffix == ".safetensors":
        return "safetensors"
    return "torch" if head.startswith(b"PK") or head == LEGACY_MAGIC else "pickle"


def load_checkpoint(
    path: str | os.PathLike,
    map_location: str | torch.device = "cpu",
    key: str | None = None,
    caffe2: bool = False,
) -> dict:
    """Return {"model": {name: tensor}, ...everything else in the file, unchanged}.

    The format is inferred from the content, not from the suffix (except for .safetensors). The
    weights may be stored under "model", "state_dict" and the like, or be the whole file. A
    "module." before all names is dropped. Nothing in the file is run: it may hold only tensors,
    arrays, plain containers and argparse's Namespaces, which become dicts.

    Args:
        key: where in the file the weights are stored, instead of the first known name; or, if the
            file holds several models, the beginning of one model's names, such as "encoder_q".
        caffe2: also read Caffe2's format; the result is marked for Detectron2, which converts it.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is empty, cut off or not a checkpoint; holds code, no tensors, or
            tensors that cannot be weights (complex, sparse, NaN, ...); declares more than it holds;
            or has a format that is not read (Caffe2).
    """
    path = Path(path)
    form = file_format(path)
    data: Any
    if form == "safetensors":
        data = _read_safetensors(path)
    elif form == "torch":
        data = read_torch(path, map_location)
    else:
        data = read_pickle(path)
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds a {type(data).__name__}, not a dict of tensors: save a state_dict()."
        )
    if _is_caffe2(data):
        if not caffe2:
            raise CheckpointError(
                f"{path} is in Caffe2's format (MSRA's and Detectron's weights), which only the "
                "Detectron2 engine reads: use it, or a checkpoint of torchvision's or Detectron2's."
            )
        blobs = data.get("blobs", data)
        blobs = {n: v for n, v in blobs.items() if not str(n).endswith("_momentum")}
        data = {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
    found = isinstance(data.get(key), dict)
    wrapper = key if found else next((k for k in WRAPPERS if isinstance(data.get(k), dict)), None)
    rest = {} if wrapper is None else {key: data[key] for key in data if key != wrapper}
    weights = data if wrapper is None else data[wrapper]
    if key is not None and not found:
        weights = _named(path, data, weights, key)
    return {**rest, "model": _tensors(path, weights, map_location)}


def _named(path: Path, data: dict, weights: dict, key: str) -> dict:
    """Return the items of `weights` whose names begin with `key`, under names without it."""
    start = key.rstrip(".") + "."
    prefixes = (start, f"module.{start}")
    chosen = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        for prefix in prefixes
        if isinstance(name, str) and name.startswith(prefix)
    }
    if not chosen:
        raise CheckpointError(
            f"{path} has no weights under {key!r}. Choose from: {listing(map(_shown, data), 8)}."
        )
    return chosen


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with needs("train"):
        import safetensors.torch
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # a broken header can raise anything
        raise not_a_checkpoint(path, str(error)) from error


def _is_caffe2(data: dict) -> bool:
    names = [name for name in data if isinstance(name, str)]
    blobs = isinstance(data.get("blobs"), dict)
    return blobs or any(re.fullmatch(r"(conv1|res\w+)_w", name) for name in names)


def _tensors(path: Path, weights: dict, map_location: str | torch.device) -> dict[str, Tensor]:
    tensors, dropped = {}, []
    for name, value in dict.items(weights):
        if isinstance(name, str) and isinstance(value, np.ndarray):
            value = to_tensor(path, name, value)
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value.detach()
        else:
            dropped.append(_shown(name))
    if not tensors:
        inner = [_shown(k) for k, v in weights.items() if isinstance(v, dict) and _has_tensors(v)]
        choose = inner and (
            f" Tensors are under {listing(inner, 8)}: choose with --key {inner[0]}, or with "
            f"MODEL.WEIGHTS {path}?key={inner[0]}"
        )
        raise CheckpointError(
            f"{path} holds no tensors under {', '.join(WRAPPERS[:2])} or at its top level; it has "
            f"{listing(map(_shown, weights), 8) or 'nothing'}.{choose or ''}"
        )
    size = path.stat().st_size
    used = sum(t.numel() * t.element_size() for t in tensors.values() if t.layout == torch.strided)
    if used > _MAX_SHARING * size:
        raise declares_too_much(path, f"weights of {used} bytes in {size}")
    for name, tensor in tensors.items():
        check_weight(path, name, tensor)
    tensors = {name: tensor.to(map_location) for name, tensor in tensors.items()}
    if dropped:
        logger.warning("%s: ignored, because they are not tensors: %s", path, listing(dropped))
    names = [name for name in tensors if name != "n_averaged"]  # of torch's AveragedModel
    if names and all(_PARALLEL_PREFIX.match(name) for name in names):
        tensors = {_PARALLEL_PREFIX.sub("", name, count=1): tensors[name] for name in names}
    return tensors


def _has_tensors(value: dict) -> bool:
    return any(isinstance(inner, Tensor | np.ndarray) for inner in value.values())


def _shown(name: Any) -> str:
    return name if isinstance(name, str) else f"<{type(name).__name__}>"
