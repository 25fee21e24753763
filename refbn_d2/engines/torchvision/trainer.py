"""Training and evaluation of a detector on torchvision's operators, out of a Detectron2 config.

Whatever is random in an iteration is a function of (seed, rank, iteration): a resumed run repeats
the straight one without any random state in the checkpoint.
"""

import json
import logging
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from tqdm import tqdm

from refbn_d2.checkpoint.files import load_checkpoint, load_weights, save_checkpoint, write_text
from refbn_d2.config import ConfigError, refbn_options
from refbn_d2.config.node import leaves
from refbn_d2.layers import refbn_layers
from refbn_d2.metrics import coco_ap
from refbn_d2.pictures import SAMPLES_SHOWN, draw_samples, plot_curves, sample_item
from refbn_d2.reference import ReferenceBatch, image_rows, is_landscape, select

from . import distributed
from .data import (
    LoadedDataset,
    Mapper,
    build_test_loader,
    build_train_loader,
    has_objects,
    load_test_dicts,
    load_train_dicts,
)
from .events import WINDOW, EventWriter, setup_logging
from .modeling import build_model
from .solver import build_optimizer, gradient_clipper, lr_multiplier

logger = logging.getLogger(__name__)

# What may differ between a run and its resumption without making it another run.
FREE_ON_RESUME = (
    "MODEL.DEVICE", "MODEL.WEIGHTS", "OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "DATASETS.TEST",
    "DATASETS.REGISTER", "TEST.", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "VIS_PERIOD",
    "CUDNN_BENCHMARK",
)  # fmt: skip


