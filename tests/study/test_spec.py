"""Study files that are allowed, and the errors for others."""

import re

import pytest

from refbn_d2.data.corruptions import CORRUPTIONS
from refbn_d2.study.spec import load_study
from refbn_d2.utils.errors import ConfigError


def test_what_is_read(content, written):
    content["conditions"]["dark"] = {"hold_out": "day", "norms": ["GN"], "pretrained": False}
    content["evaluate"] = {"corruptions": {"names": "full"}, "steps_to": {"total_loss": 1}}
    study = load_study(written(content))
    assert (study.name, study.title, study.baseline, study.seeds) == ("mine", "mine", "BN", (1, 2))
    assert study.norms["GN"].overrides == {"MODEL.RESNETS.NORM": "GN"}
    assert study.conditions["two iid"].norms == ("BN", "GN")
    dark = study.conditions["dark"]
    assert (dark.hold_out, dark.norms, dark.pretrained) == ("day", ("GN",), False)
    assert study.evaluate.metrics == ("bbox/AP", "segm/AP")
    assert study.evaluate.corruptions == CORRUPTIONS and len(CORRUPTIONS) == 15
    assert study.evaluate.severities == (1, 2, 3, 4, 5)
    assert study.evaluate.steps_to == {"total_loss": (1.0,)}
    assert study.timing.rounds == 0 and study.data.register["mine"] == ("train.json", "train")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"baseline": "Bn"}, r"baseline: 'Bn' is unknown; did you mean 'BN'\?"),
        ({"conditions": {"x": {"norms": ["GNN"]}}}, r"conditions.x.norms: 'GNN'.*mean 'GN'"),
        ({"evaluate": {"metrics": ["box/AP"]}}, r"evaluate.metrics: 'box/AP'.*mean 'bbox/AP'"),
        ({"evaluate": {"corruptions": {"names": ["fogg"]}}}, r"'fogg' is unknown.*mean 'fog'"),
        ({"evaluate": {"corruptions": {"severities": [6]}}}, r"severities: is \[6\].*1 to 5"),
        ({"evaluate": {"steps_to": {"loss": 1}}}, r"steps_to: 'loss' is unknown; did you mean"),
        ({"timing": {"conditions": ["two id"]}}, r"'two id'.*mean 'two iid'"),
        ({"sedes": [1]}, r"key 'sedes' is unknown; did you mean 'seeds'"),
        ({"task": "detect"}, r"task: 'detect'.*mean 'detection'"),
        ({"config": "nowhere.yaml"}, r"config: .*nowhere.yaml does not exist"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] names a seed twice"),
        ({"seeds": 3}, r"seeds: is 3; write a list"),
        ({"seeds": []}, r"seeds: is missing"),
        *(
            ({"norms": {name: {}}}, rf"the name {re.escape(repr(name))} must have a letter or a di")
            for name in ("a,b", "..", "", " a", r"$\x$", "a\rb", "a/b")
        ),
        ({"seeds": [2**32]}, r"seeds: is \[4294967296\]; .* from 0 to 2\^32 - 1"),
        ({"conditions": {"x": {"hold_out": " "}}}, r"conditions.x.hold_out: is empty; name a dom"),
        ({"conditions": {"x": {"norms": []}}}, r"x.norms: is empty; choose from BN, GN"),
        ({"evaluate": {"metrics": []}}, r"metrics: is empty; choose from bbox/AP, "),
        ({"timing": {"conditions": []}}, r"timing.conditions: is empty; choose from two iid"),
        ({"evaluate": {"corruptions": {"names": []}}}, r"corruptions.names: is empty; choose fr"),
        ({"evaluate": {"corruptions": {"severities": []}}}, r"severities: is \[\]; .*1 to 5"),
        ({"evaluate": {"corruptions": {"severities": [1, 1]}}}, r"is \[1, 1\]; .* each once"),
        *(
            ({"evaluate": {"steps_to": {"total_loss": target}}}, r"total_loss: is .*write numbers")
            for target in (True, float("nan"), [], [1, float("inf")], 10**400)
        ),
        ({"overrides": {"SEED": 3}}, r"SEED is set by the study itself"),
        ({"overrides": {"SOLVER": {"BASE_LR": 1}}}, r"write full keys"),
        ({"norms": {"BN": {"pretrain": {"A.B": 1}}}}, r"no section `pretrain`"),
        ({"norms": {"BN": {"convert": "RefIN"}}}, r"norms.BN.convert: .*no section `pretrain`"),
        (
            {"task": "classification", "norms": {"BN": {"pretrain": {"A.B": 1}}}, "data": {}},
            r"norms.BN.pretrain: is only for task: detection",
        ),
        ({"norms": {"BN": {"convert": "RefNI"}}}, r"norms.BN.convert: 'RefNI'.*mean 'RefIN'"),
        ({"data": {"register": {"coco_2017_val": ["a", "b"]}}}, r"coco_2017_val: is a built-in"),
        ({"data": {"tuning": 1.5}}, r"data.tuning: is 1.5"),
        (
            {"data": {"register": ["a.json", "a"]}},
            r"data.register: is \['a.json', 'a'\]; write `na",
        ),
        ({"conditions": {"x": {"norms": 3}}}, r"x.norms: is 3; write a list: \[3\]"),
        ({"evaluate": {"metrics": "bbox/AP"}}, r"metrics: is 'bbox/AP'; write a list: \[bbox/AP\]"),
        ({"evaluate": {"corruptions": {"names": 3}}}, r"names: is 3; write a list"),
        ({"evaluate": {"corruptions": {"names": ["subset"]}}}, r"names: 'subset' is unknown"),
        ({"evaluate": {"corruptions": {"severities": [[1]]}}}, r"severities: is \[\[1\]\]"),
        ({"evaluate": {"corruptions": {"severities": [True]}}}, r"severities: is \[True\]"),
        ({"evaluate": {"metrics": ["bbox/AP"] * 2}}, r"metrics: .* names one twice"),
        ({"timing": {"conditions": "two iid"}}, r"conditions: is 'two iid'; write a list"),
    ],
)
def test_errors_name_the_place_and_the_closest(content, written, change, message):
    with pytest.raises(ConfigError, match=rf"study file .*mine.yaml, .*{message}"):
        load_study(written(content | change))


def test_no_file_and_no_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml does not exist"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="bad.yaml is not valid YAML"):
        load_study(tmp_path / "bad.yaml")


@pytest.mark.parametrize("twice", ["norms: {BN: {}, GN: {}, BN: {}}", "seeds: [1]\nseeds: [2]"])
def test_a_name_that_stands_twice(twice, tmp_path):
    (tmp_path / "twice.yaml").write_text(f"task: detection\n{twice}\n")
    with pytest.raises(ConfigError, match="twice.yaml.* '(BN|seeds)' stands twice"):
        load_study(tmp_path / "twice.yaml")
