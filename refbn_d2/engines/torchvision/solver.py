"""Build the optimizer, learning rate and gradient clipping of SOLVER.*, as Detectron2 does."""

import logging
from collections import defaultdict
from collections.abc import Callable

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn

logger = logging.getLogger(__name__)

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def build_optimizer(cfg, model: nn.Module) -> torch.optim.SGD:
    """Return SGD with WEIGHT_DECAY_NORM for norms, and the factors of SOLVER for biases.

    BIAS_LR_FACTOR and WEIGHT_DECAY_BIAS apply to every bias, also to those of norms.
    """
    solver = cfg.SOLVER
    groups: dict[tuple[float, float], dict[nn.Parameter, None]] = defaultdict(dict)
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = solver.BASE_LR, solver.WEIGHT_DECAY
            if isinstance(module, NORMS):
                decay = solver.WEIGHT_DECAY_NORM
            if name == "bias":  # also a norm's, as in Detectron2
                lr *= solver.BIAS_LR_FACTOR
                if solver.WEIGHT_DECAY_BIAS is not None:
                    decay = solver.WEIGHT_DECAY_BIAS
            groups[lr, decay][parameter] = None
    return torch.optim.SGD(
        [
            {"params": list(p), "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for (lr, decay), p in groups.items()
        ],
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        foreach=True,
    )


def lr_multiplier(cfg) -> ParamScheduler:
    """Return a function: share of the training done, in [0, 1) -> factor of all learning rates.

    It is SOLVER.LR_SCHEDULER_NAME, WarmupMultiStepLR or WarmupCosineLR. It has no state, so a
    resumed run needs none.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        schedule = CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR)
    else:
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        if len(steps) < len(solver.STEPS):
            logger.warning(
                "SOLVER.STEPS %s are ignored: they are beyond SOLVER.MAX_ITER %d.",
                [step for step in solver.STEPS if step > solver.MAX_ITER],
                solver.MAX_ITER,
            )
        schedule = MultiStepParamScheduler(
            values=[solver.GAMMA**k for k in range(len(steps) + 1)],
            milestones=steps,
            num_updates=solver.MAX_ITER,
        )
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    if warmup <= 0:
        return schedule
    start = solver.WARMUP_FACTOR * schedule(0.0)
    if solver.WARMUP_METHOD == "constant":
        ramp = ConstantParamScheduler(start)
    else:
        end = schedule(0.0) if solver.RESCALE_INTERVAL else schedule(warmup)
        ramp = LinearParamScheduler(start, end)
    return CompositeParamScheduler(
        [ramp, schedule],
        interval_scaling=["rescaled", "rescaled" if solver.RESCALE_INTERVAL else "fixed"],
        lengths=[warmup, 1 - warmup],
    )


def gradient_clipper(cfg) -> Callable[[nn.Module], None]:
    """Return a function that clips gradients by SOLVER.CLIP_GRADIENTS, each parameter by itself."""
    clip = cfg.SOLVER.CLIP_GRADIENTS

    def clip_value(model: nn.Module) -> None:
        nn.utils.clip_grad_value_(model.parameters(), clip.CLIP_VALUE)

    def clip_norm(model: nn.Module) -> None:
        for parameter in model.parameters():
            nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)

    if not clip.ENABLED:
        return lambda model: None
    return {"value": clip_value, "norm": clip_norm}[clip.CLIP_TYPE]
