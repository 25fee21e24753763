"""The configs of the package: their names, and what a command line makes of a path."""

from pathlib import Path

import pytest

from refbn_d2 import configs
from refbn_d2.utils.config_files import find_config_file
from refbn_d2.utils.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
NAME = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_refbn.yaml"


def test_every_file_of_configs_has_a_name():
    files = [p for p in CONFIGS.rglob("*") if p.is_file() and p.name != "README.md"]
    files = [p for p in files if "__pycache__" not in p.parts]
    assert configs.config_names() == sorted(p.relative_to(CONFIGS).as_posix() for p in files)
    assert configs.get_config_file(NAME) == str(CONFIGS / NAME)


@pytest.mark.parametrize(
    "name, similar",
    [(NAME.replace("R_50", "R_5O"), NAME), (NAME.replace(".yaml", ""), NAME), ("zzzzzz", "")],
)
def test_an_unknown_name_lists_similar_ones(name, similar):
    with pytest.raises(ConfigError, match=f"no config is called '{name}'") as error:
        configs.get_config_file(name)
    assert similar in str(error.value) and ("Similar" in str(error.value)) == bool(similar)
    assert "config_names()" in str(error.value)


def test_a_command_line_takes_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config_file(NAME) == find_config_file(f"configs/{NAME}") == str(CONFIGS / NAME)
    for other in ("mine.yaml", "configs/mine.yaml", "", str(tmp_path / NAME)):
        assert find_config_file(other) == other
    mine = tmp_path / "configs" / NAME
    mine.parent.mkdir(parents=True)
    mine.write_text("")
    assert find_config_file(f"configs/{NAME}") == f"configs/{NAME}"  # it exists
