"""The runs of a study and their commands."""

import shutil
from pathlib import Path

import pytest
import yaml

from refbn_d2.config import get_cfg
from refbn_d2.data import catalog
from refbn_d2.export.__main__ import parser as export_parser
from refbn_d2.study.data import ClassificationSets, DetectionSets
from refbn_d2.study.plan import Plan, parse_only
from refbn_d2.study.spec import load_study
from refbn_d2.utils.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))


def plan_of(path, folder="out"):
    return Plan(load_study(path), Path(folder), "torchvision")


def merged(stage):
    """Return the config that a stage's command makes."""
    arguments = list(stage.arguments)
    cfg = get_cfg()
    cfg.merge_from_file(arguments[arguments.index("--config-file") + 1])
    cfg.merge_from_list(arguments[arguments.index("--config-file") + 2 :])
    return cfg


def test_norms_times_seeds_times_conditions(coco, content, written):
    content["conditions"] = {"a": {"overrides": {"SOLVER.BASE_LR": 0.5}}, "b": {"norms": ["GN"]}}
    plan = plan_of(written(content))
    assert [(r.norm, r.condition, r.seed) for r in plan.runs] == [
        ("BN", "a", 1), ("GN", "a", 1), ("GN", "b", 1), ("BN", "a", 2), ("GN", "a", 2),
        ("GN", "b", 2),
    ]  # fmt: skip
    cfg = merged(plan.runs[1].stages[0])
    assert (cfg.MODEL.RESNETS.NORM, cfg.SOLVER.BASE_LR, cfg.SEED) == ("GN", 0.5, 1)
    assert list(cfg.DATASETS.REGISTER) == [
        ("mine", str(coco / "train.json"), str(coco / "train")),
        ("mine_val", str(coco / "val.json"), str(coco / "val")),
    ]
    assert cfg.MODEL.WEIGHTS == "" and plan.pretrainings == []
    assert len({r.folder for r in plan.runs}) == 6


def test_a_command_registers_what_only_this_process_knows(coco, content, written, monkeypatch):
    monkeypatch.setattr(catalog, "_registered", {})
    files = str(coco / "train.json"), str(coco / "train")
    catalog.register_coco_instances("mine", *files)
    cfg = merged(plan_of(written(content)).runs[0].stages[0])
    assert cfg.DATASETS.REGISTER[0] == ("mine", *files)


