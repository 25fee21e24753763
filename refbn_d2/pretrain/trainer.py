"""Train and validate a classifier."""

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3, accuracy
from torch import Tensor, nn
from tqdm import tqdm

from refbn_d2.checkpoint import load_checkpoint, load_source, load_weights, save_checkpoint
from refbn_d2.config import refbn_options
from refbn_d2.config.refbn import check_model
from refbn_d2.layers import has_refbn
from refbn_d2.layers.peers import prepare_peers, restart_peers
from refbn_d2.pretrain.backbone import resnet_keys, write_backbone
from refbn_d2.pretrain.data.datasets import load_images
from refbn_d2.pretrain.data.loaders import Samples, Unreadable, build_train_loader, build_transform
from refbn_d2.pretrain.evaluation import Evaluator, autocast, build_normalize, memory_format
from refbn_d2.pretrain.models import build_model, check_num_classes
from refbn_d2.pretrain.solver import (
    build_loss,
    build_mixup,
    build_optimizer,
    build_schedule,
    check_batch_size,
)
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.reference.selection import select_reference
from refbn_d2.training.events import EventWriter
from refbn_d2.training.loop import TrainingLoop
from refbn_d2.training.output_dir import last_checkpoint, last_checkpoint_name
from refbn_d2.utils import distributed
from refbn_d2.utils.random_state import seed_everything, seed_of_run
from refbn_d2.utils.torch_compat import grad_scaler

logger = logging.getLogger(__name__)

BEST = "model_best.pth"


def train(cfg, output_dir: Path, resume: bool) -> dict[str, float]:
    """Train, validate and write the Detectron2 backbone, in this worker process.

    Returns:
        {"val/top1", "val/top5" (%), "val/loss"}, and "ema/..." with MODEL.EMA, on worker 0; {} on
        the others.

    Raises:
        ConfigError, DataError, CheckpointError, FileNotFoundError: the config, the data or the
            weights cannot be used.
        DivergedError: the loss or a gradient became infinite or NaN; names the iteration.
        SystemExit: interrupted (128 + signal).
    """
    return Trainer(cfg, output_dir, resume).train()


def evaluate(cfg, output_dir: Path, resume: bool) -> dict[str, float]:
    """Validate MODEL.WEIGHTS or, with `resume`, the last checkpoint.

    Returns:
        The same as `train`.

    Raises:
        The same as `train`.
    """
    images = load_images(cfg, training=False)
    checkpoint = last_checkpoint(output_dir) if resume else None
    if not (checkpoint or cfg.MODEL.WEIGHTS):
        logger.warning("MODEL.WEIGHTS is empty: evaluating a model with random weights.")
    seed_everything(checkpoint["seed"] if checkpoint else seed_of_run(cfg))
    model, average = _build_models(cfg, images.test.num_classes, output_dir, checkpoint, False)
    return Evaluator(cfg, images.test)(_named(model, average))


def _build_models(
    cfg, num_classes: int, output_dir: Path, checkpoint: dict | None, training: bool
) -> tuple[nn.Module, ModelEmaV3 | None]:
    """Return the model and its moving average, with weights of the checkpoint or MODEL.WEIGHTS."""
    source = cfg.MODEL.WEIGHTS
    model = build_model(cfg, num_classes).to(cfg.MODEL.DEVICE, memory_format=memory_format(cfg))
    weights = checkpoint or (load_source(source) if source else {})
    if weights:
        where = f"The run in {output_dir}" if checkpoint else source
        check_num_classes(model, weights["model"], where)
    if checkpoint:
        model.load_state_dict(weights["model"])
    elif weights:
        load_weights(model, weights["model"], source)
        restart_peers(model)
    average = None if training and not checkpoint else weights.get("model_ema")
    if not (cfg.MODEL.EMA.ENABLED and (training or average)):
        return model, None
    ema = ModelEmaV3(model, cfg.MODEL.EMA.DECAY, use_warmup=cfg.MODEL.EMA.WARMUP)
    if average:
        ema.module.load_state_dict(average)
    return model, ema


