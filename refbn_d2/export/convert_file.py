"""From one checkpoint file to another, or to a program: read, convert, verify, write."""

import os
from pathlib import Path

from refbn_d2.checkpoint.convert import TORCHVISION_INPUT, Contents, convert_state, identify, pack
from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.checkpoint.inspection import config_lines
from refbn_d2.config import CfgNode, ConfigError, get_cfg
from refbn_d2.engines.torchvision.supported import value_of
from refbn_d2.export.programs import export
from refbn_d2.export.verify import verify
from refbn_d2.utils.errors import CheckpointError
from refbn_d2.utils.file_io import write_bytes

# What can be written, and by which suffixes.
TARGETS = {
    "detectron2": (".pkl", ".pth", ".safetensors"),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "onnx": (".onnx",),
    "torchscript": (".pt", ".ts"),
}


def convert_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    norm: str | None = None,
    check: bool = False,
    allow_partial: bool = False,
    config_file: str | os.PathLike | None = None,
    key: str | None = None,
) -> str:
    """Write `target`, and return what there is to say about it. No file is ever replaced.

    Args:
        to, norm, allow_partial: as `convert_state`'s; or `to` is "onnx" or "torchscript", for the
            backbone alone, folded (`export`).
        check: compare source and target on a picture (`verify`); an export always is.
        config_file: tells what tensors do not. A detector's is looked for beside `source`, as
            `config.yaml`, where a check or an export needs one.
        key: as `load_checkpoint`'s.

    Raises:
        FileNotFoundError, FileExistsError: `source` is not there, or `target` is.
        ConfigError: the config is of another ResNet, or cannot be read or built.
        CheckpointError: `target`'s suffix does not fit; a detector's config is needed; or an
            error of `load_checkpoint`, `identify`, `convert_state`, `verify` or `export`. Then
            nothing is written.
    """
    source, target = Path(source), Path(target)
    exports = to in ("onnx", "torchscript")
    _check_target(source, target, to)
    if exports and norm:
        raise CheckpointError(f"--norm {norm} is not for --to {to}, where all norms are folded.")
    checkpoint = load_checkpoint(source, key=key)
    before = identify(checkpoint, str(source))
    cfg = _config(before, to, config_file, check or exports)
    state = convert_state(before, "detectron2" if exports else to, norm, allow_partial)
    after = identify({"model": state}, str(source))
    if exports:
        data, table = export(after, to, cfg)
        write_bytes(target, data)
        return f"{target}: the backbone of {source} as {to}\n{table}"
    tables = [verify(before, after, cfg)] if check else []
    save_checkpoint(pack(state, to, target.suffix), target)
    return "\n".join([_about(before, after, target), *tables])


def _check_target(source: Path, target: Path, to: str) -> None:
    if target.suffix not in TARGETS[to]:
        raise CheckpointError(
            f"{target}: --to {to} writes {' or '.join(TARGETS[to])}, not {target.suffix!r}."
        )
    if target.exists():
        same = source.exists() and target.samefile(source)
        what = "is the checkpoint itself" if same else "exists, and is not replaced"
        raise FileExistsError(f"{target} {what}: give the result another name.")


def _config(
    contents: Contents, to: str, config_file: str | os.PathLike | None, needed: bool
) -> CfgNode | None:
    """The config of `contents`' model, where there is one and it serves for something."""
    source = Path(contents.source)
    if config_file is None and contents.is_detector and needed:
        config_file = source.with_name("config.yaml")
        if not config_file.exists():
            raise CheckpointError(
                f"{source} is a detector, whose anchors, strides and pooling its tensors do not "
                "tell, and there is no config.yaml beside it: say --config-file."
            )
    if config_file is None:
        return None
    cfg = get_cfg()
    cfg.merge_from_file(str(config_file))
    for key, value in contents.resnet.config().items():
        if (configured := value_of(cfg, key)) != value:
            raise ConfigError(
                f"{config_file}: {key} is {configured}, but {source} holds a {contents.resnet}, "
                f"with {value}: they are not of one model."
            )
    if to == "torchvision" and contents.resnet.depth >= 50 and cfg.MODEL.RESNETS.STRIDE_IN_1X1:
        raise ConfigError(
            f"{config_file}: MODEL.RESNETS.STRIDE_IN_1X1 is True, but torchvision's ResNets have "
            "their stride in the 3x3 convolutions: the weights would compute something else there."
        )
    return cfg


def _about(before: Contents, after: Contents, target: Path) -> str:
    lines = [
        f"{target}: {after.resnet} in the layout of {after.layout}, {len(after.tensors)} tensors"
    ]
    if after.layout == "torchvision":
        return f"{lines[0]}, norm {after.norms['MODEL.RESNETS.NORM'] or 'none'}"
    if target.suffix == ".safetensors":
        lines.append("Detectron2 itself reads .pkl and .pth alone.")
    elif after.classes is not None:
        lines.append('The classifier is under "classifier", where Detectron2 does not look.')
    lines += ["MODEL.WEIGHTS takes it with", config_lines(after.config())]
    if before.layout == "torchvision":
        lines.append("and, unless it was trained with others (no tensor tells), torchvision's own")
        lines.append(config_lines(TORCHVISION_INPUT))
    return "\n".join(lines)
