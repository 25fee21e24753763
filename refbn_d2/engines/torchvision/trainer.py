"""Train and evaluate a detector from a Detectron2 config, with torchvision's operators."""

import logging
from pathlib import Path

import numpy as np
import torch
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn
from tqdm import tqdm

from refbn_d2.checkpoint.loading import load_weights
from refbn_d2.checkpoint.source import load_source
from refbn_d2.config import refbn_options
from refbn_d2.config.checks import warn_frozen_from_scratch
from refbn_d2.config.refbn import check_model
from refbn_d2.engines.torchvision.data import (
    LoadedDataset,
    Mapper,
    build_train_loader,
    has_objects,
    load_train_dicts,
)
from refbn_d2.engines.torchvision.evaluation import Evaluator
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.engines.torchvision.solver import build_optimizer, gradient_clipper, lr_multiplier
from refbn_d2.layers import has_refbn
from refbn_d2.layers.peers import restart_peers
from refbn_d2.metrics import coco_ap
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.reference.detection import image_rows
from refbn_d2.reference.selection import is_landscape, select_reference
from refbn_d2.training.loop import TrainingLoop
from refbn_d2.training.output_dir import last_checkpoint
from refbn_d2.utils import distributed, precision
from refbn_d2.utils.errors import ConfigError, DivergedError
from refbn_d2.utils.random_state import seed_everything, seed_of_run
from refbn_d2.utils.torch_compat import grad_scaler

logger = logging.getLogger(__name__)


def train(cfg, output_dir: Path, resume: bool, allow_partial_weights: bool = False) -> dict:
    """Train, then evaluate, in this worker process.

    Returns:
        {dataset: {"bbox": {"AP": ...}, "segm": ...}} on worker 0, {} on the others.

    Raises:
        ConfigError, DataError, CheckpointError, FileNotFoundError: the config, the data or the
            weights cannot be used.
        DivergedError: a loss or a gradient became infinite or NaN; names the iteration.
        SystemExit: interrupted (128 + signal), or TEST.EXPECTED_RESULTS not reached (1).
    """
    results = Trainer(cfg, output_dir, resume, allow_partial_weights).train()
    _check_expected(cfg, results)
    return results


def evaluate(cfg, output_dir: Path, resume: bool, allow_partial_weights: bool = False) -> dict:
    """Evaluate MODEL.WEIGHTS or, with `resume`, the last checkpoint.

    Returns:
        The same as `train`.

    Raises:
        ConfigError: DATASETS.TEST is empty; otherwise the errors of `train`.
    """
    evaluator = Evaluator(cfg, output_dir)
    if not evaluator.datasets:
        raise ConfigError("DATASETS.TEST is empty: --eval-only needs a data set there.")
    checkpoint = last_checkpoint(output_dir) if resume else None
    if not (checkpoint or cfg.MODEL.WEIGHTS):
        logger.warning("MODEL.WEIGHTS is empty: evaluating a model with random weights.")
    torch.manual_seed(checkpoint["seed"] if checkpoint else seed_of_run(cfg))
    results = evaluator(_build_model(cfg, checkpoint, allow_partial_weights))
    _check_expected(cfg, results)
    return results


def _build_model(cfg, checkpoint: dict | None, allow_partial_weights: bool) -> nn.Module:
    """Return the model with the weights of the checkpoint, or else of MODEL.WEIGHTS."""
    model = build_model(cfg)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    elif cfg.MODEL.WEIGHTS:
        weights = load_source(cfg.MODEL.WEIGHTS)
        load_weights(
            model, weights["model"], cfg.MODEL.WEIGHTS, allow_partial_weights,
            str(weights.get("arch")),
        )  # fmt: skip
        restart_peers(model)
    return model


def _check_expected(cfg, results: dict[str, dict]) -> None:
    if distributed.rank() == 0 and cfg.TEST.EXPECTED_RESULTS:
        first = next(iter(results.values()), {})
        if not coco_ap.verify_results(cfg.TEST.EXPECTED_RESULTS, first):
            raise SystemExit(1)


