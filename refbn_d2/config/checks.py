"""Checks of a detector's config that need neither data nor model."""

import logging
from collections.abc import Iterator

from refbn_d2.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def check_batch(cfg, world_size: int) -> None:
    """Check that SOLVER.IMS_PER_BATCH divides evenly among the workers.

    Raises:
        ConfigError: it does not.
    """
    # Detectron2 scales the batch from this number of workers to the actual one.
    workers = cfg.SOLVER.REFERENCE_WORLD_SIZE or world_size
    batch = cfg.SOLVER.IMS_PER_BATCH
    if batch < 1 or batch % workers:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH = {batch} cannot be split evenly over {workers} workers; "
            f"allowed: {workers}, {2 * workers}, {3 * workers}, ..."
        )


def solver_misfits(cfg) -> Iterator[tuple[str, float, str]]:
    """Yield (key, value, what is allowed) for values with which nothing is trained or saved."""
    solver = cfg.SOLVER
    for name in ("MAX_ITER", "CHECKPOINT_PERIOD", "BASE_LR"):
        if not solver[name] > 0:
            yield f"SOLVER.{name}", solver[name], "a number above 0"
    end = solver.BASE_LR_END
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and not 0 <= end <= solver.BASE_LR:
        yield "SOLVER.BASE_LR_END", end, f"0 to SOLVER.BASE_LR = {solver.BASE_LR}"


def check_solver(cfg) -> None:
    """Check that the values under SOLVER train and save something.

    Raises:
        ConfigError: they do not; names each key, its value and what is allowed.
    """
    misfits = [
        f"{key} = {value}; allowed: {allowed}" for key, value, allowed in solver_misfits(cfg)
    ]
    if misfits:
        raise ConfigError(f"This config cannot be trained: {'. '.join(misfits)}.")


def warn_frozen_from_scratch(cfg) -> None:
    """Warn of layers that are frozen at random weights because MODEL.WEIGHTS is empty."""
    if cfg.MODEL.WEIGHTS or "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return
    freeze_at, norm = cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM
    if freeze_at > 0:
        stages = " to ".join(["the stem", *([f"res{freeze_at}"] if freeze_at > 1 else [])])
        logger.warning(
            "MODEL.WEIGHTS is empty and MODEL.BACKBONE.FREEZE_AT = %d: a frozen random stem is "
            "trained on top of (%s never learn). Set MODEL.WEIGHTS, or MODEL.BACKBONE.FREEZE_AT 0.",
            freeze_at,
            stages,
        )
    if norm == "FrozenBN":
        logger.warning(
            "MODEL.WEIGHTS is empty and MODEL.RESNETS.NORM = 'FrozenBN': its statistics are frozen "
            "as they were initialized, so that nothing is normalized. Set MODEL.WEIGHTS, or "
            "another norm, such as 'BN' or 'RefBN'."
        )
