"""Describe a checkpoint file in words: `refbn-convert --inspect`."""

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from refbn_d2.checkpoint.convert import Contents, all_tensors, identify, misfits
from refbn_d2.checkpoint.files import WRAPPERS, file_format, load_checkpoint
from refbn_d2.checkpoint.resnets import RUN_STATE, SCALARS
from refbn_d2.utils.errors import CheckpointError, listing

FORMATS = {"torch": "torch.save", "pickle": "pickle of arrays", "safetensors": "safetensors"}
LAYOUTS = {"torchvision": "torchvision's (and timm's)", "detectron2": "Detectron2's"}
_STATISTICS = ("running_mean", "running_var", "ref_mean", "ref_var", *SCALARS, *RUN_STATE)


def describe(path: str | os.PathLike, key: str | None = None) -> str:
    """Describe the format, model, norms, size and training state of `path`, and what loads it.

    Args:
        key: see `load_checkpoint`.

    Raises:
        FileNotFoundError, CheckpointError: see `load_checkpoint`.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path, key=key)
    tensors = all_tensors(checkpoint, str(path))
    parameters = [t.numel() for n, t in tensors.items() if not n.endswith(_STATISTICS)]
    rows = [
        ("format", f"{FORMATS[file_format(path)]}, {path.stat().st_size / 2**20:.1f} MiB"),
        ("parameters", f"{sum(parameters):,} in {len(parameters)} of {len(tensors)} tensors"),
        *_beside_the_weights(checkpoint),
    ]
    try:
        contents = identify(checkpoint, str(path))
    except CheckpointError as error:
        return f"{_table(rows)}\n\n{error}"
    wrong, missing, without = misfits(contents, contents.layout)
    rows += [
        ("model", _model(contents)),
        ("trained with", _peer(contents)),
        ("layout", LAYOUTS[contents.layout]),
        ("wrong shape", listing(wrong, 8)),
        ("missing", listing(missing, 8)),
        ("not part of it", listing(without, 8)),
    ]
    takes = "\n".join(_what_takes_it(contents, checkpoint, path))
    return f"{_table(rows)}\n\n{takes}\n{config_lines(contents.config())}"


def config_lines(config: Mapping[str, Any]) -> str:
    """Return one line of KEY VALUE for each key, quoted for a command line."""
    return "\n".join(f"  {key} {shlex.quote(str(value))}" for key, value in config.items())


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{title:14}{text}" for title, text in rows if text)


def _model(contents: Contents) -> str:
    what = f"{contents.resnet} with {contents.norms['MODEL.RESNETS.NORM'] or 'no norm'}"
    if contents.is_detector:
        parts = [name.split(".") for name in contents.tensors]
        heads = dict.fromkeys(part[1] for part in parts if part[0] == "roi_heads")
        fpn = ["FPN"] if "MODEL.FPN.NORM" in contents.norms else []
        return f"detector, {', '.join([what, *fpn, *heads])}"
    if contents.classes is not None:
        return f"classifier, {what}, {contents.classes} classes"
    return f"backbone, {what}"


def _peer(contents: Contents) -> str:
    """Return the peer norm whose state of a run the ResNet holds; in eval mode it is BN."""
    state = {name.rpartition(".")[2] for name in contents.resnet_names.values()}
    if "second_moments" in state:
        return "MABN"
    return "BRN or CBN" if "steps" in state else ""


def _beside_the_weights(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    known = ("model", "classifier", "refbn", "adapted", "matching_heuristics", "__author__")
    others = {key: value for key, value in checkpoint.items() if key not in known}
    averages = [key for key in others if key in WRAPPERS]
    yield (
        "averages",
        listing(
            f"{key} (choose with --key {key}, or MODEL.WEIGHTS FILE?key={key})" for key in averages
        ),
    )
    state = {k: v for k, v in others.items() if isinstance(k, str) and k not in averages}
    yield "training", _values(state)
    if isinstance(refbn := checkpoint.get("refbn"), Mapping):
        images, dataset = refbn.get("images"), refbn.get("dataset")
        images = images if isinstance(images, list | tuple) else ()
        yield "reference", f"{len(images)} images of {dataset}, seed {refbn.get('seed')}"
    if isinstance(adapted := checkpoint.get("adapted"), Mapping):  # refbn-adapt
        yield "adapted", _values({str(key): value for key, value in adapted.items()})


def _values(state: Mapping[str, Any]) -> str:
    """Return the names, with the values that are texts or numbers."""
    return listing(
        f"{key} {value!s:.80}" if isinstance(value, str | float) or _is_count(value) else key
        for key, value in state.items()
    )


def _is_count(value: Any) -> bool:
    # Python refuses to print integers of more than some thousand digits.
    return isinstance(value, int) and value.bit_length() < 64


def _what_takes_it(contents: Contents, checkpoint: Mapping[str, Any], path: Path) -> Iterator[str]:
    detectron2 = (
        contents.layout == "detectron2"
        and (contents.is_detector or checkpoint.get("matching_heuristics"))
        and (path.suffix == ".pth" or (path.suffix == ".pkl" and "__author__" in checkpoint))
        and not {"RefBN", "RefIN"} & set(contents.norms.values())
    )
    command = f"refbn-convert {path}"
    if detectron2:
        yield "MODEL.WEIGHTS takes it, in Detectron2 and here, with the keys below."
    else:
        yield "MODEL.WEIGHTS takes it here, with the keys below; in Detectron2, after"
        norm = "" if "RefIN" in contents.norms.values() else " --norm FrozenBN"
        yield f"  {command} OUT.pkl --to detectron2{norm}"
    if "RefIN" in contents.norms.values():
        yield "There too, `import refbn_d2` is needed: RefIN depends on the image, and is no BN."
    elif contents.layout == "detectron2" and contents.resnet.is_torchvisions:
        partly = " --allow-partial" if contents.is_detector else ""
        yield f"torchvision takes its {contents.resnet} after"
        yield f"  {command} OUT.pth --to torchvision --norm BN{partly}"
