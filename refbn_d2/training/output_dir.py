"""Check OUTPUT_DIR, so that no run is overwritten, or resumed with another config."""

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
    """Create OUTPUT_DIR, and return if the run can start or resume there.

    Args:
        free_on_resume: keys, or beginnings of keys, that a resumed run may change.

    Raises:
        FileExistsError: OUTPUT_DIR holds a run, and `resume` is False.
        ConfigError: `resume` is True, and the run has another config; names the keys that differ.
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
            f"--resume: {output_dir} holds a run with another config. "
            + "; ".join(changed)
            + ". Use its config, or another OUTPUT_DIR."
        )


def check_not_overwritten(output_dir: Path) -> None:
    """Return if there is no run in `output_dir`.

    Raises:
        FileExistsError: there is one.
    """
    if last_checkpoint_name(output_dir) is not None:
        raise FileExistsError(
            f"OUTPUT_DIR {output_dir} holds a run already. Resume it with --resume, or choose "
            "another OUTPUT_DIR."
        )


def last_checkpoint(output_dir: Path) -> dict | None:
    """Return the checkpoint that `TrainingLoop` wrote last; None, with a warning, if there is none.

    Raises:
        CheckpointError: it cannot be read, or another program wrote it.
    """
    name = last_checkpoint_name(output_dir)
    if name is None:
        logger.warning(
            "--resume: %s holds no checkpoint yet; starting from the beginning.", output_dir
        )
        return None
    path = output_dir / name
    checkpoint = load_checkpoint(path)
    check_resumable(path, checkpoint, ("optimizer", "grad_scaler", "iteration", "seed"))
    return checkpoint


def check_resumable(path: str | os.PathLike, checkpoint: dict, needed: Iterable[str]) -> None:
    """Return if a run can resume from `checkpoint`: it has all `needed` keys.

    Raises:
        CheckpointError: it cannot; names the missing keys.
    """
    missing = sorted(set(needed) - checkpoint.keys())
    if missing:
        raise CheckpointError(
            f"{path} was not written by a training run of this engine (it has no "
            f"{', '.join(missing)}), so --resume cannot continue from it. Start from it in another "
            f"OUTPUT_DIR with MODEL.WEIGHTS {path}"
        )


def last_checkpoint_name(output_dir: Path) -> str | None:
    """Return the name of the checkpoint that was written last, or None."""
    try:
        return (output_dir / "last_checkpoint").read_text().strip()
    except FileNotFoundError:
        return None
