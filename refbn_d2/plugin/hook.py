"""Run the reference batch in Detectron2's training loops: by a trainer hook, or by hand.

In a loop without a trainer (Detectron2's `tools/plain_train_net.py`):

    reference = reference_batch(model, data_loader, refbn_options(cfg), cfg.DATASETS.TRAIN)
    with EventStorage(start_iter) as storage:
        for iteration, data in zip(range(start_iter, max_iter), data_loader, strict=False):
            with reference.step(iteration):
                loss = sum(model(data).values())
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            scheduler.step()
            storage.step()
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from detectron2.data.common import AspectRatioGroupedDataset, MapDataset
from detectron2.engine.hooks import IterationTimer
from detectron2.engine.train_loop import AMPTrainer, HookBase
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from refbn_d2.config import RefBNOptions, apply_options, refbn_options
from refbn_d2.layers.peers import restart_peers
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.reference.detection import image_rows
from refbn_d2.reference.selection import is_landscape, select_reference
from refbn_d2.utils.errors import DataError
from refbn_d2.utils.random_state import seeded

logger = logging.getLogger(__name__)


class ReferenceBatchHook(HookBase):
    """Choose the reference batch of a training run, capture it, and refresh it.

    The images come from the trainer's data loader and its mapper. The checkpoint names the images
    and the position of the next slice, so that a resumed run finds them again. The moments are in
    the model's state. All workers get the same references.

    `import refbn_d2` adds this hook to every trainer whose model has RefBN layers: DefaultTrainer,
    and SimpleTrainer and AMPTrainer in LazyConfig scripts. To use other options or images, register
    a hook yourself; it replaces that one.

    Args:
        options: by default those of the trainer's `cfg`. Without a `cfg`, the defaults, with each
            layer's own reference_weight, weighting and gradient. A layer also keeps its own where
            `options` has None.
        dataset: dataset dicts to choose from, with "file_name"; by default those of the trainer's
            data loader, which must then come from build_detection_train_loader.
        mapper: dataset dict -> sample; by default the data loader's.

    Raises:
        ValueError: only one of `dataset` and `mapper` is given.
    """

    def __init__(
        self,
        options: RefBNOptions | None = None,
        dataset: Sequence[dict] | None = None,
        mapper: Callable[[dict], dict] | None = None,
    ) -> None:
        if (dataset is None) != (mapper is None):
            raise ValueError("ReferenceBatchHook takes dataset and mapper together, or neither.")
        self.options = options
        self.images = None if dataset is None else _Images(dataset, mapper)
        self.reference: ReferenceBatch | None = None  # from before_train on
        self._state: dict = {}  # of a checkpoint

    def before_train(self) -> None:
        """Choose and capture the reference; in a resumed run, find the checkpoint's images again.

        Raises:
            ConfigError: there are too few images, one has changed, or workers have different ones.
            TypeError: the data loader has no dataset dicts to choose from.
        """
        trainer, options, names = self.trainer, self.options, ()
        self._put_in_front()
        _log_as_detectron2()
        model = unwrapped(trainer.model)
        if options:
            apply_options(model, options)
        if hasattr(trainer, "cfg"):
            names = trainer.cfg.DATASETS.TRAIN
            options = options or refbn_options(trainer.cfg)
        inner = getattr(trainer, "_trainer", trainer)  # DefaultTrainer's
        autocast = nullcontext
        if isinstance(inner, AMPTrainer):
            precision = getattr(inner, "precision", torch.float16)  # release 0.6 always has float16
            autocast = functools.partial(torch.autocast, "cuda", precision)
        images = self.images or _images(trainer.data_loader)
        self.reference = _reference_batch(
            model, images, options or RefBNOptions(), names, autocast, self._state
        )
        if self._state:
            self.reference.load_state_dict(self._state)
            return
        if trainer.start_iter > 0:
            logger.warning("The checkpoint names no reference batch; a new one is taken.")
        self.reference.begin()

    def before_step(self) -> None:
        self.reference.before_step(self.trainer.iter)

    def after_step(self) -> None:
        self.reference.after_step()

    def state_dict(self) -> dict:
        """Return the reference's identity and the next slice's position; {} before it is chosen."""
        return self.reference.state_dict() if self.reference else self._state

    def load_state_dict(self, state: dict) -> None:
        """Continue with the reference batch of `state`, once training starts."""
        self._state = state

    def _put_in_front(self) -> None:
        """Move this hook before those that save or evaluate the model.

        It stays after the timer, which measures it too.
        """
        others = [hook for hook in self.trainer._hooks if hook is not self]
        place = 0
        while place < len(others) and isinstance(others[place], IterationTimer | PeerRestartHook):
            place += 1
        # A new list: the trainer is iterating over the old one.
        self.trainer._hooks = [*others[:place], self, *others[place:]]


class PeerRestartHook(HookBase):
    """Start the schedules of peer norms at step 0, unless the run is resumed.

    `import refbn_d2` adds this hook to every trainer whose model has such norms. Without it the
    weights of another run would bring that run's steps along. It comes before the reference batch
    is captured.
    """

    def before_train(self) -> None:
        if self.trainer.start_iter == 0:
            restart_peers(self.trainer.model)


def _log_as_detectron2() -> None:
    """Log to Detectron2's handlers if the script has set up only those."""
    ours, theirs = logging.getLogger("refbn_d2"), logging.getLogger("detectron2")
    if not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
            ours.propagate = theirs.propagate  # False: root's handlers would repeat each line
        ours.setLevel(logging.INFO)


