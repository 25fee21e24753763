"""DATALOADER.BATCH_COMPOSITION "domain" in Detectron2's training loader.

Detectron2's loader makes batches of the indices that its sampler gives, in their order. So the
sampler gives the images of one domain one after the other, as many as a batch has.
"""

import inspect
import json
import logging
import os
from collections.abc import Hashable, Iterator, Sequence

from detectron2.data import MetadataCatalog
from detectron2.data.common import ToIterableDataset
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch.utils.data import Sampler

from refbn_d2.data.samplers import GroupedBatchSampler, domains_of
from refbn_d2.reference.selection import is_landscape
from refbn_d2.utils.errors import ConfigError

logger = logging.getLogger(__name__)

COMPOSITIONS = ("iid", "domain")


class DomainSampler(Sampler):
    """This worker's indices: the batches of a `GroupedBatchSampler`, one after the other."""

    def __init__(self, groups: Sequence[Hashable], batch_size: int, seed: int) -> None:
        self.batches = GroupedBatchSampler(
            groups, batch_size, seed, comm.get_rank(), comm.get_world_size()
        )

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches:
            yield from (index for index, _ in batch)


def with_domains(cfg, arguments: dict) -> dict:
    """The arguments of `build_detection_train_loader`, for batches of one domain where asked for.

    With DATALOADER.ASPECT_RATIO_GROUPING a batch is also all portrait or all landscape.

    Raises:
        ConfigError: DATALOADER.BATCH_COMPOSITION is another word, or does not go with another key.
        DataError: an image has no domain; names it.
    """
    loader = cfg.DATALOADER
    composition = loader.get("BATCH_COMPOSITION", "iid")
    if composition == "iid":
        return arguments
    if composition not in COMPOSITIONS:
        raise ConfigError(
            f"DATALOADER.BATCH_COMPOSITION = {composition!r}; allowed: 'iid' or 'domain'"
        )
    if loader.SAMPLER_TRAIN != "TrainingSampler":
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN = {loader.SAMPLER_TRAIN!r} cannot make batches of one "
            "domain; use 'TrainingSampler', or DATALOADER.BATCH_COMPOSITION 'iid'"
        )
    chunks = "shard_chunk_size" in inspect.signature(ToIterableDataset).parameters
    if loader.NUM_WORKERS > 1 and not chunks:  # release 0.6 deals single images to its workers
        raise ConfigError(
            f"DATALOADER.NUM_WORKERS = {loader.NUM_WORKERS}: this Detectron2 mixes batches of one "
            "domain with several workers; use 0 or 1"
        )
    dicts = _with_field(arguments["dataset"], cfg.DATASETS.TRAIN, loader.DOMAIN_FIELD)
    groups: list[Hashable] = list(domains_of(dicts, loader.DOMAIN_FIELD))
    if loader.ASPECT_RATIO_GROUPING:
        groups = [(group, is_landscape(d)) for group, d in zip(groups, dicts, strict=True)]
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    logger.info("Batches of one domain each: %d groups of images.", len(set(groups)))
    sampler = DomainSampler(groups, cfg.SOLVER.IMS_PER_BATCH, seed)
    return arguments | {"sampler": sampler, "aspect_ratio_grouping": False}


def _with_field(dicts: Sequence[dict], names: Sequence[str], field: str) -> list[dict]:
    """The dataset dicts with "domain" from their jsons: Detectron2's reader leaves it out."""
    known: dict[tuple[str, Hashable], Hashable] = {}
    for name in names:
        metadata = MetadataCatalog.get(name)
        json_file, root = metadata.get("json_file"), metadata.get("image_root", "")
        if json_file is None:
            continue
        with PathManager.open(json_file) as file:
            for image in json.load(file)["images"]:
                known[os.path.join(root, image["file_name"]), image["id"]] = image.get(field)
    return [
        d | {"domain": d.get(field, known.get((d["file_name"], d.get("image_id"))))} for d in dicts
    ]
