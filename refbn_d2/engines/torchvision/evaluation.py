"""Evaluate a detector on DATASETS.TEST."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from refbn_d2.engines.torchvision.data import (
    LoadedDataset,
    build_test_loader,
    load_test_dicts,
    train_class_names,
)
from refbn_d2.metrics import coco_ap
from refbn_d2.utils import distributed
from refbn_d2.utils.file_io import write_text
from refbn_d2.visualization.samples import SAMPLES_SHOWN, draw_samples, sample_item

logger = logging.getLogger(__name__)


class Evaluator:
    """Run a model over DATASETS.TEST, and write detections and pictures into `output_dir`.

    Args:
        class_names: the training set's, to match by name; None: read from DATASETS.TRAIN.

    Raises:
        ConfigError, DataError, FileNotFoundError: a test set cannot be used. All test sets are read
            here, so that errors show before a training and not after it.
    """

    def __init__(self, cfg, output_dir: Path, class_names: Sequence[str] | None = None) -> None:
        self.cfg, self.output_dir = cfg, output_dir
        if class_names is None and cfg.DATASETS.TEST:
            class_names = train_class_names(cfg)
        self.datasets = {
            name: load_test_dicts(cfg, name, class_names) for name in cfg.DATASETS.TEST
        }
        for data in self.datasets.values():
            data.check_pictures()

    def __call__(self, model: nn.Module) -> dict[str, dict]:
        """Return {dataset: {"bbox": {"AP": ...}, "segm": ...}} on worker 0, {} on the others."""
        results = {}
        model.eval()
        distributed.share_buffers(model)
        for name, data in self.datasets.items():
            found, shown = self._predict(model, data)
            if distributed.rank() != 0:
                continue
            folder = self.output_dir / "inference"
            if len(self.cfg.DATASETS.TEST) > 1:
                folder /= name
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "coco_instances_results.json", json.dumps(found))
            if not any(d["annotations"] for d in data.dicts):
                logger.warning(
                    "%s has no annotations: its detections are written to %s, without a score.",
                    name,
                    folder,
                )
                continue
            tasks = ("bbox", "segm") if self.cfg.MODEL.MASK_ON else ("bbox",)
            result = coco_ap.evaluate(
                data.write_truth(self.output_dir),
                found,
                tasks,
                data.class_names,
                self.cfg.TEST.MAX_DETS_PER_IMAGE,
            )
            logger.info("%s:\n%s", name, coco_ap.format_table(result))
            if not results:
                draw_samples(shown, data.class_names, self.output_dir / "samples.png")
            results[name] = result
        return results

    def _predict(self, model: nn.Module, data: LoadedDataset) -> tuple[list[dict], list[tuple]]:
        """Return COCO results, and the first images for `draw_samples`.

        Worker 0 gets the results of all workers, the others get [].
        """
        workers = distributed.world_size()
        # A batch has at most as many pixels as one image of Detectron2's usual size.
        batch_size = 800 * 1333 // max(1, self.cfg.INPUT.MAX_SIZE_TEST) ** 2
        batch_size = min(max(batch_size, 1), 16) if self.cfg.INPUT.MIN_SIZE_TEST else 1
        loader = build_test_loader(self.cfg, data.dicts, distributed.rank(), workers, batch_size)
        by_id = {d["image_id"]: d for d in data.dicts}
        to_dataset_id = {contiguous: id_ for id_, contiguous in data.id_map.items()}
        found, shown = [], []
        for samples in tqdm(loader, f"evaluating {data.name}", disable=None, leave=False):
            with torch.no_grad():
                predictions = model(samples)
            for sample, prediction in zip(samples, predictions, strict=True):
                found += coco_ap.to_coco_results(sample["image_id"], prediction, to_dataset_id)
                if len(shown) < SAMPLES_SHOWN:
                    shown.append(sample_item(by_id[sample["image_id"]], prediction))
        return [result for part in distributed.gather(found) for result in part], shown
