"""OUTPUT_DIR: a run is neither overwritten by another nor resumed as another."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from refbn_d2.checkpoint.files import (
    load_checkpoint,
)
from refbn_d2.config.cfg_node import leaves
from refbn_d2.utils.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


def check_output_dir(cfg, resume: bool, free_on_resume: tuple[str, ...]) -> None:
    """A run is neither overwritten by another nor resumed as another. Makes the folder.

    Args:
        free_on_resume: keys, or beginnings of keys, that a resumed run may change.

    Raises:
        FileExistsError: OUTPUT_DIR holds a run, and it is not to be resumed.
        ConfigError: it is, with another config; names the keys that differ.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not resume:
        check_not_overwritten(output_dir)
    if last_checkpoint_name(output_dir) is None:
        return
    before = dict(leaves(yaml.safe_load((output_dir / "config.yaml").read_text())))
    now = dict(leaves(yaml.safe_load(cfg.dump())))
    changed = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free_on_resume)
    ]
    if changed:
        raise ConfigError(
            f"--resume: {output_dir} holds a run of another config. "
            + "; ".join(changed)
            + ". Use its config, or another OUTPUT_DIR."
        )


def check_not_overwritten(output_dir: Path) -> None:
    """Returns if there is no run in `output_dir`.

    Raises:
        FileExistsError: there is.
    """
    if last_checkpoint_name(output_dir) is not None:
        raise FileExistsError(
            f"OUTPUT_DIR {output_dir} holds a run already. Go on with it by --resume, or name "
            "another OUTPUT_DIR."
        )


def last_checkpoint(output_dir: Path) -> dict | None:
    """The checkpoint that `TrainingLoop` wrote last; None, with a warning, where there is none.

    Raises:
        CheckpointError: it cannot be read, or another program wrote it.
    """
    name = last_checkpoint_name(output_dir)
    if name is None:
        logger.warning("--resume: %s holds no checkpoint yet; starting anew.", output_dir)
        return None
    path = output_dir / name
    checkpoint = load_checkpoint(path)
    check_resumable(path, checkpoint, ("optimizer", "grad_scaler", "iteration", "seed"))
    return checkpoint


def check_resumable(path: str | os.PathLike, checkpoint: dict, needed: Iterable[str]) -> None:
    """Returns if a run can go on with `checkpoint`, which then has all `needed` keys.

    Raises:
        CheckpointError: it has not; names what it lacks.
    """
    missing = sorted(set(needed) - checkpoint.keys())
    if missing:
        raise CheckpointError(
            f"{path} was not written by a training run of this engine (it lacks "
            f"{', '.join(missing)}), so --resume cannot go on with it. Start from it in another "
            f"OUTPUT_DIR with MODEL.WEIGHTS {path}"
        )


def last_checkpoint_name(output_dir: Path) -> str | None:
    """Name of the checkpoint that was written last, or None."""
    try:
        return (output_dir / "last_checkpoint").read_text().strip()
    except FileNotFoundError:
        return None
