"""Convert a checkpoint file into another one or into a program: read, convert, verify, write."""

import os
from pathlib import Path

from refbn_d2.checkpoint.convert import TORCHVISION_INPUT, Contents, convert_state, identify, pack
from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.checkpoint.inspection import config_lines
from refbn_d2.config import CfgNode, ConfigError, get_cfg
from refbn_d2.engines.torchvision.supported import value_of
from refbn_d2.export.programs import export
from refbn_d2.export.targets import TARGETS
from refbn_d2.export.verify import verify
from refbn_d2.layers.functional import PRIOR_COUNT
from refbn_d2.utils.errors import CheckpointError
from refbn_d2.utils.file_io import write_bytes


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
    """Write `target`, and return a text about it. No file is ever replaced.

    If an error is raised, nothing is written.

    Args:
        to, norm, allow_partial: see `convert_state`. `to` may also be "onnx" or "torchscript",
            which writes only the backbone, folded (`export`).
        check: compare source and target on a picture (`verify`). Exports are always compared.
        config_file: the model's config, which holds what cannot be inferred from tensors. If a
            check or an export of a detector needs it, the default is `config.yaml` next to
            `source`.
        key: see `load_checkpoint`.

    Raises:
        FileNotFoundError: `source` does not exist.
        FileExistsError: `target` exists.
        ConfigError: the config is of another ResNet, or cannot be read or built.
        CheckpointError: `target` has the wrong suffix; a detector's config is missing; or an error
            of `load_checkpoint`, `identify`, `convert_state`, `verify` or `export`.
    """
    source, target = Path(source), Path(target)
    exports = to in ("onnx", "torchscript")
    _check_target(source, target, to)
    if exports and norm:
        raise CheckpointError(f"--to {to} folds all norms: leave out --norm {norm}.")
    checkpoint = load_checkpoint(source, key=key)
    before = identify(checkpoint, str(source))
    cfg = _config(before, to, config_file, check or exports)
    state = convert_state(before, "detectron2" if exports else to, norm, allow_partial)
    after = identify({"model": state}, str(source))
    if check and norm == "RefIN":
        raise CheckpointError(
            f"{source}: --verify finds whether the result computes the same, but a batch norm that "
            "becomes RefIN computes something else by design: leave out --verify."
        )
    if exports:
        data, table = export(after, to, cfg)
        write_bytes(target, data)
        lines = [f"{target}: the backbone of {source} as {to}", table]
        if "RefIN" in after.norms.values() and cfg is None:
            lines.append(
                f"No checkpoint holds RefIN's MODEL.REFBN.PRIOR_COUNT: {PRIOR_COUNT} was taken. If "
                "the model was trained with another one, give --config-file."
            )
        return "\n".join(lines)
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
        what = "is the source itself" if same else "exists already"
        raise FileExistsError(f"{target} {what} and is not replaced: give the result another name.")


def _config(
    contents: Contents, to: str, config_file: str | os.PathLike | None, needed: bool
) -> CfgNode | None:
    """Return the config of `contents`' model; None if none is given and none is needed."""
    source = Path(contents.source)
    if config_file is None and contents.is_detector and needed:
        config_file = source.with_name("config.yaml")
        if not config_file.exists():
            raise CheckpointError(
                f"{source} is a detector, and there is no config.yaml next to it. Its anchors, "
                "strides and pooling cannot be inferred from its tensors: give --config-file."
            )
    if config_file is None:
        return None
    cfg = get_cfg()
    cfg.merge_from_file(str(config_file))
    for key, value in contents.resnet.config().items():
        if (configured := value_of(cfg, key)) != value:
            raise ConfigError(
                f"{config_file}: {key} is {configured}, but {source} holds a {contents.resnet}, "
                f"for which it is {value}: give the config of this model."
            )
    if to == "torchvision" and contents.resnet.depth >= 50 and cfg.MODEL.RESNETS.STRIDE_IN_1X1:
        raise ConfigError(
            f"{config_file}: MODEL.RESNETS.STRIDE_IN_1X1 is True, but torchvision's ResNets have "
            "their stride in the 3x3 convolutions, so the weights would compute something else. "
            "Only a model with False can be converted to torchvision."
        )
    return cfg


def _about(before: Contents, after: Contents, target: Path) -> str:
    lines = [f"{target}: {after.resnet} in {after.layout}'s layout, {len(after.tensors)} tensors"]
    if after.layout == "torchvision":
        return f"{lines[0]}, norm {after.norms['MODEL.RESNETS.NORM'] or 'none'}"
    if target.suffix == ".safetensors":
        lines.append("Detectron2 itself reads only .pkl and .pth.")
    elif after.classes is not None:
        lines.append('The classifier is stored under "classifier", which Detectron2 ignores.')
    lines += ["MODEL.WEIGHTS takes it, with", config_lines(after.config())]
    if before.layout == "torchvision":
        lines.append("and torchvision's keys, unless it was trained with other ones:")
        lines.append(config_lines(TORCHVISION_INPUT))
    return "\n".join(lines)
