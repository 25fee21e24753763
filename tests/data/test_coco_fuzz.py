"""Mutated COCO jsons: nothing but results and our own errors, and results can be scored."""

import copy
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refbn_d2.data.coco import match_classes, read_coco
from refbn_d2.engines.torchvision.data.datasets import _to_dicts
from refbn_d2.metrics.coco_ap import evaluate
from refbn_d2.utils.errors import RefBNError
from tests.data.coco_files import coco, write

SETTINGS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(), st.text(max_size=4),
    st.integers(-3, 70).map(str), st.sampled_from([10**400, 2**31, 1e308, "1e999", "nan", [], {}]),
    st.just({"size": [40, 60], "counts": "PPYo1"}),
    st.just({"size": [40, 60], "counts": [2400]}),
)  # fmt: skip
_JUNK = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=7), max_leaves=8)


def _places(node, path=()):
    yield path
    items = enumerate(node) if isinstance(node, list) else getattr(node, "items", list)()
    for key, value in items:
        yield from _places(value, (*path, key))


@st.composite
def mutated(draw):
    content = copy.deepcopy(coco())
    for _ in range(draw(st.integers(1, 4))):
        places = [place for place in _places(content) if place]
        if not places:  # all was deleted
            break
        path = draw(st.sampled_from(places))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "wrap", "text", "delete", "again"]))
        old = parent[path[-1]]
        if how == "delete":
            del parent[path[-1]]
        elif how == "again" and isinstance(parent, list):
            parent.append(copy.deepcopy(old))
        else:
            new = {"wrap": [old], "text": str(old)}
            parent[path[-1]] = new[how] if how in new else copy.deepcopy(draw(_JUNK))
    return content


def check(content, tmp_path):
    """Load, and score a detector that finds exactly what was loaded."""
    path = write(tmp_path, content)
    try:
        file = read_coco(path, "mine", annotated=False, masks=True)
        match_classes(file, ["car", "dog"])
        dicts = _to_dicts(file, tmp_path, False, "domain")
    except RefBNError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    if not file.content.get("annotations"):
        return
    truth = write(tmp_path, json.dumps(file.content), "repaired.json")
    assert read_coco(truth, "mine", masks=True).repairs == {}, "a repaired file is correct"
    ids = {contiguous: key for key, contiguous in file.id_map().items()}
    box_of = {ann["id"]: ann["bbox"] for ann in file.content["annotations"]}
    found = [
        {"image_id": d["image_id"], "category_id": ids[a["category_id"]], "score": 0.9}
        | {"bbox": box_of[a["id"]]}
        for d in dicts
        for a in d["annotations"]
        if not a["iscrowd"]
    ]
    ap = evaluate(truth, found, ("bbox",))["bbox"]["AP50"]
    assert math.isnan(ap) or ap == pytest.approx(100) or not found
    evaluate(truth, [], ("segm",))


@settings(max_examples=250, **SETTINGS)
@given(mutated())
def test_mutated_files(tmp_path, content):
    check(content, tmp_path)


@pytest.mark.slow
@settings(max_examples=5_000, **SETTINGS)
@given(mutated())
def test_many_mutated_files(tmp_path, content):
    check(content, tmp_path)
