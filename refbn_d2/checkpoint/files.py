"""Checkpoint files: written whole or not at all, read without running them, loaded loudly.

Formats: `.pth` and `.pt` (torch.save); `.pkl` (Detectron2's, {"model": {name: array}, "__author__":
...}); `.safetensors`.
"""

import io
import logging
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from refbn_d2.checkpoint.names import backbone_prefix, resnet_name, to_detectron2
from refbn_d2.checkpoint.resnets import ResNet, which_resnet

logger = logging.getLogger(__name__)

# The share of the backbone's tensors that have to fit, for both the model's and the file's.
MIN_BACKBONE_FILLED = 0.95

# Where training loops put the weights, in the order of preference; the others stay in the rest.
WRAPPERS = ("model", "state_dict", "model_state", "model_ema", "state_dict_ema", "ema")
_PARALLEL_PREFIX = re.compile(r"(module\.|_orig_mod\.)+")

# State beside the weights that one kind of norm has and another lacks: neither is an error.
_BOOKKEEPING = re.compile(r"(.*\.)?(num_batches_tracked|ref_mean|ref_var|ref_count)")
# In old Detectron2 checkpoints, since then made from the config; a classifier behind a backbone.
EXPENDABLE = re.compile(r"pixel_(mean|std)|.*anchor_generator\.cell_anchors\..*")
_CLASSIFIER = re.compile(r"(backbone\.)?(bottom_up\.)?(stem\.)?(linear|fc)\.\w+")

_LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how torch < 1.6 begins a file


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read, or that does not fit the model."""


class Caffe2Checkpoint(CheckpointError):
    """A file in Caffe2's format, which Detectron2 reads."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, in the model's names."""

    loaded: list[str]
    missing: list[str]  # the model's, not in the file
    unexpected: list[str]  # the file's, not in the model
    shape_mismatch: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, file's, model's


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
    with _written_whole(path) as file:
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


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path`; it appears whole, or what stood there stays. Folders are made."""
    with _written_whole(Path(path)) as file:
        file.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_bytes` of `text` in UTF-8."""
    write_bytes(path, text.encode())


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what runs that were killed while they wrote into `folder` left of their files."""
    for temporary in Path(folder).glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


@contextmanager
def _written_whole(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path`, which takes its place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see remove_unfinished
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        data = _read_pickle(path)
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
            raise _holds_code(path, code[1]) from error
        raise _not_a_checkpoint(path, text) from error


