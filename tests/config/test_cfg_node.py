"""Reading configs: bases, overrides, types, and errors."""

import pytest
import yaml

from refbn_d2.config import ConfigError, get_cfg


def write(path, text):
    path.write_text(text)
    return str(path)


def test_bases_and_overrides_apply_in_order(tmp_path):
    write(tmp_path / "base.yaml", "SOLVER:\n  BASE_LR: 0.5\n  STEPS: (10, 20)\nSEED: 3\n")
    (tmp_path / "sub").mkdir()
    child = write(
        tmp_path / "sub" / "child.yaml",
        '_BASE_: "../base.yaml"\nSOLVER:\n  STEPS: [30]\n  MAX_ITER: 40\n',
    )
    cfg = get_cfg()
    cfg.merge_from_file(child)
    cfg.merge_from_list(["SOLVER.MAX_ITER", "50", "MODEL.MASK_ON", "True", "SEED", 4])
    assert cfg.SOLVER.BASE_LR == 0.5
    assert cfg.SOLVER.STEPS == (30,)
    assert cfg.SOLVER.MAX_ITER == 50
    assert cfg.MODEL.MASK_ON is True
    assert cfg.SEED == 4


def test_a_dump_loads_and_changes_nothing(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.REFBN.WEIGHTING", "count", "SOLVER.STEPS", "(1, 2)"])
    loaded = get_cfg()
    loaded.merge_from_file(write(tmp_path / "config.yaml", cfg.dump()))
    assert yaml.safe_load(loaded.dump()) == yaml.safe_load(cfg.dump())
    assert loaded.SOLVER.STEPS == (1, 2) and loaded.MODEL.REFBN.WEIGHTING == "count"


def test_an_int_for_a_float_and_digits_for_a_name_are_accepted():
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.BASE_LR", "1", "OUTPUT_DIR", "2020"])
    assert cfg.SOLVER.BASE_LR == 1.0 and isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.OUTPUT_DIR == "2020"


def test_a_key_without_a_default_takes_a_number():
    cfg = get_cfg()
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None
    cfg.merge_from_list(["SOLVER.WEIGHT_DECAY_BIAS", "0.5"])
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS == 0.5


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["SOLVER.BASELR", "1"], ["SOLVER.BASELR", "did you mean SOLVER.BASE_LR?"]),
        (["SOLVER.BASE_LR.X", "1"], ["SOLVER.BASE_LR.X", "no such key"]),
        (["MODEL.POINT_HEAD.NUM_FC", "3"], ["MODEL.POINT_HEAD.NUM_FC", "--engine detectron2"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "'many'", "str", "int"]),
        (["SOLVER.MAX_ITER", "1.5"], ["SOLVER.MAX_ITER", "1.5", "float", "int"]),
        (["MODEL.MASK_ON", "1"], ["MODEL.MASK_ON", "int", "bool"]),
        (["DATASETS.TRAIN", "coco_2017_train"], ["DATASETS.TRAIN", "tuple or list"]),
        (["SOLVER.BASE_LR", "None"], ["SOLVER.BASE_LR", "NoneType", "float"]),
        (["SOLVER", "3"], ["SOLVER = ", "section", "SOLVER.MAX_ITER"]),
        (["SOLVER.BASE_LR"], ["SOLVER.BASE_LR", "KEY VALUE"]),
    ],
)
def test_a_wrong_override_is_named(overrides, named):
    with pytest.raises(ConfigError) as error:
        get_cfg().merge_from_list(overrides)
    for part in named:
        assert part in str(error.value)


def test_all_that_is_wrong_comes_at_once_and_nothing_is_merged(tmp_path):
    text = "SEED: 7\nSOLVER:\n  BASELR: 1\n  MAX_ITER: soon\n"
    cfg = get_cfg()
    with pytest.raises(ConfigError, match=r"(?s)c\.yaml.*SOLVER\.BASELR.*SOLVER\.MAX_ITER"):
        cfg.merge_from_file(write(tmp_path / "c.yaml", text))
    assert cfg == get_cfg()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "nothing"),
        ("- 1\n- 2\n", "a list"),
        ("just words", "a str"),
        ("SOLVER: {", "not valid YAML"),
        ("SOLVER:\n", "SOLVER is a section"),
        ('_BASE_: "gone.yaml"', "gone.yaml does not exist"),
        ('_BASE_: ["list.yaml"]', "list.yaml contains a list"),
        ('_BASE_: "base.yaml"\nSEED: {A: 1}', "SEED"),
        ('_BASE_: "broken.yaml"', "form a cycle"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, named):
    path = write(tmp_path / "broken.yaml", text)
    write(tmp_path / "base.yaml", "SEED: 1")
    write(tmp_path / "list.yaml", "- 1")
    with pytest.raises((ConfigError, FileNotFoundError)) as error:
        get_cfg().merge_from_file(path)
    assert named in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_missing_unreadable_or_binary_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml does not exist.*check the path"):
        get_cfg().merge_from_file(str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        get_cfg().merge_from_file(str(tmp_path))
    (tmp_path / "weights.pkl").write_bytes(b"\x80\x04\xff\xfe")
    with pytest.raises(ConfigError, match=r"weights\.pkl"):
        get_cfg().merge_from_file(str(tmp_path / "weights.pkl"))


def test_code_in_yaml_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    text = (
        "MODEL:\n  META_ARCHITECTURE: RetinaNet\n  ANCHOR_GENERATOR:\n"
        f'    SIZES: !!python/object/apply:os.mkdir ["{trace}"]\n'
    )
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as error:
        get_cfg().merge_from_file(path)
    for part in ("c.yaml", "MODEL.ANCHOR_GENERATOR.SIZES", "RetinaNet", "--engine detectron2"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="never run"):
        get_cfg().merge_from_file(path, allow_unsafe=True)
    assert not trace.exists()


def test_a_frozen_config_stays_as_it_is():
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.merge_from_list(["SEED", 1])
    assert cfg.SEED == -1
