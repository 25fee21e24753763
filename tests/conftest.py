import os
import socket

import pytest

from tests.device import DEVICE

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads: small tensors, many processes

QUICKSTART = "configs/quickstart/mask_rcnn_R_18_FPN_refbn.yaml"


@pytest.fixture
def free_port():
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory):
    """A root of 24 + 6 shapes pictures of 64 pixels."""
    from refbn_d2.data.shapes.dataset import make_detection

    root = tmp_path_factory.mktemp("datasets")
    make_detection(root, size=64, num_train=24, num_val=6)
    return root


@pytest.fixture
def tiny_cfg(tiny_shapes, tmp_path, request):
    """Mask R-CNN R-18-FPN, RefBN everywhere, for `tiny_shapes`: some steps a second on one core."""
    from refbn_d2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(request.config.rootpath / QUICKSTART))
    shapes = tiny_shapes / "shapes"
    splits = [(s, str(shapes / f"annotations/instances_{s}.json"), str(shapes / s))
              for s in ("train", "val")]  # fmt: skip
    cfg.merge_from_list(
        [
            "DATASETS.REGISTER", [(f"tiny_{split}", *rest) for split, *rest in splits],
            "DATASETS.TRAIN", ["tiny_train"], "DATASETS.TEST", ["tiny_val"],
            "INPUT.MIN_SIZE_TRAIN", [64], "INPUT.MIN_SIZE_TEST", 64,
            "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 4,
            "SOLVER.BASE_LR", 0.002, "SOLVER.AMP.ENABLED", False, "TEST.EVAL_PERIOD", 0,
            "MODEL.ROI_BOX_HEAD.NUM_CONV", 2, "MODEL.ROI_BOX_HEAD.CONV_DIM", 64,
            "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 256,
            "MODEL.ROI_BOX_HEAD.NORM", "RefBN", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32,
            "MODEL.REFBN.NUM_IMAGES", 4, "MODEL.REFBN.SLICE_SIZE", 2,
            "MODEL.REFBN.REFRESH_PERIOD", 3,
            "MODEL.DEVICE", DEVICE, "DATALOADER.NUM_WORKERS", 0, "SEED", 3,
            "OUTPUT_DIR", str(tmp_path / "output"),
        ]
    )  # fmt: skip
    return cfg


@pytest.fixture
def detectron2_cfg(tiny_cfg):
    """`tiny_cfg` as Detectron2's own config, with this package registered."""
    config = pytest.importorskip("detectron2.config")
    cfg = config.get_cfg()
    theirs = config.CfgNode.load_cfg(tiny_cfg.dump())
    _drop_unknown(theirs, cfg)
    cfg.merge_from_other_cfg(theirs)
    return cfg


def _drop_unknown(cfg, known):
    """Drop the keys that Detectron2 has had only since its release 0.6."""
    for key, value in list(cfg.items()):
        if key not in known:
            del cfg[key]
        elif isinstance(value, type(cfg)):
            _drop_unknown(value, known[key])


@pytest.fixture
def config_file(tiny_cfg, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg.dump())
    return path
