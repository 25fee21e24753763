import shutil

import pytest


@pytest.fixture
def copy(tiny_classes, tmp_path, cfg):
    """A copy of `tiny_classes` that a test may spoil; `cfg` names it."""
    root = tmp_path / "copy"
    shutil.copytree(tiny_classes, root)
    cfg.DATASETS.ROOT = str(root)
    return root
