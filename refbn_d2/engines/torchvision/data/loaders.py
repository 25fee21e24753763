"""Build the loaders that yield batches of a detector's samples."""

import logging
import pickle
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from refbn_d2.data.samplers import GroupedBatchSampler, domains_of, start_worker
from refbn_d2.engines.torchvision.data.mapper import Mapper
from refbn_d2.reference.selection import is_landscape
from refbn_d2.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def build_train_loader(
    cfg,
    dataset_dicts: list[dict],
    start_iteration: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    group_of: Sequence[Hashable] | None = None,
) -> DataLoader:
    """Return an endless loader of batches: lists of IMS_PER_BATCH // world_size samples.

    With DATALOADER.ASPECT_RATIO_GROUPING a batch is all portrait or all landscape.

    Args:
        start_iteration: number of batches already used; the loader continues after them.
        seed: of the order and the augmentations; the same in all processes.
        group_of: one hashable per image of `dataset_dicts`; all images of a batch have the same.
            Default: with DATALOADER.BATCH_COMPOSITION "domain" the image's domain, else one group.

    Raises:
        ConfigError: IMS_PER_BATCH is not a multiple of world_size, or a value under INPUT is not
            allowed.
        DataError: no image is left after DATALOADER.FILTER_EMPTY_ANNOTATIONS; or BATCH_COMPOSITION
            is "domain", and an image has no domain (names the image).
    """
    if group_of is None and cfg.DATALOADER.BATCH_COMPOSITION == "domain":
        group_of = domains_of(dataset_dicts, cfg.DATALOADER.DOMAIN_FIELD)
    groups = [()] * len(dataset_dicts) if group_of is None else list(group_of)
    if len(groups) != len(dataset_dicts):
        raise ValueError(f"group_of has {len(groups)} entries for {len(dataset_dicts)} images")
    chosen = list(zip(dataset_dicts, groups, strict=True))
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        chosen = [(d, g) for d, g in chosen if has_objects(d)]
        logger.info("%d of %d images have objects", len(chosen), len(dataset_dicts))
    if not chosen:
        raise DataError(
            f"none of the {len(dataset_dicts)} training images has an annotation that is not a "
            "crowd, and DATALOADER.FILTER_EMPTY_ANNOTATIONS = "
            f"{cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS}. Add annotations, or set it to False."
        )
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        chosen = [(d, (g, is_landscape(d))) for d, g in chosen]
    dicts, groups = zip(*chosen, strict=True)
    sampler = GroupedBatchSampler(
        groups, cfg.SOLVER.IMS_PER_BATCH, seed, rank, world_size, start_iteration
    )
    return _loader(cfg, _MappedDicts(dicts, Mapper(cfg, is_train=True), seed), sampler)


def has_objects(dataset_dict: dict) -> bool:
    """Return whether DATALOADER.FILTER_EMPTY_ANNOTATIONS keeps it: some object is not a crowd."""
    return any(not annotation.get("iscrowd") for annotation in dataset_dict["annotations"])


def build_test_loader(
    cfg, dataset_dicts: list[dict], rank: int = 0, world_size: int = 1, batch_size: int = 1
) -> DataLoader:
    """Return a loader of lists of up to `batch_size` samples; each image comes once over all ranks.

    All images of a batch have the same size, so none is padded, and results do not depend on
    `batch_size`. Detectron2's is 1.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size of evaluation is {batch_size}; allowed: 1 or more")
    by_size = defaultdict(list)
    for i in range(rank, len(dataset_dicts), world_size):
        by_size[dataset_dicts[i]["height"], dataset_dicts[i]["width"]].append((i, i))
    batches = [
        indices[i : i + batch_size]
        for indices in by_size.values()
        for i in range(0, len(indices), batch_size)
    ]
    return _loader(cfg, _MappedDicts(dataset_dicts, Mapper(cfg, is_train=False), 0), batches)


def _loader(cfg, dataset: "_MappedDicts", batches) -> DataLoader:
    workers = cfg.DATALOADER.NUM_WORKERS
    if workers < 0:
        raise ConfigError(f"DATALOADER.NUM_WORKERS = {workers}; allowed: 0 or more")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_list,
        worker_init_fn=start_worker,
        # A separate generator, so that a new iterator does not change the model's random numbers.
        generator=torch.Generator(),
    )


def _as_list(samples: list[dict]) -> list[dict]:
    return samples


class _MappedDicts(TorchDataset):
    """Samples made of dataset dicts, indexed by (index, draw).

    The dicts are kept pickled in one array. COCO's annotations take gigabytes, and a worker that
    reads Python objects would copy their memory page by page, because it counts references.
    """

    def __init__(self, dicts: Sequence[dict], mapper: Mapper, seed: int):
        pickled = [np.frombuffer(pickle.dumps(d, -1), dtype=np.uint8) for d in dicts]
        self.ends = np.cumsum([len(p) for p in pickled])
        self.pickled = np.concatenate(pickled) if pickled else np.zeros(0, dtype=np.uint8)
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, draw = item
        start = self.ends[index - 1] if index else 0
        dataset_dict = pickle.loads(self.pickled[start : self.ends[index]].tobytes())
        return self.mapper(dataset_dict, np.random.default_rng([self.seed, draw]))