def reference_batch(
    model: nn.Module,
    data_loader: Iterable,
    options: RefBNOptions,
    dataset_names: Sequence[str] = (),
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> ReferenceBatch:
    """Return the reference batch of a training loop without hooks.

    Args:
        model: a model of Detectron2; it may be wrapped by DistributedDataParallel.
        data_loader: from build_detection_train_loader; images and mapper are taken from it.
        options: `refbn_d2.config.refbn_options(cfg)`.
        dataset_names: for log and checkpoint.
        autocast: returns the context in which training runs its forward pass.

    Raises:
        ConfigError: there are too few images, or workers have different ones.
        TypeError: the data loader has no dataset dicts to choose from.
    """
    images = _images(data_loader)
    return _reference_batch(unwrapped(model), images, options, dataset_names, autocast, {})


class _Images(NamedTuple):
    """The images that a reference batch is chosen from."""

    dicts: Sequence[dict]
    mapper: Callable[[dict], dict | None]
    grouped: bool = False  # training batches are of one aspect ratio group


class _WithFiles(Sequence):
    """Dataset dicts whose files `select_reference` reads by Detectron2's PathManager."""

    def __init__(self, dicts: Sequence[dict]) -> None:
        self.dicts = dicts

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, index: int) -> dict:
        return {"read_file": _read_file, **self.dicts[index]}


def _read_file(path: str) -> bytes:
    with PathManager.open(path, "rb") as file:
        return file.read()


def _images(data_loader: Iterable) -> _Images:
    """Return the dataset dicts and the mapper inside a loader of build_detection_train_loader."""
    grouped, inside = False, data_loader
    while inside is not None and not isinstance(inside, MapDataset):
        grouped = grouped or isinstance(inside, AspectRatioGroupedDataset)
        inside = getattr(inside, "dataset", getattr(inside, "_dataset", None))
    if inside is None or not isinstance(inside._dataset[0], dict):
        raise TypeError(
            f"RefBN cannot choose a reference batch from a {type(data_loader).__name__}: it needs "
            "dataset dicts that can be indexed, as in build_detection_train_loader. Register "
            "refbn_d2.plugin.ReferenceBatchHook(dataset=..., mapper=...) with your own."
        )
    return _Images(inside._dataset, inside._map_func, grouped)


def _reference_batch(
    model: nn.Module,
    images: _Images,
    options: RefBNOptions,
    dataset_names: Sequence[str],
    autocast: Callable[[], AbstractContextManager],
    state: dict,
) -> ReferenceBatch:
    dataset = " + ".join(dataset_names) or "the training set"
    group_of = is_landscape if images.grouped else lambda dataset_dict: None
    chosen, identity = select_reference(_WithFiles(images.dicts), options, dataset, group_of, state)
    with seeded(options.seed):  # Detectron2's augmentations draw from the global generators
        samples = [
            _sample(images, index) for index in tqdm(chosen, "reference batch", disable=None)
        ]

    def forward(samples: list[dict]) -> None:
        # A separate storage, not kept. At iteration 0 Detectron2 would draw pictures.
        with EventStorage(1), autocast():
            model(samples)

    return ReferenceBatch(
        model,
        samples,
        options,
        forward=forward,
        identity=identity,
        concat_to=getattr(model, "backbone", None),
        rows=image_rows(model) if hasattr(model, "pixel_mean") else None,
    )


def _sample(images: _Images, index: int) -> dict:
    dataset_dict = images.dicts[index]
    sample = images.mapper(dataset_dict)
    if sample is None:
        raise DataError(
            f"The mapper gives no sample for {dataset_dict['file_name']}, an image of the reference"
            " batch. Remove it from the training set, or choose other images by MODEL.REFBN.SEED."
        )
    return sample


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or `model` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
