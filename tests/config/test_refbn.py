"""MODEL.REFBN: defaults and allowed values, on Detectron2's config and on ours."""

import dataclasses

import pytest
from fvcore.common.config import CfgNode

from refbn_d2.config import RefBNOptions, add_refbn_config, get_cfg, refbn_options

DEFAULTS = {
    "reference_weight": 0.9,
    "weighting": "fixed",
    "gradient": "batch",
    "prior_count": 64.0,
    "reference": "dataset",
    "refresh": "auto",
    "refresh_period": 4,
    "slice_size": 8,
    "slice_momentum": 0.25,
    "num_images": 32,
    "seed": 0,
}


def options(*overrides):
    cfg = get_cfg()
    cfg.merge_from_list([*overrides])
    return refbn_options(cfg)


def foreign_cfg():
    cfg = CfgNode()
    cfg.MODEL = CfgNode()
    cfg.DATASETS = CfgNode()
    cfg.DATALOADER = CfgNode()
    cfg.TEST = CfgNode()
    return cfg


def test_defaults_with_and_without_the_node():
    bare, added = foreign_cfg(), foreign_cfg()
    add_refbn_config(added)
    assert added.DATASETS.REGISTER == ()
    assert isinstance(added.MODEL.REFBN, CfgNode)
    for cfg in (get_cfg(), bare, added):
        assert dataclasses.asdict(refbn_options(cfg)) == DEFAULTS


def test_values_are_read():
    got = options(
        *("MODEL.REFBN.REFERENCE_WEIGHT", 0.5, "MODEL.REFBN.WEIGHTING", "count"),
        *("MODEL.REFBN.GRADIENT", "pooled", "MODEL.REFBN.PRIOR_COUNT", 9),
        *("MODEL.REFBN.REFERENCE", "checkpoint"),
        *("MODEL.REFBN.REFRESH", "slice", "MODEL.REFBN.REFRESH_PERIOD", 2),
        *("MODEL.REFBN.SLICE_SIZE", 16, "MODEL.REFBN.SLICE_MOMENTUM", 1),
        *("MODEL.REFBN.NUM_IMAGES", 16, "MODEL.REFBN.SEED", 5),
    )
    assert got == RefBNOptions(
        0.5, "count", "pooled", 9.0, "checkpoint", "slice", 2, 16, 1.0, 16, 5
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.seed = 1


@pytest.mark.parametrize("weight", [0, 1, 0.0, 1.0, 0.3])
def test_the_whole_range_of_weights(weight):
    assert options("MODEL.REFBN.REFERENCE_WEIGHT", weight).reference_weight == weight


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("REFERENCE_WEIGHT", -0.1, "[0, 1]"),
        ("REFERENCE_WEIGHT", 1.1, "[0, 1]"),
        ("REFERENCE_WEIGHT", float("nan"), "[0, 1]"),
        ("PRIOR_COUNT", -1, "0 or more"),
        ("PRIOR_COUNT", float("inf"), "0 or more"),
        ("WEIGHTING", "all", "'fixed' or 'count'"),
        ("GRADIENT", "exact", "'pooled' or 'batch' or 'reference'"),
        ("REFERENCE", "coco", "'dataset' or 'checkpoint'"),
        ("REFRESH", "never", "'static' or 'full' or 'slice' or 'concat'"),
        ("REFRESH_PERIOD", 0, "1 or more"),
        ("SLICE_SIZE", 0, "1 or more"),
        ("SLICE_SIZE", 33, "NUM_IMAGES = 32"),
        ("SLICE_MOMENTUM", 0.0, "(0, 1]"),
        ("SLICE_MOMENTUM", 1.01, "(0, 1]"),
        ("NUM_IMAGES", 0, "1 or more"),
        ("SEED", -1, "0 or more"),
    ],
)
def test_a_wrong_value_is_named(key, value, allowed):
    with pytest.raises(ValueError) as error:
        options(f"MODEL.REFBN.{key}", value)
    for part in (f"MODEL.REFBN.{key} = {value!r}", allowed):
        assert part in str(error.value)


@pytest.mark.parametrize("refresh", ["static", "full", "slice"])
def test_the_gradient_through_the_reference_needs_it_in_the_batch(refresh):
    with pytest.raises(ValueError, match=f"GRADIENT = 'reference'.*'concat'.*'{refresh}'"):
        options("MODEL.REFBN.GRADIENT", "reference", "MODEL.REFBN.REFRESH", refresh)
    assert options("MODEL.REFBN.GRADIENT", "reference").gradient == "reference"


def test_a_slice_may_exceed_the_reference_where_there_are_no_slices():
    got = options("MODEL.REFBN.NUM_IMAGES", 4, "MODEL.REFBN.REFRESH", "full")
    assert (got.num_images, got.slice_size) == (4, 8)


@pytest.mark.parametrize("weight", [True, (0.9,), "count", None])
def test_a_weight_is_a_plain_number(weight):
    with pytest.raises(ValueError, match=r"MODEL\.REFBN\.REFERENCE_WEIGHT = .*float"):
        options("MODEL.REFBN.REFERENCE_WEIGHT", weight)
