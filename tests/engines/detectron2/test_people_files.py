"""COCO files that people have, on the Detectron2 engine: repaired and scored, or one line."""

import argparse
import json

import pytest

from refbn_d2.utils.errors import RefBNError

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytestmark = pytest.mark.detectron2


@pytest.fixture
def people(tiny_shapes, tmp_path):
    """A function that writes changed copies of the tiny sets; returns overrides that name them."""
    shapes = tiny_shapes / "shapes"

    def make(train=None, val=None):
        entries = []
        for part, change in (("train", train), ("val", val)):
            content = json.loads((shapes / f"annotations/instances_{part}.json").read_text())
            if change:
                change(content)
            path = tmp_path / f"{part}.json"
            path.write_text(json.dumps(content))
            entries.append((f"{tmp_path.name}_{part}", str(path), str(shapes / part)))
        names = [name for name, *_ in entries]
        return [
            "DATASETS.REGISTER", entries, "DATASETS.TRAIN", (names[0],), "DATASETS.TEST",
            (names[1],), "SOLVER.MAX_ITER", 1, "MODEL.DEVICE", "cpu",
        ]  # fmt: skip

    return make


@pytest.fixture
def perfect(monkeypatch):
    """Detectron2's inference, replaced by a detector that finds exactly what is in `truth`."""
    import torch
    from detectron2.engine import defaults
    from detectron2.structures import Boxes, Instances

    def inference(model, loader, evaluator):
        evaluator.reset()
        for (sample,) in loader:
            anns = [
                a for a in inference.truth["annotations"] if a["image_id"] == sample["image_id"]
            ]
            boxes = torch.tensor([a["bbox"] for a in anns], dtype=torch.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            classes = torch.tensor(
                [inference.class_of[a["category_id"]] for a in anns], dtype=torch.int64
            )
            made = Instances((sample["height"], sample["width"]))
            made.pred_boxes, made.pred_classes = Boxes(boxes), classes
            made.scores = torch.full((len(anns),), 0.9)
            evaluator.process([sample], [{"instances": made}])
        return evaluator.evaluate()

    monkeypatch.setattr(defaults, "inference_on_dataset", inference)
    return inference


def arguments(config_file, overrides, **more):
    return argparse.Namespace(
        **{
            "config_file": str(config_file), "opts": list(overrides), "resume": False,
            "eval_only": False, "num_gpus": 1, "num_machines": 1, "machine_rank": 0,
            "dist_url": "auto", "allow_partial_weights": False, **more,
        }
    )  # fmt: skip


def evaluated(config_file, overrides, monkeypatch):
    """The results of --eval-only."""
    from refbn_d2.engines.detectron2 import trainer

    results = {}
    monkeypatch.setattr(trainer, "verify_results", lambda cfg, found: results.update(found))
    monkeypatch.setattr(trainer, "draw_predictions", lambda *arguments: None)
    trainer.run(arguments(config_file, overrides, eval_only=True))
    return results


def swap_ids(content):
    """The same classes under other ids, in another order; with what Detectron2 stumbles over."""
    ids = sorted(c["id"] for c in content["categories"])
    new = dict(zip(ids, [id + 40 for id in reversed(ids)], strict=True))
    for category in content["categories"]:
        category["id"] = new[category["id"]]
    for ann in content["annotations"]:
        ann["category_id"] = new[ann["category_id"]]
        ann["iscrowd"] = "0"
        del ann["area"]
    content["annotations"].append({**content["annotations"][0], "id": 0, "bbox": [1, 1, 0, 9]})


def test_classes_are_matched_by_name_and_what_is_left_out_does_not_count(
    config_file, people, perfect, tmp_path, monkeypatch
):
    from detectron2.data import MetadataCatalog

    overrides = people(val=swap_ids)
    train = json.loads((tmp_path / "train.json").read_text())
    classes = {
        c["name"]: i for i, c in enumerate(sorted(train["categories"], key=lambda c: c["id"]))
    }
    val = json.loads((tmp_path / "val.json").read_text())
    perfect.truth = {"annotations": val["annotations"][:-1]}
    perfect.class_of = {c["id"]: classes[c["name"]] for c in val["categories"]}
    results = evaluated(config_file, overrides, monkeypatch)
    assert results["bbox"]["AP"] == pytest.approx(100)
    name = f"{tmp_path.name}_val"
    repaired = json.loads((tmp_path / f"output/annotations/{name}.json").read_text())
    assert [c["name"] for c in repaired["categories"]] == list(classes)
    assert len(repaired["annotations"]) == len(val["annotations"]) - 1
    assert [i.get("domain") for i in repaired["images"]] == [i.get("domain") for i in val["images"]]
    assert MetadataCatalog.get(name).json_file == str(tmp_path / "val.json")  # as before


def test_a_test_set_without_a_class(config_file, people, perfect, tmp_path, monkeypatch):
    def drop_first(content):
        first = min(c["id"] for c in content["categories"])
        content["categories"] = [c for c in content["categories"] if c["id"] != first]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != first]

    overrides = people(val=drop_first)
    train = json.loads((tmp_path / "train.json").read_text())
    order = {id: i for i, id in enumerate(sorted(c["id"] for c in train["categories"]))}
    perfect.truth, perfect.class_of = json.loads((tmp_path / "val.json").read_text()), order
    results = evaluated(config_file, overrides, monkeypatch)
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_a_correct_file_is_read_by_detectron2_itself(
    config_file, people, perfect, tmp_path, monkeypatch
):
    overrides = people()
    perfect.truth = json.loads((tmp_path / "val.json").read_text())
    ids = sorted(c["id"] for c in perfect.truth["categories"])
    perfect.class_of = {id: i for i, id in enumerate(ids)}
    assert evaluated(config_file, overrides, monkeypatch)["bbox"]["AP"] == pytest.approx(100)
    assert not (tmp_path / "output/annotations").exists()


