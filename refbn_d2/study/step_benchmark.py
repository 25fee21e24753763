"""Compare the time and the memory of a training step of detectors that differ in their norm."""

import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from refbn_d2.config import get_cfg
from refbn_d2.config.checks import check_batch
from refbn_d2.data.shapes import CLASSES
from refbn_d2.data.shapes.dataset import make_detection
from refbn_d2.engines.torchvision.supported import check_supported
from refbn_d2.engines.torchvision.trainer import Trainer
from refbn_d2.utils.device import resolve_device

BATCHES = 4  # different ones, which the steps use in turn


def compare_steps(
    config_files: list[str],
    overrides: list[str],
    size: tuple[int, int],
    num_images: int,
    rounds: int,
    steps: int,
) -> str:
    """Return a Markdown table: seconds a step, its ratio to the first config's, and peak memory.

    The pictures are synthetic shapes, and are loaded before the clock starts. The weights are
    random and stay so: the learning rate is 1e-9. In each round all configs take turns, so that a
    change of the machine's speed affects all of them.

    Args:
        config_files: of `engines.torchvision`.
        overrides: config keys and values for all of them.
        size: height and width of the pictures.
        num_images: in a step.
        rounds: whose medians count, that of the times and that of their ratios.
        steps: in a round, a multiple of MODEL.REFBN.REFRESH_PERIOD, so that every round has as many
            refreshes of the reference.
    """
    with tempfile.TemporaryDirectory() as folder:
        shapes = make_detection(folder, size=size, num_train=64, num_val=1)
        runs = [
            _Run(file, overrides, shapes, size, num_images, Path(folder, str(number)))
            for number, file in enumerate(tqdm(config_files, "models", disable=None, leave=False))
        ]
        with tqdm(total=rounds * len(runs), desc="steps", disable=None, leave=False) as bar:
            for _ in range(rounds):
                for run in runs:
                    run.measure(steps)
                    bar.update()
    return _table(runs)


class _Run:
    """A detector in training, and what its steps took."""

    def __init__(
        self, file: str, overrides: list[str], shapes: Path, size: tuple[int, int],
        num_images: int, output_dir: Path,
    ) -> None:  # fmt: skip
        cfg = get_cfg()
        cfg.merge_from_file(file)
        name = f"shapes of {shapes.parent}"  # a process can register a name only once
        data = (name, str(shapes / "annotations/instances_train.json"), str(shapes / "train"))
        classes = len(CLASSES)
        cfg.merge_from_list([
            "DATASETS.REGISTER", (data,), "DATASETS.TRAIN", (name,), "DATASETS.TEST", (),
            "INPUT.MIN_SIZE_TRAIN", (min(size),), "INPUT.MAX_SIZE_TRAIN", max(size),
            "SOLVER.IMS_PER_BATCH", num_images, "SOLVER.BASE_LR", 1e-9, "MODEL.WEIGHTS", "",
            "MODEL.ROI_HEADS.NUM_CLASSES", classes, "MODEL.RETINANET.NUM_CLASSES", classes,
            "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0, *overrides,
        ])  # fmt: skip
        check_supported(cfg)
        check_batch(cfg, 1)
        cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
        self.name = Path(file).stem
        self.iteration = 0
        self.seconds: list[float] = []
        before = _allocated()
        output_dir.mkdir()
        self.trainer = Trainer(cfg, output_dir)
        self.trainer.model.train()
        self.batches = list(islice(self.trainer.loader, BATCHES))
        self.steps(BATCHES)  # warms up, and allocates the momenta
        self.own = _allocated() - before  # weights, gradients, momenta, reference images
        self.peak = 0

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.trainer.step(self.iteration, self.batches[self.iteration % BATCHES])
            self.iteration += 1

    def measure(self, steps: int) -> None:
        before = _allocated()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.steps(steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append((time.perf_counter() - start) / steps)
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before + self.own)


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _table(runs: list[_Run]) -> str:
    lines = ["| config | ms a step | ratio | peak memory (GiB) |", "|---|---|---|---|"]
    for run in runs:
        pairs = zip(run.seconds, runs[0].seconds, strict=True)
        ratio = median(own / first for own, first in pairs)
        memory = f"{run.peak / 2**30:.2f}" if run.peak else "-"
        lines.append(f"| {run.name} | {1000 * median(run.seconds):.1f} | {ratio:.2f} | {memory} |")
    return "\n".join(lines)
