"""People's COCO files on the torchvision engine: repaired, scored rightly, or one line."""

import argparse
import json
import math

import pytest
import torch
from torch import nn

from refbn_d2.config import get_cfg
from refbn_d2.config.checks import warn_frozen_from_scratch
from refbn_d2.engines.torchvision import main, trainer
from refbn_d2.engines.torchvision.evaluation import Evaluator
from refbn_d2.utils.errors import RefBNError


@pytest.fixture
def people(tiny_shapes, tiny_cfg, tmp_path):
    """A function that writes changed copies of the tiny sets; returns a config that names them."""
    shapes = tiny_shapes / "shapes"

    def make(train=None, val=None, overrides=()):
        entries = []
        for part, change in (("train", train), ("val", val)):
            content = json.loads((shapes / f"annotations/instances_{part}.json").read_text())
            if change:
                change(content)
            path = tmp_path / f"{part}.json"
            path.write_text(json.dumps(content))
            entries.append((f"{tmp_path.name}_{part}", str(path), str(shapes / part)))
        names = [name for name, *_ in entries]
        tiny_cfg.merge_from_list(
            ["DATASETS.REGISTER", entries, "DATASETS.TRAIN", names[:1], "DATASETS.TEST", names[1:]]
            + [*overrides]
        )
        return tiny_cfg

    return make


class Perfect(nn.Module):
    """Find exactly what `truth` holds, and `extra` more with low scores."""

    def __init__(self, tmp_path, truth, extra=0):
        super().__init__()
        train = json.loads((tmp_path / "train.json").read_text())
        ordered = sorted(train["categories"], key=lambda c: c["id"])
        class_of = {c["name"]: i for i, c in enumerate(ordered)}
        self.class_of = {c["id"]: class_of[c["name"]] for c in truth["categories"]}
        self.truth, self.extra = truth, extra

    def forward(self, samples):
        return [self.found(sample["image_id"]) for sample in samples]

    def found(self, image_id):
        anns = [a for a in self.truth["annotations"] if a["image_id"] == image_id]
        boxes = torch.tensor([a["bbox"] for a in anns] + [[0.0, 0, 1, 1]] * self.extra)
        boxes[:, 2:] += boxes[:, :2]
        return {
            "pred_boxes": boxes,
            "scores": torch.tensor([0.9] * len(anns) + [0.1] * self.extra),
            "pred_classes": torch.tensor(
                [self.class_of[a["category_id"]] for a in anns] + [0] * self.extra
            ),
        }


def evaluated(cfg, tmp_path, truth, **more):
    evaluator = Evaluator(cfg, tmp_path)
    return next(iter(evaluator(Perfect(tmp_path, truth, **more)).values()))["bbox"]


BOXES = ["MODEL.MASK_ON", False]


def swap_ids(content):
    """The same classes under other ids, in another order, and what is left out or repaired."""
    ids = sorted(c["id"] for c in content["categories"])
    new = dict(zip(ids, [id + 40 for id in reversed(ids)], strict=True))
    for category in content["categories"]:
        category["id"] = new[category["id"]]
    for ann in content["annotations"]:
        ann.update(category_id=new[ann["category_id"]], iscrowd="0", area=None)
    content["annotations"].append({**content["annotations"][0], "id": 0, "bbox": [1, 1, 0, 9]})


def test_classes_are_matched_by_name_and_what_is_left_out_does_not_count(people, tmp_path, caplog):
    cfg = people(val=swap_ids, overrides=BOXES)
    truth = json.loads((tmp_path / "val.json").read_text())
    del truth["annotations"][-1]
    assert evaluated(cfg, tmp_path, truth)["AP"] == pytest.approx(100)
    repaired = json.loads((tmp_path / f"annotations/{tmp_path.name}_val.json").read_text())
    assert len(repaired["annotations"]) == len(truth["annotations"])
    people(overrides=BOXES)  # the file is put right: the repaired copy goes
    truth = json.loads((tmp_path / "val.json").read_text())
    assert evaluated(cfg, tmp_path, truth)["AP"] == pytest.approx(100)
    assert not list((tmp_path / "annotations").iterdir())


