"""Build timm's loss, mixing, optimizer and learning rate schedule from SOLVER.* and INPUT.*."""

import functools

import torch
from timm.data import Mixup
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from refbn_d2.utils import precision
from refbn_d2.utils.errors import ConfigError

_newton_schulz = muon.zeropower_via_newtonschulz


def is_mixed(cfg) -> bool:
    """Return whether images are mixed with each other."""
    return bool(cfg.INPUT.MIXUP_ALPHA or cfg.INPUT.CUTMIX_ALPHA)


def check_batch_size(cfg, workers: int) -> None:
    """Return if SOLVER.IMS_PER_BATCH can be split over workers and accumulation steps.

    Raises:
        ConfigError: it cannot; says what is allowed.
    """
    solver, mixed = cfg.SOLVER, is_mixed(cfg)
    unit = workers * solver.GRAD_ACCUM_STEPS
    if mixed and solver.GRAD_ACCUM_STEPS % 2:
        unit *= 2  # images are mixed in pairs within a worker
    if solver.IMS_PER_BATCH % unit:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH = {solver.IMS_PER_BATCH} cannot be split evenly over "
            f"{workers} worker(s) and SOLVER.GRAD_ACCUM_STEPS = {solver.GRAD_ACCUM_STEPS}"
            + (" in pairs for mixup" if mixed else "")
            + f"; allowed: {unit}, {2 * unit}, {3 * unit}, ..."
        )


def build_mixup(cfg, num_classes: int) -> Mixup | None:
    """Return timm's Mixup, which mixes images and labels of a batch; None if it is off."""
    if not is_mixed(cfg):
        return None
    inputs = cfg.INPUT
    return Mixup(
        inputs.MIXUP_ALPHA, inputs.CUTMIX_ALPHA, None, inputs.MIXUP_PROB,
        inputs.MIXUP_SWITCH_PROB, inputs.MIXUP_MODE,
        label_smoothing=cfg.SOLVER.LABEL_SMOOTHING, num_classes=num_classes,
    )  # fmt: skip


def build_loss(cfg) -> nn.Module:
    """Return SOLVER.LOSS; if images are mixed, it takes soft targets."""
    solver = cfg.SOLVER
    return create_classification_loss(
        solver.LOSS, smoothing=solver.LABEL_SMOOTHING, soft_targets=is_mixed(cfg),
        bce_target_thresh=solver.BCE_TARGET_THRESH,
    )  # fmt: skip


def build_optimizer(cfg, model: nn.Module) -> Optimizer:
    """Return SOLVER.OPTIMIZER; norms and biases have no weight decay.

    Raises:
        ConfigError: timm has no such optimizer, or the optimizer does not take SOLVER.OPT_KWARGS.
    """
    solver = cfg.SOLVER
    muon.zeropower_via_newtonschulz = (  # timm has no option for the dtype of Muon's iterations
        functools.partial(_newton_schulz, dtype=torch.float32)
        if precision.lacks_bfloat16(cfg.MODEL.DEVICE)
        else _newton_schulz
    )
    try:
        return create_optimizer_v2(
            model, solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY, solver.MOMENTUM,
            **dict(solver.OPT_KWARGS),
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"SOLVER.OPTIMIZER = {solver.OPTIMIZER!r} with SOLVER.OPT_KWARGS = "
            f"{solver.OPT_KWARGS!r}: {error}"
        ) from error


def build_schedule(cfg, optimizer: Optimizer, epoch_iters: int) -> Scheduler:
    """Return the learning rate schedule, which is updated after every step."""
    solver = cfg.SOLVER
    schedule, _ = create_scheduler_v2(
        optimizer, solver.LR_SCHEDULER_NAME, solver.EPOCHS,
        decay_milestones=solver.DECAY_MILESTONES, decay_rate=solver.GAMMA,
        min_lr=solver.BASE_LR_END, warmup_lr=solver.WARMUP_LR,
        warmup_epochs=solver.WARMUP_EPOCHS, step_on_epochs=False,
        updates_per_epoch=epoch_iters,
    )  # fmt: skip
    return schedule
