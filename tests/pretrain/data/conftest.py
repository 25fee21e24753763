import shutil

import pytest


@pytest.fixture
def copy(tiny_classes, tmp_path, cfg):
    """Copy `tiny_classes`, so that a test may change the files; `cfg` names the copy."""
    root = tmp_path / "copy"
    shutil.copytree(tiny_classes, root)
    cfg.DATASETS.ROOT = str(root)
    return root
