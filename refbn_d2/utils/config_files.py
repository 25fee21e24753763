"""Find the configs that come with the package: in the wheel, or in a checkout's configs/."""

import difflib
from pathlib import Path

from refbn_d2.utils.errors import ConfigError, listing

_IN_WHEEL = Path(__file__).parents[1] / "configs"
_IN_CHECKOUT = Path(__file__).parents[2] / "configs"
_ROOT = _IN_WHEEL if (_IN_WHEEL / "Base-COCO.yaml").is_file() else _IN_CHECKOUT


def config_names() -> list[str]:
    """Return the names of all configs, sorted: "COCO-Detection/faster_rcnn_R_50_C4_1x_refbn.yaml".

    Bases, studies, pretraining recipes and LazyConfigs (.py) are among them.
    """
    files = [path for suffix in ("yaml", "py") for path in _ROOT.rglob(f"*.{suffix}")]
    names = (path.relative_to(_ROOT).as_posix() for path in files)
    return sorted(name for name in names if name != "__init__.py")


def get_config_file(name: str) -> str:
    """Return the path of a config by its name, which is its path in configs/.

    Raises:
        ConfigError: there is no config of this name; lists those with a similar name.
    """
    names = config_names()
    if name in names:
        return str(_ROOT / name)
    similar = difflib.get_close_matches(name, names, n=3)
    raise ConfigError(
        f"no config is called {name!r}. "
        + (f"Similar: {listing(similar)}. " if similar else "")
        + "refbn_d2.configs.config_names() lists all"
    )


def find_config_file(path: str) -> str:
    """Return `path` if it exists; else the config that it names, with or without "configs/".

    So `--config-file configs/...` means the same in a checkout and outside it. Any other path comes
    back as it is, for an error that names it.
    """
    name = path.removeprefix("configs/")
    return str(_ROOT / name) if not Path(path).exists() and name in config_names() else path
