"""Batches of one domain in Detectron2's own training loader."""

import json
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from refbn_d2.utils.errors import ConfigError, DataError

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytestmark = pytest.mark.detectron2

DOMAINS = ["a", "b", "a", "c", "b", "a", "a", "b", "a", "b", "b", "a"]


@pytest.fixture
def cfg(detectron2_cfg, tmp_path):
    """Twelve pictures of three domains by "domain", and of two by "camera"."""
    images, annotations = [], []
    for i, domain in enumerate(DOMAINS):
        h, w = ((32, 24), (24, 32))[i % 4 > 1]
        Image.fromarray(np.full((h, w, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": h, "width": w,
                       "domain": domain, "camera": i % 2})  # fmt: skip
        annotations.append({"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0,
                            "bbox": [2, 2, 9, 9], "area": 81,
                            "segmentation": [[2, 2, 11, 2, 11, 11]]})  # fmt: skip
    categories = [{"id": 1, "name": "thing"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "set.json").write_text(json.dumps(content))
    entry = (f"domains_{tmp_path.name}", str(tmp_path / "set.json"), str(tmp_path))
    detectron2_cfg.merge_from_list(
        ["DATASETS.REGISTER", [entry], "DATASETS.TRAIN", (entry[0],),
         "DATALOADER.BATCH_COMPOSITION", "domain", "DATALOADER.NUM_WORKERS", 0]
    )  # fmt: skip
    return detectron2_cfg


def loader_of(cfg):
    from refbn_d2.engines.detectron2.trainer import Trainer
    from refbn_d2.plugin.registration import register_datasets

    register_datasets(cfg)
    return Trainer.build_train_loader(cfg)


def batches(cfg, number=24):
    return [[d["image_id"] for d in batch] for batch in islice(iter(loader_of(cfg)), number)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_of_one_domain(cfg, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    made = batches(cfg)
    assert all(len(batch) == 2 for batch in made)
    assert all(len({DOMAINS[i] for i in batch}) == 1 for batch in made)
    assert {i for batch in made for i in batch} == set(range(12))
    assert all(len({i % 4 > 1 for i in batch}) == 1 for batch in made)  # and of one shape


def test_another_field(cfg):
    cfg.DATALOADER.DOMAIN_FIELD = "camera"
    made = batches(cfg)
    assert all(len({i % 2 for i in batch}) == 1 for batch in made)
    assert any(len({DOMAINS[i] for i in batch}) == 2 for batch in made)


def test_iid_is_detectron2s_own(cfg):
    from detectron2.data.build import _train_loader_from_config
    from detectron2.data.samplers import TrainingSampler

    from refbn_d2.plugin.domains import with_domains
    from refbn_d2.plugin.registration import register_datasets

    register_datasets(cfg)
    cfg.DATALOADER.BATCH_COMPOSITION = "iid"
    arguments = _train_loader_from_config(cfg)
    assert type(arguments["sampler"]) is TrainingSampler
    assert arguments["aspect_ratio_grouping"] is True
    assert with_domains(cfg, arguments) is arguments


def test_an_image_without_the_field_is_named(cfg):
    cfg.DATALOADER.DOMAIN_FIELD = "video"
    with pytest.raises(DataError, match=r"image 0 \(.*0.png\) has 'video' = None"):
        loader_of(cfg)


@pytest.mark.parametrize(
    "key, value", [("BATCH_COMPOSITION", "modality"), ("SAMPLER_TRAIN", "WeightedTrainingSampler")]
)
def test_values_that_cannot_be(cfg, key, value):
    cfg.DATALOADER[key] = value
    if key == "SAMPLER_TRAIN":
        cfg.DATASETS["TRAIN_REPEAT_FACTOR"] = []
    with pytest.raises(ConfigError, match=f"DATALOADER.{key} = '{value}'"):
        loader_of(cfg)