def test_only(coco, content, written):
    plan = plan_of(written(content))
    only = parse_only("norm=GN, seed=2,condition=two iid", plan.study)
    assert [job.id for job in plan.jobs(only)] == ["run/GN/two iid/2"]
    assert len(plan.jobs(parse_only("seed=1,seed=2,norm=BN", plan.study))) == 2
    for text, message in (
        ("norm=GM", "no norm 'GM'; did you mean 'GN'"),
        ("seed=3", "no seed '3'"),
        ("what=1", "'what=1' is not allowed; write norm="),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_only(text, plan.study)


def test_pretrainings_are_shared(coco, content, written):
    content["pretrain"] = {"config": str(ROOT / "configs/pretrain/shapes_resnet18_bn.yaml")}
    content["norms"] = {
        "BN": {},
        "frozen": {"overrides": {"MODEL.RESNETS.NORM": "FrozenBN"}},
        "GN": {"pretrain": {"MODEL.NORM": "GN"}, "overrides": {"MODEL.RESNETS.NORM": "GN"}},
    }
    content["conditions"] = {"fine": {}, "scratch": {"pretrained": False, "norms": ["BN"]}}
    plan = plan_of(written(content))
    assert len(plan.pretrainings) == 2
    by_run = {(r.norm, r.condition): r for r in plan.runs if r.seed == 1}
    assert by_run["BN", "fine"].needs == by_run["frozen", "fine"].needs
    assert by_run["BN", "fine"].needs != by_run["GN", "fine"].needs
    assert by_run["BN", "scratch"].needs == ""
    first = next(p for p in plan.pretrainings if p.id == by_run["BN", "fine"].needs)
    weights = merged(by_run["BN", "fine"].stages[0]).MODEL.WEIGHTS
    assert Path(weights) == (first.folder / "backbone.pkl").resolve()
    only = plan.jobs(parse_only("norm=BN,condition=scratch", plan.study))
    assert [job.kind for job in only] == ["run", "run"]


def test_a_converted_backbone(coco, content, written):
    content["pretrain"] = {"config": str(ROOT / "configs/pretrain/shapes_resnet18_bn.yaml")}
    refin = {"MODEL.RESNETS.NORM": "RefIN"}
    content["norms"] = {
        "BN": {},
        "RefIN": {"convert": "RefIN", "overrides": refin},
        "pretrained": {"pretrain": {"MODEL.NORM": "RefIN"}, "overrides": refin},
        "static": {"convert": "RefIN", "overrides": refin | {"MODEL.REFBN.REFRESH": "static"}},
    }
    plan = plan_of(written(content))
    assert [job.kind for job in plan.pretrainings] == ["pretrain", "convert", "pretrain"]
    only = plan.jobs(parse_only("norm=BN", plan.study))
    assert [job.kind for job in only] == ["pretrain", "run", "run"]
    first, *_ = jobs = plan.jobs(parse_only("norm=RefIN,seed=1", plan.study))
    assert [job.stages[0].name for job in jobs] == ["pretrain", "convert", "train"]
    assert [job.needs for job in jobs] == ["", jobs[0].id, jobs[1].id]
    convert = jobs[1].stages[0]
    assert convert.arguments[0] == str(first.folder / "backbone.pkl")
    args = export_parser().parse_args(convert.arguments)
    assert (args.dst, args.to, args.norm) == (str(convert.leaves), "detectron2", "RefIN")
    assert Path(merged(jobs[2].stages[0]).MODEL.WEIGHTS) == convert.leaves.resolve()
    settings = plan.settings()
    assert len({settings[f"norm={norm},condition=two iid"] for norm in content["norms"]}) == 4


RESNETS_REFIN = {"MODEL.RESNETS.NORM": "RefIN"}


@pytest.mark.parametrize(
    "norm, message",
    [
        ({"convert": "RefIN"}, "has RefIN, but MODEL.RESNETS.NORM is 'BN'; allowed: RefIN"),
        ({"convert": "BN", "overrides": RESNETS_REFIN}, "has BN, .* is 'RefIN'; allowed: a batch"),
        ({"convert": "BN", "pretrain": {"MODEL.NORM": "GN"}}, "with GN cannot be converted to BN"),
        ({"convert": "folded"}, "has folded, .* is 'BN'; allowed: FrozenBN"),
        ({"convert": "BN", "overrides": {"MODEL.RESNETS.NORM": "GN"}}, "has BN, .* is 'GN'"),
        ({"overrides": RESNETS_REFIN}, "has BN, .* is 'RefIN'; .*`pretrain: {MODEL.NORM: ...}`"),
        ({"pretrain": {"MODEL.NORM": "RefIN"}}, "has RefIN, .* is 'BN'"),
        ({"pretrain": {"MODEL.NORM": "GN"}, "overrides": RESNETS_REFIN}, "has GN, .* is 'RefIN'"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_refused_at_once(coco, content, written, norm, message):
    content["pretrain"] = {"config": str(ROOT / "configs/pretrain/shapes_resnet18_bn.yaml")}
    content["norms"] = {"BN": norm}
    with pytest.raises(ConfigError, match=f"norm(s.BN| 'BN').*{message}"):
        plan_of(written(content))


def test_what_a_recipe_holds(coco, content, written):
    before = plan_of(written(content)).runs[0].recipe
    assert plan_of(written(content), "elsewhere").runs[0].recipe == before
    for key, value in (
        ("overrides", content["overrides"] | {"SOLVER.BASE_LR": 0.3}),
        ("evaluate", {"corruptions": {"severities": [1]}}),
        ("data", content["data"] | {"train_images": 3}),
    ):
        assert plan_of(written(content | {key: value})).runs[0].recipe != before
    more = content | {
        "evaluate": {"domains": True},
        "seeds": [1, 2, 3],
        "norms": content["norms"] | {"B": {}},
    }
    assert plan_of(written(more)).runs[0].recipe == before  # a study may grow
    with open(coco / "val.json", "a") as file:
        file.write(" ")
    assert plan_of(written(content)).runs[0].recipe != before


def test_weights_that_the_config_names(coco, content, written, tmp_path):
    """A run depends on the file's content, not on its place. From scratch, none is loaded."""
    weights = tmp_path / "a.pth"
    content["overrides"]["MODEL.WEIGHTS"] = str(weights)
    content["conditions"] = {"two iid": {}, "scratch": {"pretrained": False}}
    with pytest.raises(ConfigError, match="mine.yaml: MODEL.WEIGHTS .*a.pth: there is no such"):
        plan_of(written(content))

    def plan(data, name="a.pth"):
        (tmp_path / name).write_bytes(data)
        content["overrides"]["MODEL.WEIGHTS"] = str(tmp_path / name)
        return plan_of(written(content))

    first, other, moved = plan(b"1"), plan(b"2"), plan(b"1", "b.pth")
    tuned, scratch = "norm=BN,condition=two iid", "norm=BN,condition=scratch"
    assert first.settings()[tuned] == moved.settings()[tuned] != other.settings()[tuned]
    assert first.settings()[scratch] == other.settings()[scratch]
    weights = [merged(run.stages[0]).MODEL.WEIGHTS for run in moved.runs[:4]]
    assert weights == [str(tmp_path / "b.pth")] * 2 + [""] * 2
    content["overrides"]["MODEL.WEIGHTS"] = "detectron2://a/b.pkl"
    assert plan_of(written(content)).runs[0].recipe["MODEL.WEIGHTS"] == "detectron2://a/b.pkl"


@pytest.mark.parametrize(
    "evaluate, measured",
    [
        ({}, "segm/AP"),
        ({"metrics": ["bbox/AP"], "steps_to": {"loss_mask": 0.3}}, "loss_mask"),
        ({"metrics": ["bbox/AP"], "steps_to": {"segm/AP": 3}}, "segm/AP"),
        ({"metrics": ["bbox/AP"], "steps_to": {"total_loss": 3}}, None),
    ],
)
def test_masks_of_a_model_without_are_refused(coco, content, written, evaluate, measured):
    content["norms"] = {"BN": {"overrides": {"MODEL.MASK_ON": False}}}
    content["evaluate"] = evaluate
    if measured is None:
        assert plan_of(written(content)).runs
    else:
        message = f"norm 'BN', condition 'two iid': .* {measured}, but MODEL.MASK_ON is False"
        with pytest.raises(ConfigError, match=message):
            plan_of(written(content))


def test_derived_sets_of_other_settings_are_refused(coco, content, written, tmp_path):
    out, files = tmp_path / "out", content["data"]
    corruptions = {"names": ["fog"], "severities": [1], "images": 4}

    def make(corruptions=corruptions, hold_out=None, **data):
        conditions = {"two iid": {}, **({"part": {"hold_out": hold_out}} if hold_out else {})}
        changes = {"data": {**files, "train_images": 6, "test_images": 6, **data},
                   "evaluate": {"corruptions": corruptions}, "conditions": conditions}  # fmt: skip
        plan = plan_of(written(content | changes), out)
        plan.make_data(plan.runs)

    make()
    make(corruptions | {"severities": [1, 2]}, "night")  # a study may grow
    for changes, message in (
        ({"train_images": 4}, "train: train_images: 6 there, 4 now"),
        ({"test_images": 5}, "test: test_images: 6 there, 5 now"),
        ({"tuning": 0.5}, "train: tuning: 0.0 there, 0.5 now"),
        ({"corruptions": corruptions | {"images": 2}}, "corruptions.images: 4 there, 2 now"),
    ):
        with pytest.raises(ConfigError, match=rf"out/data holds sets.*{message}.*delete that"):
            make(**changes)
    (out / "data/made_from.json").write_text("[")
    with pytest.raises(DataError, match=r"made_from.json is broken .*; delete .*out/data"):
        make()
    (out / "data/made_from.json").unlink()
    make(train_images=4)  # unknown: of a version without the record
    with open(coco / "train.json", "a") as file:
        file.write(" ")
    with pytest.raises(ConfigError, match="train: source: '.*' there, '.*' now"):
        make(train_images=4)
    shutil.rmtree(out / "data")
    make(train_images=4)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"MODEL.RESNETS.NORM": "RefBM"},
            r"RESNETS.NORM = 'RefBM' is not a known norm.*mean 'RefBN'",
        ),
        ({"SOLVER.BASE_RL": 1}, r"SOLVER.BASE_RL: no such key; did you mean SOLVER.BASE_LR"),
        ({"MODEL.REFBN.REFRESH": "never"}, r"MODEL.REFBN.REFRESH = 'never'"),
    ],
)
def test_a_config_that_cannot_be(coco, content, written, overrides, message):
    content["norms"]["GN"] = {"overrides": overrides}
    with pytest.raises(ConfigError, match=rf"norm 'GN', condition 'two iid': (?s:.*){message}"):
        plan_of(written(content))


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies(file, monkeypatch, tmp_path):
    monkeypatch.setattr(DetectionSets, "digests", lambda self: {})
    monkeypatch.setattr(ClassificationSets, "digests", lambda self: {})
    monkeypatch.setattr("refbn_d2.data.shapes.ensure_detection", lambda root: None)
    study = load_study(file)
    plan = Plan(study, tmp_path, "torchvision")
    assert len(plan.runs) == len(study.seeds) * sum(len(c.norms) for c in study.conditions.values())
    assert yaml.safe_load(file.read_text())["title"]
