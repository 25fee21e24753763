"""The keys of pretraining, their allowed values, and the recipes."""

from pathlib import Path

import pytest
import yaml

from refbn_d2.config import ConfigError, get_cfg, refbn_options
from refbn_d2.config.cfg_node import leaves
from refbn_d2.config.pretrain import _RULES, check_pretrain_config, get_pretrain_cfg

CONFIGS = Path(__file__).parents[2] / "configs/pretrain"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*_*.yaml"))


def recipe(name):
    cfg = get_pretrain_cfg()
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    return cfg


def config(*overrides):
    cfg = get_pretrain_cfg()
    cfg.merge_from_list([*overrides])
    return cfg


def test_the_defaults_pass():
    check_pretrain_config(get_pretrain_cfg())
    assert {key for rule in _RULES for key in rule.keys} <= dict(leaves(get_pretrain_cfg())).keys()


def test_detectron2s_names_have_detectron2s_types():
    ours, theirs = (dict(leaves(cfg)) for cfg in (get_pretrain_cfg(), get_cfg()))
    common = ours.keys() & theirs.keys()
    assert {"SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.AMP.ENABLED", "OUTPUT_DIR"} <= common
    for key in common - {"DATASETS.TRAIN", "DATASETS.TEST"}:  # here a folder, not names
        assert type(ours[key]) is type(theirs[key]), key


def test_a_dump_loads_and_changes_nothing(tmp_path):
    cfg = config("SOLVER.OPT_KWARGS", (("eps", 1e-6),), "SOLVER.BCE_TARGET_THRESH", 0.2)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    loaded = get_pretrain_cfg()
    loaded.merge_from_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(loaded.dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize(
    "key, values",
    [
        ("MODEL.NORM", ["LN", "refbn"]),
        ("MODEL.DEVICE", ["tpu"]),
        ("MODEL.DROP_PATH_RATE", [1.0, -0.1]),
        ("MODEL.NUM_CLASSES", [-1]),
        ("MODEL.EMA.DECAY", [1.01]),
        ("MODEL.PIXEL_MEAN", [[1.0]]),
        ("MODEL.PIXEL_STD", [[1.0, 0.0, 1.0]]),
        ("INPUT.SIZE", [31, 0]),
        ("INPUT.CROP_PCT", [0.0, 1.5]),
        ("INPUT.SCALE", [(0.0, 1.0), (1.0, 0.5), (0.1,), ("a", "b")]),
        ("INPUT.RANDOM_FLIP", ["vertical"]),
        ("INPUT.INTERPOLATION", ["cubic"]),
        ("INPUT.MIXUP_ALPHA", [-0.1, float("nan")]),
        ("INPUT.MIXUP_MODE", ["image"]),
        ("DATALOADER.NUM_WORKERS", [-1]),
        ("DATALOADER.AUG_REPEATS", [0]),
        ("DATALOADER.BATCH_COMPOSITION", ["video"]),
        ("DATALOADER.MAX_UNREADABLE", [1.0, -1.0]),
        ("SOLVER.EPOCHS", [0]),
        ("SOLVER.IMS_PER_BATCH", [0]),
        ("SOLVER.GRAD_ACCUM_STEPS", [0]),
        ("SOLVER.BASE_LR", [0.0, -1.0, float("inf"), float("nan")]),
        ("SOLVER.BASE_LR_END", [0.11, -0.1]),  # above BASE_LR; below 0
        ("SOLVER.WARMUP_EPOCHS", [90, -1]),
        ("SOLVER.LR_SCHEDULER_NAME", ["WarmupCosineLR"]),
        ("SOLVER.DECAY_MILESTONES", [(60, 30)]),
        ("SOLVER.LOSS", ["mse"]),
        ("SOLVER.LABEL_SMOOTHING", [1.0]),
        ("SOLVER.BCE_TARGET_THRESH", [0.2, "half"]),  # with cross entropy; not a number
        ("SOLVER.AMP.DTYPE", ["half"]),
        ("SOLVER.CHECKPOINT_PERIOD", [0]),
        ("TEST.VAL_INTERVAL", [-1]),
    ],
)
def test_values_out_of_range_are_named(key, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"{key} = .*; allowed") as error:
            check_pretrain_config(config(key, value))
        assert repr(value) in str(error.value)


def test_all_that_is_wrong_comes_at_once():
    with pytest.raises(ConfigError) as error:
        check_pretrain_config(config("SOLVER.EPOCHS", 0, "SOLVER.GAMMA", 2.0))
    assert "SOLVER.EPOCHS = 0;" in str(error.value) and "SOLVER.GAMMA = 2.0;" in str(error.value)


def test_float16_needs_cuda():
    values = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16")
    check_pretrain_config(config(*values))
    with pytest.raises(ConfigError, match="AMP.DTYPE = 'float16'; allowed on the CPU: 'bfloat16'"):
        check_pretrain_config(config(*values, "MODEL.DEVICE", "cpu"))


def test_unknown_keys_name_the_closest_and_no_other_engine(tmp_path):
    with pytest.raises(ConfigError, match="SOLVER.EPOCH: .* did you mean SOLVER.EPOCHS") as error:
        config("SOLVER.EPOCH", 3)
    (tmp_path / "c.yaml").write_text("SEED: !!python/name:os.getpid")
    with pytest.raises(ConfigError, match="c.yaml: SEED.*Write the value out") as code:
        get_pretrain_cfg().merge_from_file(str(tmp_path / "c.yaml"))
    assert "detectron2" not in str(error.value) + str(code.value)


# ---- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load(name):
    cfg = recipe(name)
    check_pretrain_config(cfg)
    refbn_options(cfg)
    assert name.endswith("_" + cfg.MODEL.NORM.lower())
    assert name == Path(cfg.OUTPUT_DIR).name


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("_refbn")])
def test_recipes_of_a_kind_differ_only_in_the_norm(name):
    refbn = dict(leaves(recipe(name.rpartition("_")[0] + "_refbn")))
    other = dict(leaves(recipe(name)))
    assert refbn.keys() == other.keys()
    different = {key for key in other if other[key] != refbn[key]}
    assert "MODEL.NORM" in different
    left = different - {"MODEL.NORM", "OUTPUT_DIR"}
    assert all(key.startswith("MODEL.REFBN.") for key in left), left


def test_recipes_are_there():
    assert {
        "resnet50_bn", "resnet50_refbn", "resnet50_gn", "resnet50_syncbn", "resnet50_300ep_bn",
        "resnet50_300ep_refbn", "resnet50_refin", "shapes_resnet18_bn", "shapes_resnet18_refbn",
        "shapes_resnet18_gn",
    } == set(RECIPES)  # fmt: skip