def test_a_test_set_without_a_class_is_scored_on_the_others(people, tmp_path):
    def drop_first(content):
        first = min(c["id"] for c in content["categories"])
        content["categories"] = [c for c in content["categories"] if c["id"] != first]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != first]

    cfg = people(val=drop_first, overrides=BOXES)
    results = evaluated(cfg, tmp_path, json.loads((tmp_path / "val.json").read_text()))
    assert results["AP"] == pytest.approx(100)
    per_class = [value for key, value in results.items() if key.startswith("AP-")]
    assert math.isnan(per_class[0]) and min(per_class[1:]) == pytest.approx(100)


@pytest.mark.parametrize("cut", [-1, 300])
def test_the_metric_is_cocos_at_100(people, tmp_path, cut):
    cfg = people(overrides=[*BOXES, "TEST.DETECTIONS_PER_IMAGE", cut])
    truth = json.loads((tmp_path / "val.json").read_text())
    assert evaluated(cfg, tmp_path, truth)["AP"] == pytest.approx(100)
    cfg.TEST.MAX_DETS_PER_IMAGE = 1  # asked for: the second object of a class is not found
    objects = [(a["image_id"], a["category_id"]) for a in truth["annotations"]]
    assert len(set(objects)) < len(objects)
    assert evaluated(cfg, tmp_path, truth)["AP"] < 99


# ---- one line, before anything is built


def equal_names(content):
    for category in content["categories"]:
        category["name"] = "thing"


def broken_box(content):
    content["annotations"][1]["bbox"] = [1, 2, "wide", 4]


def no_mask(content):
    content["annotations"][1]["segmentation"] = None


def gone_picture(content):
    content["images"][2]["file_name"] = "gone.png"


CASES = [
    ({"train": equal_names}, [], "are all called 'thing'"),
    ({"val": equal_names}, [], "are all called 'thing'"),
    ({"val": broken_box}, [], r"val.json .*annotation 2 of image .* bbox \[1, 2, 'wide', 4\]"),
    ({"val": no_mask}, [], "annotation 2 of image .* has no segmentation"),
    ({"train": gone_picture}, [], r"1 of 24 pictures do not exist: .*gone\.png"),
    ({"val": gone_picture}, [], r"1 of 6 pictures do not exist: .*gone\.png"),
    ({}, ["DATASETS.TRAIN", ["shapes_trian"]], "no data set is called 'shapes_trian'"),
    ({}, ["DATASETS.TEST", ["shapes_vla"]], "no data set is called 'shapes_vla'"),
    ({}, ["SOLVER.IMS_PER_BATCH", 3], "IMS_PER_BATCH = 3 cannot be split evenly over 2"),
]


def forbidden(*arguments):
    raise AssertionError("something was built")


@pytest.mark.parametrize(("change", "overrides", "message"), CASES)
def test_two_workers_are_not_started(people, tmp_path, monkeypatch, change, overrides, message):
    config = tmp_path / "config.yaml"
    config.write_text(people(**change, overrides=overrides).dump())
    monkeypatch.setattr(main, "launch", forbidden)
    args = argparse.Namespace(
        config_file=str(config), opts=[], resume=False, eval_only=False, num_gpus=2,
        num_machines=1, machine_rank=0, dist_url="auto", allow_partial_weights=False,
    )  # fmt: skip
    with pytest.raises((RefBNError, OSError), match=message) as error:
        main.run(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "overrides", "message"), CASES[:-1])
def test_one_worker_builds_nothing(people, tmp_path, monkeypatch, change, overrides, message):
    monkeypatch.setattr(trainer, "build_model", forbidden)
    cfg = people(**change, overrides=overrides)
    with pytest.raises((RefBNError, OSError), match=message):
        trainer.Trainer(cfg, tmp_path / "output")


# ---- frozen from scratch


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.RESNETS.NORM", "BN"], ["a frozen random stem"]),
        (["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "FrozenBN"], ["'FrozenBN'"]),
        (["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "RefBN"], []),
        (["MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.WEIGHTS", "r50.pth"], []),
    ],
)
def test_frozen_from_scratch(caplog, overrides, messages):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", *overrides])
    warn_frozen_from_scratch(cfg)
    assert len(caplog.messages) == len(messages)
    for message, found in zip(messages, caplog.messages, strict=True):
        assert message in found and "MODEL.WEIGHTS is empty" in found


def test_a_training_warns_of_what_is_frozen(people, tmp_path, caplog):
    cfg = people(overrides=["MODEL.BACKBONE.FREEZE_AT", 1])
    trainer.Trainer(cfg, tmp_path / "output")
    assert "a frozen random stem" in caplog.text