class _Refused(Exception):
    """The name of what an unpickler was asked to import."""


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain containers; imports nothing else."""

    _ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        # bytes, in protocols below 3; only the one codec pickle uses for them
        ("_codecs", "encode"): lambda text, codec: text.encode("latin1"),
    } | {
        (f"numpy.{core}.{module}", name): rebuild  # numpy 1's and numpy 2's place of it
        for core in ("core", "_core")
        for module, name, rebuild in (
            ("multiarray", "_reconstruct", np.zeros(1).__reduce__()[0]),
            ("multiarray", "scalar", np.float64(0).__reduce__()[0]),
            ("numeric", "_frombuffer", np.zeros(1).__reduce_ex__(5)[0]),
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise _Refused(f"{module}.{name}")
        return self._ALLOWED[module, name]


def _read_pickle(path: Path) -> Any:
    try:  # latin1 as in Detectron2: Python 2 wrote some of these files
        return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except _Refused as refused:
        raise _holds_code(path, str(refused)) from None
    except Exception as error:  # anything may come out of bytes that are no pickle
        raise _not_a_checkpoint(path, str(error)) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise _not_a_checkpoint(path, str(error)) from error


def _holds_code(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds code or objects ({what}); it was refused, and nothing of it was run. A "
        "checkpoint may hold tensors, arrays and plain containers alone: save a state_dict()."
    )


def _not_a_checkpoint(path: Path, why: str) -> CheckpointError:
    why = why.strip().splitlines()
    return CheckpointError(
        f"{path} is cut off or no checkpoint ({why[-1] if why else 'unreadable'}): is it whole, "
        "and not a web page or a pointer to a file kept elsewhere?"
    )


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


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str | os.PathLike,
    allow_partial: bool = False,
) -> LoadReport:
    """Load a state dict into `model` by names, and say what fitted.

    Names may be torchvision's, timm's or Detectron2's, with or without the backbone's prefix
    (`names.to_detectron2`). BN, RefBN and FrozenBN load into each other: a RefBN layer's reference
    starts from running statistics where the file has none. Outside the backbone, tensors of
    another shape (a predictor of other classes) are skipped with a warning. If an error is raised,
    the model is as it was.

    Args:
        state: as "model" of `load_checkpoint`.
        source: the file it is from, for messages.
        allow_partial: let pass a backbone that fits in part.

    Raises:
        CheckpointError: nothing fits; or more than 5 % of the backbone's tensors are without
            counterpart, the model's in the file or the file's in the model.
    """
    target = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    given, state = list(state), to_detectron2(state, target)

    loaded = [name for name in target if name in state and state[name].shape == target[name].shape]
    mismatch = [
        (name, tuple(state[name].shape), tuple(target[name].shape))
        for name in target
        if name in state and state[name].shape != target[name].shape
    ]
    missing = [name for name in target if name not in state and not _BOOKKEEPING.fullmatch(name)]
    unexpected = [
        name
        for name in state
        if name not in target
        and not _BOOKKEEPING.fullmatch(name)
        and not EXPENDABLE.fullmatch(name)
    ]
    weights = [name for name in loaded if not _BOOKKEEPING.fullmatch(name)]
    if not weights:
        raise CheckpointError(
            f"{source}: no tensor fits the model.\n  The file has: {listing(given, 5)}\n"
            f"  The model has: {listing(target, 5)}"
        )
    _check_backbone(source, target, state, allow_partial)

    model.load_state_dict({name: state[name] for name in loaded}, strict=False)

    logger.info(
        "%s: %d of the model's %d tensors loaded; %d not in the file, %d of another shape, "
        "%d of the file's not in the model.",
        source,
        len(weights),
        len(weights) + len(missing) + len(mismatch),
        len(missing),
        len(mismatch),
        len(unexpected),
    )
    for name, theirs, ours in mismatch:
        logger.warning(
            "Skip loading '%s' due to incompatible shapes: %s in the checkpoint but %s in the "
            "model! You might want to double check if this is expected.",
            name,
            theirs,
            ours,
        )
    if missing:
        logger.warning("Not in the file, left as initialised: %s", listing(missing))
    if unexpected:
        logger.warning("In the file, but not used by the model: %s", listing(unexpected))
    return LoadReport(loaded, missing, unexpected, mismatch)


def _check_backbone(
    source: str | os.PathLike,
    target: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    allow_partial: bool,
) -> None:
    prefix = backbone_prefix(target)

    def backbone(names: Iterable[str]) -> list[str]:
        return [
            name
            for name in names
            if name.startswith(prefix)
            and not _BOOKKEEPING.fullmatch(name)
            and not _CLASSIFIER.fullmatch(name)
        ]

    ours, theirs = backbone(target), backbone(state)
    unfilled = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(target[name].shape)} in the model"
        if name in state
        else f"{name} not in the file"
        for name in ours
        if name not in state or state[name].shape != target[name].shape
    ]
    unused = [f"{name} not in the model" for name in theirs if name not in target]
    for what, misfits, total in (("model", unfilled, ours), ("file", unused, theirs)):
        if len(misfits) > (1 - MIN_BACKBONE_FILLED) * len(total):
            message = (
                f"{source}: {len(misfits)} of the {len(total)} backbone tensors of the {what} do "
                f"not fit. {_why(_resnet(state), _resnet(target))}\n  "
                + listing(misfits, separator="\n  ")
            )
            if not allow_partial:
                raise CheckpointError(message)
            logger.warning(message)


def _resnet(tensors: Mapping[str, Tensor]) -> ResNet | None:
    bare = {name: resnet_name(name) for name in tensors}
    try:
        return which_resnet({own[1]: tuple(tensors[n].shape) for n, own in bare.items() if own})
    except ValueError:
        return None


def _why(theirs: ResNet | None, ours: ResNet | None) -> str:
    if theirs and ours and str(theirs) != str(ours):
        return f"The file holds a {theirs}, the model a {ours} (MODEL.RESNETS)."
    return "The ResNet's depth, width or norm (MODEL.RESNETS) probably differs."


def listing(names: Iterable[str], limit: int = 20, separator: str = ", ") -> str:
    """The first `limit` names, and how many more there are."""
    names = list(names)
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return separator.join(names[:limit] + more)