def equal_names(content):
    for category in content["categories"]:
        category["name"] = "thing"


def broken_box(content):
    content["annotations"][1]["bbox"] = [1, 2, "wide", 4]


def gone_picture(content):
    content["images"][2]["file_name"] = "gone.png"


@pytest.mark.parametrize(
    ("change", "workers", "more", "message"),
    [
        ({"train": equal_names}, 1, [], "are all called 'thing'"),
        (
            {"val": broken_box},
            2,
            [],
            r"val.json .*annotation 2 .* bbox \[1, 2, 'wide', 4\]",
        ),
        ({"train": gone_picture}, 2, [], r"1 of 24 pictures do not exist: .*gone\.png"),
        (
            {},
            2,
            ["DATASETS.TRAIN", ("shapes_trian",)],
            "TRAIN: no data set is called 'shapes_tr",
        ),
        ({}, 1, ["DATASETS.TEST", ("shapes_vla",)], "TEST: no data set is called 'shapes_vla'"),
        ({}, 2, ["SOLVER.IMS_PER_BATCH", 3], "IMS_PER_BATCH = 3 cannot be split evenly over 2"),
    ],
)
def test_one_line_before_anything_is_built(
    config_file, people, monkeypatch, change, workers, more, message
):
    from refbn_d2.engines.detectron2 import trainer

    def built(*arguments):
        raise AssertionError("something was built")

    monkeypatch.setattr(trainer, "Trainer", built)
    if workers > 1:
        monkeypatch.setattr(trainer, "launch", built)
    with pytest.raises((RefBNError, OSError), match=message) as error:
        trainer.run(arguments(config_file, people(**change) + more, num_gpus=workers))
    assert "\n" not in str(error.value)


def test_the_metric_is_cocos_at_100_unless_asked(detectron2_cfg):
    from refbn_d2.engines.detectron2.trainer import Trainer
    from refbn_d2.plugin.registration import register_datasets

    register_datasets(detectron2_cfg)
    for cut, limit in ((300, 100), (-1, 100), (100, 250)):
        detectron2_cfg.TEST.DETECTIONS_PER_IMAGE = cut
        detectron2_cfg.TEST.MAX_DETS_PER_IMAGE = limit
        evaluator = Trainer.build_evaluator(detectron2_cfg, "tiny_val")
        assert evaluator._max_dets_per_image == [1, 10, limit]


LAZY = """
train = dict(device="cpu", amp=dict(enabled=False), output_dir="output")
dataloader = dict(
    train=dict(total_batch_size=3, dataset=dict(names="nowhere")),
    test=dict(dataset=dict(names="nowhere")),
)
"""


def test_lazyconfig_says_it_in_one_line_too(tmp_path, monkeypatch):
    from refbn_d2.engines.detectron2 import lazyconfig

    monkeypatch.setattr(lazyconfig, "launch", lambda *arguments: pytest.fail("workers started"))
    config = tmp_path / "lazy.py"
    config.write_text(LAZY)
    for override, message in (
        ([], "total_batch_size = 3 cannot be split evenly over 2 workers"),
        (["dataloader.train.total_batch_size=2"], "no data set is called 'nowhere'"),
    ):
        with pytest.raises(RefBNError, match=message):
            lazyconfig.run(arguments(config, override, num_gpus=2))