def main(cfg, resume: bool, eval_only: bool, allow_partial_weights: bool = False) -> dict:
    """Train, then evaluate (or only evaluate) in this worker process.

    Returns:
        {dataset: {"bbox": {"AP": ...}, "segm": ...}} on worker 0, {} on the others.

    Raises:
        ValueError, FileNotFoundError: a config, dataset or checkpoint that cannot be used.
        FloatingPointError: a loss became infinite or NaN; names iteration and loss.
        SystemExit: interrupted (128 + signal), or TEST.EXPECTED_RESULTS were not reached (1).
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not eval_only:
        _check_output_dir(cfg, output_dir, resume)
    setup_logging(output_dir, distributed.rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    trainer = Trainer(cfg, output_dir, resume, allow_partial_weights, training=not eval_only)
    if eval_only:
        results = trainer.evaluate()
    else:
        results = trainer.train()
    if distributed.rank() == 0 and cfg.TEST.EXPECTED_RESULTS:
        first = next(iter(results.values()), {})
        if not coco_ap.verify_results(cfg.TEST.EXPECTED_RESULTS, first):
            raise SystemExit(1)
    return results


class Trainer:
    """One run: model, data, optimizer, reference batch and their state on disk."""

    def __init__(
        self, cfg, output_dir: Path, resume: bool, allow_partial_weights: bool, training: bool
    ) -> None:
        self.cfg, self.output_dir = cfg, output_dir
        self.device = torch.device(cfg.MODEL.DEVICE)
        # All of them now: what is wrong with one should not come out at the end of the training.
        self.test_data = {name: load_test_dicts(cfg, name) for name in cfg.DATASETS.TEST}
        checkpoint = self._last_checkpoint() if resume else None
        if resume and checkpoint is None:
            logger.warning("--resume: %s holds no checkpoint yet; starting anew.", output_dir)
        self.seed = checkpoint["seed"] if checkpoint else distributed.broadcast(_seed(cfg))
        torch.manual_seed(self.seed)
        self.model = build_model(cfg)
        self.start_iteration = 0
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
            self.start_iteration = checkpoint["iteration"] + 1
        elif cfg.MODEL.WEIGHTS:
            state = load_checkpoint(cfg.MODEL.WEIGHTS)["model"]
            load_weights(self.model, state, cfg.MODEL.WEIGHTS, allow_partial_weights)
        elif not training:
            logger.warning("MODEL.WEIGHTS is empty: evaluating a model of random weights.")
        if not training and not self.test_data:
            raise ConfigError("DATASETS.TEST is empty: --eval-only has nothing to evaluate on.")
        if training:
            self._prepare_training(checkpoint)

    def _prepare_training(self, checkpoint: dict | None) -> None:
        cfg = self.cfg
        data = load_train_dicts(cfg)
        self.optimizer = build_optimizer(cfg, self.model)
        self.multiplier = lr_multiplier(cfg)
        self.clip_gradients = gradient_clipper(cfg)
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        self.autocast = torch.autocast(self.device.type, half, enabled=cfg.SOLVER.AMP.ENABLED)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=cfg.SOLVER.AMP.ENABLED and half == torch.float16
        )
        self.loader = build_train_loader(
            cfg, data.dicts, self.start_iteration, distributed.rank(), distributed.world_size(),
            self.seed,
        )  # fmt: skip
        self.reference = None
        if any(True for _ in refbn_layers(self.model)):
            self.reference = self._reference(data, checkpoint)
        self.wrapped = self.model
        if distributed.world_size() > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(
                self.model,
                device_ids=[torch.cuda.current_device()] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
            )
        if checkpoint:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["grad_scaler"]:  # empty where the run was on the CPU so far
                self.scaler.load_state_dict(checkpoint["grad_scaler"])
            logger.info("Resumed at iteration %d.", self.start_iteration)

    def _reference(self, data, checkpoint: dict | None) -> ReferenceBatch:
        """The reference batch: the checkpoint's again, or chosen and captured."""
        cfg, options = self.cfg, refbn_options(self.cfg)
        names = " + ".join(cfg.DATASETS.TRAIN)
        dicts = data.dicts
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            dicts = [d for d in dicts if has_objects(d)]
        group_of = is_landscape if cfg.DATALOADER.ASPECT_RATIO_GROUPING else lambda d: None
        state = checkpoint and checkpoint["refbn"]
        chosen, identity = select(dicts, options, names, group_of, state)
        mapper = Mapper(cfg, is_train=True)
        samples = [
            mapper(dicts[index], np.random.default_rng([options.seed, place]))
            for place, index in enumerate(
                tqdm(chosen, "reference batch", disable=None, leave=False)
            )
        ]

        def forward(samples: list[dict]) -> None:
            with self.autocast:
                self.model(samples)

        reference = ReferenceBatch(
            self.model, samples, forward, options, identity, self.model.backbone,
            image_rows(self.model),
        )  # fmt: skip
        if state:
            reference.load_state_dict(state)
        else:
            self.model.train()
            reference.begin()
        return reference

    def train(self) -> dict:
        """The loop, from `start_iteration` to SOLVER.MAX_ITER; returns the last evaluation."""
        cfg, results = self.cfg, {}
        main_process = distributed.rank() == 0
        if main_process:
            write_text(self.output_dir / "config.yaml", cfg.dump())
            writer = EventWriter(self.output_dir, self.start_iteration, cfg.SOLVER.MAX_ITER)
        batches = iter(self.loader)
        self.model.train()
        with _stop_signal() as stop:
            for iteration in range(self.start_iteration, cfg.SOLVER.MAX_ITER):
                start = time.perf_counter()
                samples = next(batches)
                data_time = time.perf_counter() - start
                lr, losses = self._step(iteration, samples)
                last = iteration + 1 == cfg.SOLVER.MAX_ITER
                report = last or (iteration + 1) % WINDOW == 0
                if report:  # with the workers' mean losses; they agree whether to stop
                    *values, stopping = distributed.mean_over_workers(
                        [*losses.values(), stop.number], self.device
                    )
                    losses = dict(zip(losses, values, strict=True))
                elif distributed.world_size() == 1:
                    stopping = stop.number
                else:
                    stopping = 0
                if main_process:
                    times = {"time": time.perf_counter() - start, "data_time": data_time}
                    writer.step({**losses, **times})
                    if report:
                        writer.write(iteration, lr)
                period = cfg.SOLVER.CHECKPOINT_PERIOD
                if last or stopping or (iteration + 1) % period == 0:
                    self._save(iteration, "model_final" if last else f"model_{iteration:07d}")
                if stopping and not last:
                    logger.warning(
                        "Interrupted after iteration %d; its checkpoint is written. Go on with "
                        "--resume.",
                        iteration,
                    )
                    if main_process:
                        writer.close()
                    distributed.barrier()  # none is gone before the checkpoint is there
                    raise SystemExit(128 + (stop.number or signal.SIGTERM))
                if last or (cfg.TEST.EVAL_PERIOD and (iteration + 1) % cfg.TEST.EVAL_PERIOD == 0):
                    results = self.evaluate()
                    self.model.train()
                    if main_process:
                        self._show(writer, iteration, results)
        if self.start_iteration >= cfg.SOLVER.MAX_ITER:  # all but the last evaluation was done
            results = self.evaluate()
            if main_process:
                self._show(writer, cfg.SOLVER.MAX_ITER - 1, results)
        if main_process:
            writer.close()
        return results

    def _show(self, writer: EventWriter, iteration: int, results: dict[str, dict]) -> None:
        if results:
            writer.write_results(iteration, _flat(results))
        try:
            plot_curves(self.output_dir / "metrics.json", self.output_dir / "curves.png")
        except ValueError as error:  # nothing to draw yet
            logger.warning("No curves.png: %s", error)

    def _step(self, iteration: int, samples: list[dict]) -> tuple[float, dict[str, float]]:
        """One optimizer step; the learning rate and the losses of this worker."""
        state = np.random.SeedSequence([self.seed, distributed.rank(), iteration])
        torch.manual_seed(int(state.generate_state(1)[0]))
        factor = self.multiplier(iteration / self.cfg.SOLVER.MAX_ITER)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if self.reference:
            self.reference.before_step(iteration)
        with self.autocast:
            try:
                losses = self.wrapped(samples)
            except FloatingPointError as error:  # proposals that are not finite
                raise self._diverged(iteration, error) from error
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        if self.reference:
            self.reference.after_step()
        names = ["total_loss", *losses]
        values = torch.stack([total, *losses.values()]).tolist()  # the one read of the device
        losses = dict(zip(names, values, strict=True))
        if not np.isfinite(losses["total_loss"]):
            raise self._diverged(iteration, losses)
        self.scaler.unscale_(self.optimizer)
        self.clip_gradients(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.cfg.SOLVER.BASE_LR * factor, losses

    def _diverged(self, iteration: int, what: object) -> FloatingPointError:
        return FloatingPointError(
            f"The loss became infinite or NaN at iteration {iteration}: {what}. Lower "
            "SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS. Last good checkpoint: "
            f"{_last_checkpoint_name(self.output_dir) or 'none yet'}."
        )

    def evaluate(self) -> dict[str, dict]:
        """{dataset: AP} of DATASETS.TEST on worker 0, {} on others; draws the first's pictures."""
        results = {}
        self.model.eval()
        distributed.share_buffers(self.model)
        for name, data in self.test_data.items():
            found, shown = self._predict(data)
            if distributed.rank() != 0:
                continue
            folder = self.output_dir / "inference"
            if len(self.cfg.DATASETS.TEST) > 1:
                folder /= name
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "coco_instances_results.json", json.dumps(found))
            if not any(d["annotations"] for d in data.dicts):
                logger.warning("%s has no annotations: %s is written, not scored.", name, folder)
                continue
            tasks = ("bbox", "segm") if self.cfg.MODEL.MASK_ON else ("bbox",)
            result = coco_ap.evaluate(
                data.json_file, found, tasks, data.class_names, self.cfg.TEST.DETECTIONS_PER_IMAGE
            )
            logger.info("%s:\n%s", name, coco_ap.format_table(result))
            if not results:
                draw_samples(shown, data.class_names, self.output_dir / "samples.png")
            results[name] = result
        return results

    def _predict(self, data: LoadedDataset) -> tuple[list[dict], list[tuple]]:
        """COCO results of all workers (on worker 0), and the first images with both sides drawn."""
        workers = distributed.world_size()
        # No more pixels than one image of Detectron2's usual size has.
        batch_size = 800 * 1333 // max(1, self.cfg.INPUT.MAX_SIZE_TEST) ** 2
        batch_size = min(max(batch_size, 1), 16) if self.cfg.INPUT.MIN_SIZE_TEST else 1
        loader = build_test_loader(self.cfg, data.dicts, distributed.rank(), workers, batch_size)
        by_id = {d["image_id"]: d for d in data.dicts}
        to_dataset_id = {contiguous: id_ for id_, contiguous in data.id_map.items()}
        found, shown = [], []
        for samples in tqdm(loader, f"evaluating {data.name}", disable=None, leave=False):
            with torch.no_grad():
                predictions = self.model(samples)
            for sample, prediction in zip(samples, predictions, strict=True):
                found += coco_ap.to_coco_results(sample["image_id"], prediction, to_dataset_id)
                if len(shown) < SAMPLES_SHOWN:
                    shown.append(sample_item(by_id[sample["image_id"]], prediction))
        return [result for part in distributed.gather(found) for result in part], shown

    def _save(self, iteration: int, name: str) -> None:
        if distributed.rank() != 0:
            return
        checkpoint = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.scaler.state_dict(),
            "iteration": iteration,
            "seed": self.seed,
        }
        if self.reference:
            checkpoint["refbn"] = self.reference.state_dict()
        save_checkpoint(checkpoint, self.output_dir / f"{name}.pth")
        write_text(self.output_dir / "last_checkpoint", f"{name}.pth")

    def _last_checkpoint(self) -> dict | None:
        name = _last_checkpoint_name(self.output_dir)
        if name is None:
            return None
        path = self.output_dir / name
        checkpoint = load_checkpoint(path)
        missing = {"optimizer", "grad_scaler", "iteration", "seed"} - set(checkpoint)
        if missing:
            raise ValueError(
                f"{path} was not written by a training run of this engine (it lacks "
                f"{', '.join(sorted(missing))}), so --resume cannot go on with it. Start from "
                f"it in another OUTPUT_DIR with MODEL.WEIGHTS {path}"
            )
        return checkpoint


