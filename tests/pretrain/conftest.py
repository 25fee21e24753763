import pytest

pytest.importorskip("timm")

from refbn_d2.config.pretrain import get_pretrain_cfg  # noqa: E402
from refbn_d2.data.shapes.dataset import make_classification
from tests.device import DEVICE


@pytest.fixture(scope="session")
def tiny_classes(tmp_path_factory):
    """Make train/ and val/: 84 + 24 pictures of 32 pixels in 12 classes and 7 domains."""
    return make_classification(
        tmp_path_factory.mktemp("datasets"), size=32, num_train=84, num_val=24
    )


@pytest.fixture(scope="session")
def make_cfg(tiny_classes):
    """Return a function output_dir -> config: a small ResNet with RefBN, 2 epochs of 10 steps."""

    def make(output_dir):
        cfg = get_pretrain_cfg()
        cfg.merge_from_list(
            [
                "DATASETS.ROOT", str(tiny_classes), "MODEL.NAME", "test_resnet",
                "MODEL.DEVICE", DEVICE, "INPUT.SIZE", 32, "INPUT.SIZE_TEST", 32,
                "SOLVER.IMS_PER_BATCH", 8, "SOLVER.EPOCHS", 2, "SOLVER.WARMUP_EPOCHS", 1,
                "SOLVER.BASE_LR", 0.02, "SOLVER.CHECKPOINT_PERIOD", 7, "TEST.VAL_INTERVAL", 0,
                "DATALOADER.NUM_WORKERS", 0, "MODEL.REFBN.NUM_IMAGES", 6,
                "MODEL.REFBN.SLICE_SIZE", 2, "MODEL.REFBN.REFRESH_PERIOD", 3, "SEED", 3,
                "OUTPUT_DIR", str(output_dir),
            ]
        )  # fmt: skip
        return cfg

    return make


@pytest.fixture
def cfg(make_cfg, tmp_path):
    return make_cfg(tmp_path / "output")