class Trainer(TrainingLoop):
    """One run: model, data, optimizer, reference batch and their state on disk."""

    def __init__(
        self, cfg, output_dir: Path, resume: bool = False, allow_partial_weights: bool = False
    ) -> None:
        data = load_train_dicts(cfg)
        data.check_pictures()
        self.evaluator = Evaluator(cfg, output_dir, data.class_names)
        checkpoint = last_checkpoint(output_dir) if resume else None
        if not checkpoint:
            warn_frozen_from_scratch(cfg)
        seed = checkpoint["seed"] if checkpoint else seed_of_run(cfg)
        torch.manual_seed(seed)
        model = _build_model(cfg, checkpoint, allow_partial_weights)
        check_model(model, cfg)
        self.train_dicts = data.dicts
        start = checkpoint["iteration"] + 1 if checkpoint else 0
        optimizer = build_optimizer(cfg, model)
        self.multiplier = lr_multiplier(cfg)
        self.clip_gradients = gradient_clipper(cfg)
        device, amp = cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED
        half = torch.float16 if device == "cuda" else torch.bfloat16
        self.autocast = precision.autocast(device, half, amp)
        loader = build_train_loader(
            cfg, data.dicts, start, distributed.rank(), distributed.world_size(), seed
        )
        reference = None
        if has_refbn(model):
            reference = self._reference(cfg, model, data, checkpoint)
        super().__init__(
            cfg=cfg,
            output_dir=output_dir,
            model=model,
            loader=loader,
            optimizer=optimizer,
            scaler=grad_scaler(device, enabled=amp and half == torch.float16),
            reference=reference,
            seed=seed,
            start_iteration=start,
            max_iter=cfg.SOLVER.MAX_ITER,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            eval_period=cfg.TEST.EVAL_PERIOD,
        )
        if checkpoint:
            self.load_state_dict(checkpoint)

    def _reference(
        self, cfg, model: nn.Module, data: LoadedDataset, checkpoint: dict | None
    ) -> ReferenceBatch:
        """Return the reference batch: the checkpoint's, or newly chosen and captured."""
        options = refbn_options(cfg)
        names = " + ".join(cfg.DATASETS.TRAIN)
        dicts = data.dicts
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            dicts = [d for d in dicts if has_objects(d)]
        group_of = is_landscape if cfg.DATALOADER.ASPECT_RATIO_GROUPING else lambda d: None
        state = checkpoint and checkpoint["refbn"]
        chosen, identity = select_reference(dicts, options, names, group_of, state)
        mapper = Mapper(cfg, is_train=True)
        samples = [
            mapper(dicts[index], np.random.default_rng([options.seed, place]))
            for place, index in enumerate(
                tqdm(chosen, "reference batch", disable=None, leave=False)
            )
        ]

        def forward(samples: list[dict]) -> None:
            with self.autocast:
                model(samples)

        reference = ReferenceBatch(
            model,
            samples,
            options,
            forward=forward,
            identity=identity,
            concat_to=model.backbone,
            rows=image_rows(model),
        )
        if state:
            reference.load_state_dict(state)
        else:
            model.train()
            reference.begin()
        return reference

    def step(self, iteration: int, samples: list[dict]) -> tuple[float, dict[str, float]]:
        """Run one optimizer step; return the learning rate and this worker's losses."""
        seed_everything(self.seed, distributed.rank(), iteration)
        factor = self.multiplier(iteration / self.cfg.SOLVER.MAX_ITER)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if self.reference:
            self.reference.before_step(iteration)
        with self.autocast:
            try:
                losses = self.wrapped(samples)
            except DivergedError as error:  # some proposals are infinite or NaN
                raise self.diverged(iteration, error) from error
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        if self.reference:
            self.reference.after_step()
        self.scaler.unscale_(self.optimizer)
        self.clip_gradients(self.model)
        measured = self.read_losses(iteration, {"total_loss": total, **losses})
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.cfg.SOLVER.BASE_LR * factor, measured

    def finish_statistics(self, iteration: int) -> None:
        """Replace running statistics by averages over NUM_ITER batches, if TEST.PRECISE_BN is on.

        This is fvcore's PreciseBN, as in Detectron2 (Wu and Johnson, "Rethinking Batch in
        BatchNorm", 2021, section 3). The batches come from a second training loader, so that the
        run's own batches do not change.
        """
        options = self.cfg.TEST.PRECISE_BN
        if not options.ENABLED or not get_bn_modules(self.model):
            return
        batches = build_train_loader(
            self.cfg, self.train_dicts, iteration + 1, distributed.rank(),
            distributed.world_size(), self.seed,
        )  # fmt: skip
        seed_everything(self.seed, distributed.rank(), iteration)
        with self.autocast:
            update_bn_stats(self.model, batches, options.NUM_ITER, progress="tqdm")

    def evaluate(self) -> dict[str, dict]:
        """Return {dataset: AP} of DATASETS.TEST on worker 0, {} on the others."""
        return self.evaluator(self.model)

    def scalars(self, results: dict[str, dict]) -> dict[str, float]:
        """Return {"bbox/AP": ...}, with the data set's name in front if there are several."""
        return {
            "/".join([name, task, metric] if len(results) > 1 else [task, metric]): value
            for name, tasks in results.items()
            for task, metrics in tasks.items()
            for metric, value in metrics.items()
        }
