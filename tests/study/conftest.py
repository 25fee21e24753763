import json

import numpy as np
import pytest
import yaml
from PIL import Image

DOMAINS = ["day", "day", "night", "night"]


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """Make 12 + 8 pictures of 40 pixels with one square each; two of four are by day."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 12), ("val", 8)):
        images, annotations = [], []
        (tmp_path / part).mkdir()
        for i in range(number):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"{i}.png")
            images.append({"id": 10 + i, "file_name": f"{i}.png", "height": 40, "width": 40,
                           "domain": DOMAINS[i % 4]})  # fmt: skip
            annotations.append({"id": i + 1, "image_id": 10 + i, "category_id": 1, "iscrowd": 0,
                                "bbox": [4, 4, 20, 20], "area": 400,
                                "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]})  # fmt: skip
        content = {"images": images, "annotations": annotations,
                   "categories": [{"id": 1, "name": "square"}]}  # fmt: skip
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


@pytest.fixture
def content(request):
    """Return a detection study, as its YAML file holds it."""
    quickstart = request.config.rootpath / "configs/quickstart/mask_rcnn_R_18_FPN_bn.yaml"
    return {
        "task": "detection",
        "engine": "torchvision",
        "config": str(quickstart),
        "overrides": {"DATASETS.TRAIN": ["mine"], "DATASETS.TEST": ["mine_val"],
                      "MODEL.ROI_HEADS.NUM_CLASSES": 1},
        "data": {"register": {"mine": ["train.json", "train"], "mine_val": ["val.json", "val"]}},
        "seeds": [1, 2],
        "baseline": "BN",
        "norms": {"BN": {}, "GN": {"overrides": {"MODEL.RESNETS.NORM": "GN"}}},
        "conditions": {"two iid": {}},
    }  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a study file and returns its path."""

    def write(content, name="mine"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write
