"""Training and validation of a classifier."""

import logging
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy
from torch import Tensor, nn
from tqdm import tqdm

from refbn_d2.checkpoint import load_checkpoint, load_weights, save_checkpoint
from refbn_d2.config import ConfigError, refbn_options
from refbn_d2.config.resume import FREE_IN_PRETRAINING
from refbn_d2.layers.peers import prepare_peers
from refbn_d2.pretrain.backbone import resnet_keys, write_backbone
from refbn_d2.pretrain.data.datasets import ImageSet, load_images
from refbn_d2.pretrain.data.loaders import (
    Samples,
    Unreadable,
    build_test_loader,
    build_train_loader,
    build_transform,
)
from refbn_d2.pretrain.models import build_model, check_num_classes
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.reference.selection import select_reference
from refbn_d2.training.events import EventWriter, setup_logging
from refbn_d2.training.loop import TrainingLoop
from refbn_d2.training.output_dir import check_output_dir, last_checkpoint, last_checkpoint_name
from refbn_d2.utils import distributed
from refbn_d2.utils.random_state import seed_everything, seed_of_run

logger = logging.getLogger(__name__)

# What may differ between a run and its resumption without making it another run.
BEST = "model_best.pth"


def main(cfg, resume: bool, eval_only: bool) -> dict[str, float]:
    """Train, validate and write the Detectron2 backbone (or only validate) in this worker process.

    Returns:
        {"val/top1", "val/top5" (%), "val/loss"}, and "ema/..." with MODEL.EMA, on worker 0; {} on
        the others.

    Raises:
        ValueError, FileNotFoundError: a config, data or checkpoint that cannot be used.
        FloatingPointError: the loss became infinite or NaN; names the iteration.
        SystemExit: interrupted (128 + signal).
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not eval_only:
        check_output_dir(cfg, resume, FREE_IN_PRETRAINING)
    setup_logging(output_dir, distributed.rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    trainer = Trainer(cfg, output_dir, resume, training=not eval_only)
    if eval_only:
        return trainer.evaluate()
    results = trainer.train()
    trainer.write_backbone()
    return results


class Trainer(TrainingLoop):
    """One run: model, its moving average, data, optimizer, reference batch, and state on disk."""

    def __init__(self, cfg, output_dir: Path, resume: bool, training: bool) -> None:
        self.cfg, self.output_dir = cfg, output_dir
        self.device = torch.device(cfg.MODEL.DEVICE)
        images = load_images(cfg, training)
        checkpoint = last_checkpoint(output_dir) if resume else None
        self.seed = checkpoint["seed"] if checkpoint else seed_of_run(cfg)
        self.start_iteration = checkpoint["iteration"] + 1 if checkpoint else 0
        seed_everything(self.seed)
        self.memory_format = (
            torch.channels_last if cfg.MODEL.CHANNELS_LAST else torch.contiguous_format
        )
        self.model = build_model(cfg, images.test.num_classes).to(
            self.device, memory_format=self.memory_format
        )
        self.ema: ModelEmaV3 | None = None
        self._load(checkpoint, training)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        )
        self.autocast = torch.autocast(
            self.device.type, getattr(torch, cfg.SOLVER.AMP.DTYPE), enabled=cfg.SOLVER.AMP.ENABLED
        )
        self.test_loader = build_test_loader(cfg, images.test)
        self.test_unreadable = Unreadable(images.test, cfg.DATALOADER.MAX_UNREADABLE)
        if training:
            self._prepare_training(images.train, checkpoint)

    def _load(self, checkpoint: dict | None, training: bool) -> None:
        """The weights of the model and of its moving average."""
        cfg, source = self.cfg, self.cfg.MODEL.WEIGHTS
        weights = checkpoint or (load_checkpoint(source) if source else {})
        if weights:
            where = f"The run in {self.output_dir}" if checkpoint else source
            check_num_classes(self.model, weights["model"], where)
        if checkpoint:
            self.model.load_state_dict(weights["model"])
        elif weights:
            load_weights(self.model, weights["model"], source)
        elif not training:
            logger.warning("MODEL.WEIGHTS is empty: evaluating a model of random weights.")
        average = None if training and not checkpoint else weights.get("model_ema")
        if cfg.MODEL.EMA.ENABLED and (training or average):
            self.ema = ModelEmaV3(self.model, cfg.MODEL.EMA.DECAY, use_warmup=cfg.MODEL.EMA.WARMUP)
            if average:
                self.ema.module.load_state_dict(average)

    def _prepare_training(self, images: ImageSet, checkpoint: dict | None) -> None:
        cfg, solver = self.cfg, self.cfg.SOLVER
        self.epoch_iters = max(1, len(images) // solver.IMS_PER_BATCH)
        self.max_iter = solver.EPOCHS * self.epoch_iters
        self.eval_period = cfg.TEST.VAL_INTERVAL * self.epoch_iters
        self.checkpoint_period = solver.CHECKPOINT_PERIOD
        prepare_peers(self.model, self.max_iter)
        self._prepare_loss()
        if resnet_keys(self.model) is None:
            logger.warning(
                "%s is no ResNet or ResNeXt that Detectron2 builds: no backbone will be written, "
                "the classifier alone.",
                cfg.MODEL.NAME,
            )
        samples = Samples(images, build_transform(cfg, training=True), self.seed)
        self.loader = build_train_loader(cfg, samples, self.seed, self.start_iteration)
        self.unreadable = Unreadable(images, cfg.DATALOADER.MAX_UNREADABLE)
        self._prepare_optimizer()
        if cfg.MODEL.COMPILE:  # inside of hooks: how a slice gets on the batch is not traced
            self.model.forward = torch.compile(self.model.forward)
        self.reference = None
        if cfg.MODEL.NORM == "RefBN":
            self.reference = self._reference(samples, checkpoint)
        self.wrapped = distributed.data_parallel(self.model, self.device)
        self.best = -1.0
        if checkpoint:
            self.load_state_dict(checkpoint)
            if (self.output_dir / BEST).exists():
                self.best = load_checkpoint(self.output_dir / BEST)["top1"]

    def _prepare_loss(self) -> None:
        """The loss, and what is done to a batch on the device."""
        solver, inputs = self.cfg.SOLVER, self.cfg.INPUT
        mixes = bool(inputs.MIXUP_ALPHA or inputs.CUTMIX_ALPHA)
        self._check_batch_size(mixes)
        self.erase = RandomErasing(inputs.RANDOM_ERASING, mode="pixel", device=self.device)
        self.mixup = None
        if mixes:
            self.mixup = Mixup(
                inputs.MIXUP_ALPHA, inputs.CUTMIX_ALPHA, None, inputs.MIXUP_PROB,
                inputs.MIXUP_SWITCH_PROB, inputs.MIXUP_MODE,
                label_smoothing=solver.LABEL_SMOOTHING, num_classes=self.model.num_classes,
            )  # fmt: skip
        self.loss = create_classification_loss(
            solver.LOSS, smoothing=solver.LABEL_SMOOTHING, soft_targets=mixes,
            bce_target_thresh=solver.BCE_TARGET_THRESH,
        )  # fmt: skip

    def _prepare_optimizer(self) -> None:
        solver = self.cfg.SOLVER
        try:
            self.optimizer = create_optimizer_v2(
                self.model, solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY, solver.MOMENTUM,
                **dict(solver.OPT_KWARGS),
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"SOLVER.OPTIMIZER = {solver.OPTIMIZER!r} with SOLVER.OPT_KWARGS = "
                f"{solver.OPT_KWARGS!r}: {error}"
            ) from error
        self.schedule, _ = create_scheduler_v2(
            self.optimizer, solver.LR_SCHEDULER_NAME, solver.EPOCHS,
            decay_milestones=solver.DECAY_MILESTONES, decay_rate=solver.GAMMA,
            min_lr=solver.BASE_LR_END, warmup_lr=solver.WARMUP_LR,
            warmup_epochs=solver.WARMUP_EPOCHS, step_on_epochs=False,
            updates_per_epoch=self.epoch_iters,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=solver.AMP.ENABLED and solver.AMP.DTYPE == "float16"
        )

    def _check_batch_size(self, mixes: bool) -> None:
        solver, workers = self.cfg.SOLVER, distributed.world_size()
        unit = workers * solver.GRAD_ACCUM_STEPS
        if mixes and solver.GRAD_ACCUM_STEPS % 2:
            unit *= 2  # a worker's images are mixed in pairs
        if solver.IMS_PER_BATCH % unit:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH = {solver.IMS_PER_BATCH} cannot be split evenly over "
                f"{workers} worker(s) and SOLVER.GRAD_ACCUM_STEPS = {solver.GRAD_ACCUM_STEPS}"
                + (" in pairs for mixup" if mixes else "")
                + f"; allowed: {unit}, {2 * unit}, {3 * unit}, ..."
            )

    def _reference(self, samples: Samples, checkpoint: dict | None) -> ReferenceBatch:
        """The reference batch: the checkpoint's again, or chosen and captured."""
        options, images = refbn_options(self.cfg), samples.images
        state = checkpoint and checkpoint["refbn"]
        chosen, identity = select_reference(images, options, images.path.name, identity=state)
        tensors = []
        for place, index in enumerate(tqdm(chosen, "reference batch", disable=None, leave=False)):
            image, _, unreadable = samples.sample(index, options.seed, place)
            self.unreadable.note(unreadable)
            tensors.append(image)

        def rows(chosen: list[Tensor], batch: Tensor | None = None) -> Tensor:
            return self._normalize(torch.stack(chosen))

        def forward(chosen: list[Tensor]) -> None:
            with self.autocast:
                self.model(rows(chosen))

        reference = ReferenceBatch(
            self.model,
            tensors,
            options,
            forward=forward,
            identity=identity,
            concat_to=self.model,
            rows=rows,
        )
        if state:
            reference.load_state_dict(state)
        else:
            self.model.train()
            reference.begin()
        return reference

    def _normalize(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> float32 on the device."""
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return images.float().sub_(self.mean).div_(self.std)

    def step(self, iteration: int, batch: tuple) -> tuple[float, dict[str, float]]:
        """One optimizer step: the learning rate, loss and accuracy (%) of this worker's images.

        A mixed image counts as what it shows most of.
        """
        solver, inputs = self.cfg.SOLVER, self.cfg.INPUT
        images, labels, unreadable = batch
        self.unreadable.note(unreadable)
        seed_everything(self.seed, distributed.rank(), iteration)
        self.schedule.step_update(iteration)
        images = self.erase(self._normalize(images))
        targets = labels = labels.to(self.device, non_blocking=True)
        if self.mixup:
            off = inputs.MIXUP_OFF_EPOCH
            self.mixup.mixup_enabled = not off or iteration < off * self.epoch_iters
            images, targets = self.mixup(images, labels)
            labels = targets.argmax(1)
        if self.reference:
            self.reference.before_step(iteration)
        self.optimizer.zero_grad()
        parts = solver.GRAD_ACCUM_STEPS
        total, outputs = torch.zeros((), device=self.device), []
        for part, (x, y) in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True)):
            with self._synchronized(part + 1 == parts):
                with self.autocast:
                    logits = self.wrapped(x)
                    loss = self.loss(logits.float(), y) / parts
                self.scaler.scale(loss).backward()
            if self.reference and part == 0:  # a slice goes with the first part
                self.reference.after_step()
            total += loss.detach()
            outputs.append(logits.detach())
        top1, top5 = accuracy(torch.cat(outputs).float(), labels, (1, 5))
        loss, top1, top5 = torch.stack([total, top1, top5]).tolist()  # the one read of the device
        if not np.isfinite(loss):
            raise self.diverged(iteration, f"loss {loss}")
        if solver.CLIP_GRAD:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), solver.CLIP_GRAD)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.model, iteration)
        lr = self.optimizer.param_groups[0]["lr"]
        return lr, {"total_loss": loss, "train/top1": top1, "train/top5": top5}

    def _synchronized(self, synchronized: bool):
        """Workers exchange gradients in the last part of a batch alone."""
        if synchronized or self.wrapped is self.model:
            return nullcontext()
        return self.wrapped.no_sync()

    def evaluate(self) -> dict[str, float]:
        """Top-1, top-5 (%) and cross entropy on DATASETS.TEST, on worker 0; {} on others."""
        models = {"val": self.model} | ({"ema": self.ema.module} if self.ema else {})
        results = {}
        for name, model in models.items():
            measured = self._evaluate(model)
            results |= {f"{name}/{key}": value for key, value in measured.items()}
        if distributed.rank() != 0:
            return {}
        logger.info("  ".join(f"{name}: {value:.4g}" for name, value in results.items()))
        return results

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        distributed.share_buffers(model)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # top-1, top-5, loss, images
        for images, labels, unreadable in tqdm(
            self.test_loader, "validation", disable=None, leave=False
        ):
            self.test_unreadable.note(unreadable)
            if not len(labels):
                continue
            labels = labels.to(self.device, non_blocking=True)
            with self.autocast:
                logits = model(self._normalize(images)).float()
            measured = [*accuracy(logits, labels, (1, 5)), F.cross_entropy(logits, labels)]
            sums += len(labels) * torch.stack([*measured, torch.ones_like(measured[0])])
        *sums, count = distributed.mean_over_workers(sums.tolist(), self.device)
        return {key: s / count for key, s in zip(("top1", "top5", "loss"), sums, strict=True)}

    def show(self, writer: EventWriter, iteration: int, results: dict[str, float]) -> None:
        """Also keeps the best weights so far, the moving average's where there is one."""
        super().show(writer, iteration, results)
        top1 = results["ema/top1" if self.ema else "val/top1"]
        if top1 > self.best:
            self.best = top1
            state = {"model": self._weights(), "iteration": iteration, "top1": top1}
            save_checkpoint(state, self.output_dir / BEST)

    def state_dict(self) -> dict:
        """As the base's, with the moving average."""
        average = {"model_ema": self.ema.module.state_dict()} if self.ema else {}
        return super().state_dict() | average

    def save(self, iteration: int, name: str) -> None:
        """Also removes the checkpoint before."""
        before = last_checkpoint_name(self.output_dir)
        super().save(iteration, name)
        if before and before != f"{name}.pth" and distributed.rank() == 0:
            (self.output_dir / before).unlink(missing_ok=True)

    def _weights(self) -> dict[str, Tensor]:
        """What the run is for."""
        return (self.ema.module if self.ema else self.model).state_dict()

    def write_backbone(self) -> None:
        """backbone.pkl and backbone.yaml for Detectron2, where it has such a backbone."""
        if distributed.rank() != 0:
            return
        config = write_backbone(self.cfg, self.model, self._weights(), self.output_dir)
        if config is None:
            logger.warning("No backbone written: Detectron2 has no %s.", self.cfg.MODEL.NAME)
            return
        logger.info(
            "Wrote the backbone for Detectron2, and these keys that belong to it (%s):\n%s",
            self.output_dir / "backbone.yaml", yaml.safe_dump(config, sort_keys=False),
        )  # fmt: skip