def _named(model: nn.Module, average: ModelEmaV3 | None) -> dict[str, nn.Module]:
    return {"val": model} | ({"ema": average.module} if average else {})


class Trainer(TrainingLoop):
    """One run: model, its moving average, data, optimizer, reference batch, and state on disk."""

    def __init__(self, cfg, output_dir: Path, resume: bool = False) -> None:
        images = load_images(cfg, training=True)
        checkpoint = last_checkpoint(output_dir) if resume else None
        seed = checkpoint["seed"] if checkpoint else seed_of_run(cfg)
        start = checkpoint["iteration"] + 1 if checkpoint else 0
        seed_everything(seed)
        model, self.ema = _build_models(
            cfg, images.test.num_classes, output_dir, checkpoint, training=True
        )
        check_model(model, cfg)
        self.normalize, self.autocast = build_normalize(cfg), autocast(cfg)
        self.evaluator = Evaluator(cfg, images.test)
        self.epoch_iters = max(1, len(images.train) // cfg.SOLVER.IMS_PER_BATCH)
        max_iter = cfg.SOLVER.EPOCHS * self.epoch_iters
        prepare_peers(model, max_iter)
        check_batch_size(cfg, distributed.world_size())
        self.erase = RandomErasing(cfg.INPUT.RANDOM_ERASING, mode="pixel", device=cfg.MODEL.DEVICE)
        self.mixup, self.loss = build_mixup(cfg, model.num_classes), build_loss(cfg)
        if resnet_keys(model) is None:
            logger.warning(
                "%s is not a ResNet or ResNeXt that Detectron2 can build: only the classifier will "
                "be written, and no backbone.",
                cfg.MODEL.NAME,
            )
        samples = Samples(images.train, build_transform(cfg, training=True), seed)
        loader = build_train_loader(cfg, samples, seed, start)
        self.unreadable = Unreadable(images.train, cfg.DATALOADER.MAX_UNREADABLE)
        optimizer = build_optimizer(cfg, model)
        self.schedule = build_schedule(cfg, optimizer, self.epoch_iters)
        if cfg.MODEL.COMPILE:  # only `forward`: the hooks that append a slice are not traced
            model.forward = torch.compile(model.forward)
        reference = None
        if has_refbn(model):
            reference = self._reference(cfg, model, samples, checkpoint)
        amp = cfg.SOLVER.AMP
        super().__init__(
            cfg=cfg,
            output_dir=output_dir,
            model=model,
            loader=loader,
            optimizer=optimizer,
            scaler=grad_scaler(cfg.MODEL.DEVICE, enabled=amp.ENABLED and amp.DTYPE == "float16"),
            reference=reference,
            seed=seed,
            start_iteration=start,
            max_iter=max_iter,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            eval_period=cfg.TEST.VAL_INTERVAL * self.epoch_iters,
        )
        self.best = -1.0
        if checkpoint:
            self.load_state_dict(checkpoint)
            if (output_dir / BEST).exists():
                self.best = load_checkpoint(output_dir / BEST)["top1"]

    def train(self) -> dict[str, float]:
        """Train, then write the Detectron2 backbone; return the last validation's results."""
        results = super().train()
        self._write_backbone()
        return results

    def _reference(
        self, cfg, model: nn.Module, samples: Samples, checkpoint: dict | None
    ) -> ReferenceBatch:
        """Return the reference batch: the checkpoint's, or newly chosen and captured."""
        options, images = refbn_options(cfg), samples.images
        state = checkpoint and checkpoint["refbn"]
        chosen, identity = select_reference(images, options, images.path.name, identity=state)
        tensors = []
        for place, index in enumerate(tqdm(chosen, "reference batch", disable=None, leave=False)):
            image, _, unreadable = samples.sample(index, options.seed, place)
            self.unreadable.note(unreadable)
            tensors.append(image)

        def rows(chosen: list[Tensor], batch: Tensor | None = None) -> Tensor:
            return self.normalize(torch.stack(chosen))

        def forward(chosen: list[Tensor]) -> None:
            with self.autocast:
                model(rows(chosen))

        reference = ReferenceBatch(
            model,
            tensors,
            options,
            forward=forward,
            identity=identity,
            concat_to=model,
            rows=rows,
        )
        if state:
            reference.load_state_dict(state)
        else:
            model.train()
            reference.begin()
        return reference

    def step(self, iteration: int, batch: tuple) -> tuple[float, dict[str, float]]:
        """Run one optimizer step; return learning rate, and this worker's loss and accuracy (%).

        The class of a mixed image is the one with the largest share.
        """
        solver, inputs = self.cfg.SOLVER, self.cfg.INPUT
        images, labels, unreadable = batch
        self.unreadable.note(unreadable)
        seed_everything(self.seed, distributed.rank(), iteration)
        self.schedule.step_update(iteration)
        images = self.erase(self.normalize(images))
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
            if self.reference and part == 0:  # the slice is appended to the first part
                self.reference.after_step()
            total += loss.detach()
            outputs.append(logits.detach())
        top1, top5 = accuracy(torch.cat(outputs).float(), labels, (1, 5))
        if solver.CLIP_GRAD:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), solver.CLIP_GRAD)
        measured = self.read_losses(
            iteration, {"total_loss": total, "train/top1": top1, "train/top5": top5}
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.model, iteration)
        return self.optimizer.param_groups[0]["lr"], measured

    def _synchronized(self, synchronized: bool):
        """Return a context in which workers exchange gradients, or (False) each keeps its own."""
        if synchronized or self.wrapped is self.model:
            return nullcontext()
        return self.wrapped.no_sync()

    def evaluate(self) -> dict[str, float]:
        """Return top-1, top-5 (%) and cross entropy on DATASETS.TEST, on worker 0; {} on others."""
        return self.evaluator(_named(self.model, self.ema))

    def show(self, writer: EventWriter, iteration: int, results: dict[str, float]) -> None:
        """Write the results, and keep the best weights so far (the moving average's, with EMA)."""
        super().show(writer, iteration, results)
        top1 = results["ema/top1" if self.ema else "val/top1"]
        if top1 > self.best:
            self.best = top1
            state = {"model": self._weights(), "iteration": iteration, "top1": top1}
            save_checkpoint(state, self.output_dir / BEST)

    def state_dict(self) -> dict:
        """Return the base class's state, with the moving average."""
        average = {"model_ema": self.ema.module.state_dict()} if self.ema else {}
        return super().state_dict() | average

    def save(self, iteration: int) -> None:
        """Capture the moving average's reference; write a checkpoint, remove the previous one."""
        if self.ema and self.reference:
            self.reference.capture(self.ema.module)
        before = last_checkpoint_name(self.output_dir)
        super().save(iteration)
        if distributed.rank() == 0 and before not in (None, last_checkpoint_name(self.output_dir)):
            (self.output_dir / before).unlink(missing_ok=True)

    def _weights(self) -> dict[str, Tensor]:
        """Return the run's final weights: the moving average's if it exists, else the model's."""
        return (self.ema.module if self.ema else self.model).state_dict()

    def _write_backbone(self) -> None:
        """Write backbone.pkl and backbone.yaml, if Detectron2 can build the backbone."""
        if distributed.rank() != 0:
            return
        config = write_backbone(self.cfg, self.model, self._weights(), self.output_dir)
        if config is None:
            logger.warning("No backbone written: Detectron2 cannot build %s.", self.cfg.MODEL.NAME)
            return
        logger.info(
            "Wrote the backbone for Detectron2, and the config keys that it needs (%s):\n%s",
            self.output_dir / "backbone.yaml", yaml.safe_dump(config, sort_keys=False),
        )  # fmt: skip