def _seed(cfg) -> int:
    """SEED, or a random one where it is negative."""
    return cfg.SEED if cfg.SEED >= 0 else random.SystemRandom().randrange(2**31)


def _flat(results: dict[str, dict]) -> dict[str, float]:
    """{"bbox/AP": ...}, with the dataset's name in front where there are several."""
    return {
        "/".join([name, task, metric] if len(results) > 1 else [task, metric]): value
        for name, tasks in results.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    }


def _last_checkpoint_name(output_dir: Path) -> str | None:
    try:
        return (output_dir / "last_checkpoint").read_text().strip()
    except FileNotFoundError:
        return None


def _check_output_dir(cfg, output_dir: Path, resume: bool) -> None:
    """A run is neither overwritten by another nor resumed as another."""
    if _last_checkpoint_name(output_dir) is None:
        return
    if not resume:
        raise FileExistsError(
            f"OUTPUT_DIR {output_dir} holds a run already. Go on with it by --resume, or name "
            "another OUTPUT_DIR."
        )
    before = dict(leaves(yaml.safe_load((output_dir / "config.yaml").read_text())))
    now = dict(leaves(yaml.safe_load(cfg.dump())))
    changed = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE_ON_RESUME)
    ]
    if changed:
        raise ValueError(
            f"--resume: {output_dir} holds a run of another config. "
            + "; ".join(changed)
            + ". Use its config, or another OUTPUT_DIR."
        )


class _Stop:
    """The signal that asked to stop; 0 while none did."""

    number = 0

    def __call__(self, number: int, frame) -> None:
        self.number = number
        print("Stopping: a checkpoint will be written. Again: at once.", file=sys.stderr)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    stop = _Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
