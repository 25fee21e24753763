"""Training and evaluation of a detector on torchvision's operators, out of a Detectron2 config."""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.checkpoint.loading import load_weights
from refbn_d2.config import ConfigError, refbn_options
from refbn_d2.config.resume import FREE_IN_DETECTION
from refbn_d2.engines.torchvision.data import (
    LoadedDataset,
    Mapper,
    build_test_loader,
    build_train_loader,
    has_objects,
    load_test_dicts,
    load_train_dicts,
)
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.engines.torchvision.solver import build_optimizer, gradient_clipper, lr_multiplier
from refbn_d2.layers import has_refbn
from refbn_d2.metrics import coco_ap
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.reference.detection import image_rows
from refbn_d2.reference.selection import is_landscape, select_reference
from refbn_d2.training.events import setup_logging
from refbn_d2.training.loop import TrainingLoop
from refbn_d2.training.output_dir import check_output_dir, last_checkpoint
from refbn_d2.utils import distributed
from refbn_d2.utils.file_io import write_text
from refbn_d2.utils.random_state import seed_everything, seed_of_run
from refbn_d2.visualization.samples import SAMPLES_SHOWN, draw_samples, sample_item

logger = logging.getLogger(__name__)


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
        check_output_dir(cfg, resume, FREE_IN_DETECTION)
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


class Trainer(TrainingLoop):
    """One run: model, data, optimizer, reference batch and their state on disk."""

    def __init__(
        self, cfg, output_dir: Path, resume: bool, allow_partial_weights: bool, training: bool
    ) -> None:
        self.cfg, self.output_dir = cfg, output_dir
        self.device = torch.device(cfg.MODEL.DEVICE)
        # All of them now: what is wrong with one should not come out at the end of the training.
        self.test_data = {name: load_test_dicts(cfg, name) for name in cfg.DATASETS.TEST}
        checkpoint = last_checkpoint(output_dir) if resume else None
        self.seed = checkpoint["seed"] if checkpoint else seed_of_run(cfg)
        torch.manual_seed(self.seed)
        self.model = build_model(cfg)
        self.start_iteration = checkpoint["iteration"] + 1 if checkpoint else 0
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
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
        self.max_iter, self.eval_period = cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD
        self.checkpoint_period = cfg.SOLVER.CHECKPOINT_PERIOD
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
        if has_refbn(self.model):
            self.reference = self._reference(data, checkpoint)
        self.wrapped = distributed.data_parallel(self.model, self.device)
        if checkpoint:
            self.load_state_dict(checkpoint)

    def _reference(self, data, checkpoint: dict | None) -> ReferenceBatch:
        """The reference batch: the checkpoint's again, or chosen and captured."""
        cfg, options = self.cfg, refbn_options(self.cfg)
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
                self.model(samples)

        reference = ReferenceBatch(
            self.model,
            samples,
            options,
            forward=forward,
            identity=identity,
            concat_to=self.model.backbone,
            rows=image_rows(self.model),
        )
        if state:
            reference.load_state_dict(state)
        else:
            self.model.train()
            reference.begin()
        return reference

    def step(self, iteration: int, samples: list[dict]) -> tuple[float, dict[str, float]]:
        """One optimizer step; the learning rate and the losses of this worker."""
        seed_everything(self.seed, distributed.rank(), iteration)
        factor = self.multiplier(iteration / self.cfg.SOLVER.MAX_ITER)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if self.reference:
            self.reference.before_step(iteration)
        with self.autocast:
            try:
                losses = self.wrapped(samples)
            except FloatingPointError as error:  # proposals that are not finite
                raise self.diverged(iteration, error) from error
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        if self.reference:
            self.reference.after_step()
        names = ["total_loss", *losses]
        values = torch.stack([total, *losses.values()]).tolist()  # the one read of the device
        losses = dict(zip(names, values, strict=True))
        if not np.isfinite(losses["total_loss"]):
            raise self.diverged(iteration, losses)
        self.scaler.unscale_(self.optimizer)
        self.clip_gradients(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.cfg.SOLVER.BASE_LR * factor, losses

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

    def scalars(self, results: dict[str, dict]) -> dict[str, float]:
        """{"bbox/AP": ...}, with the dataset's name in front where there are several."""
        return {
            "/".join([name, task, metric] if len(results) > 1 else [task, metric]): value
            for name, tasks in results.items()
            for task, metrics in tasks.items()
            for metric, value in metrics.items()
        }
