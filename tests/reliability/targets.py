"""The programs whose runs are broken, with small models on a few small pictures."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.config import get_cfg
from refbn_d2.config.pretrain import get_pretrain_cfg
from refbn_d2.data.shapes.dataset import make_classification, make_detection

ROOT = Path(__file__).parents[2]

# A ResNet-50 with few channels: it trains several steps a second, and a checkpoint has 3 MB.
DETECTOR = [
    "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32,
    "INPUT.MIN_SIZE_TRAIN", [64], "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2,
    "SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.BASE_LR", 0.002,
    "SOLVER.AMP.ENABLED", False, "MODEL.REFBN.NUM_IMAGES", 4, "MODEL.REFBN.SLICE_SIZE", 2,
    "MODEL.REFBN.REFRESH_PERIOD", 3, "MODEL.DEVICE", "cpu", "SEED", 3,
]  # fmt: skip
CLASSIFIER = [
    "MODEL.NAME", "test_resnet", "MODEL.DEVICE", "cpu", "INPUT.SIZE", 32, "INPUT.SIZE_TEST", 32,
    "SOLVER.IMS_PER_BATCH", 8, "SOLVER.EPOCHS", 3, "SOLVER.WARMUP_EPOCHS", 1,
    "SOLVER.BASE_LR", 0.02, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.VAL_INTERVAL", 2,
    "DATALOADER.MAX_UNREADABLE", 0.0, "MODEL.EMA.ENABLED", True, "MODEL.REFBN.NUM_IMAGES", 6,
    "MODEL.REFBN.SLICE_SIZE", 2, "MODEL.REFBN.REFRESH_PERIOD", 3, "SEED", 3,
]  # fmt: skip

State = Mapping[str, torch.Tensor]


class Target(ABC):
    """A program.

    Args:
        folder: of one round; `data` and `out` are in it.
        workers: processes that load data.
    """

    name: str
    compared = True  # Detectron2's resumed runs have other batches than unbroken ones
    tolerated = ""  # output that is no failure

    def __init__(self, folder: Path, workers: int = 0) -> None:
        self.folder, self.workers = folder, workers
        self.data, self.out = folder / "data", folder / "out"

    @staticmethod
    def make_data(root: Path) -> None:
        """Make the pictures below `root`, which every round gets a copy of."""
        make_detection(root, size=64, num_train=12, num_val=4)

    @abstractmethod
    def prepare(self) -> None:
        """Write what the command needs into the round's folder."""

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command that starts and resumes it, without "python"."""

    @abstractmethod
    def weights(self) -> State:
        """Return the weights that the finished run wrote."""

    def is_complete(self) -> bool:
        """Return whether all is written; then a program that resumes nothing has nothing to do."""
        return False


def _detector_config(target: Target, out: Path, splits: tuple[str, ...] = ("train", "val")) -> str:
    """Write a config of a small Mask R-CNN with RefBN; return its path."""
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs/quickstart/mask_rcnn_R_18_FPN_refbn.yaml"))
    shapes = target.data / "shapes"
    sets = [
        (f"tiny_{split}", f"{shapes}/annotations/instances_{split}.json", f"{shapes}/{split}")
        for split in splits
    ]
    cfg.merge_from_list(
        [*DETECTOR, "DATASETS.REGISTER", sets, "DATASETS.TRAIN", ["tiny_train"],
         "DATASETS.TEST", ["tiny_val"], "DATALOADER.NUM_WORKERS", target.workers,
         "OUTPUT_DIR", str(out)]
    )  # fmt: skip
    path = target.folder / "config.yaml"
    path.write_text(cfg.dump())
    return str(path)


class Torchvision(Target):
    name = "torchvision engine"
    engine = "torchvision"

    def prepare(self) -> None:
        self.config = _detector_config(self, self.out / "run")

    def command(self) -> list[str]:
        engine = ("--engine", self.engine, "--config-file", self.config)
        return [str(ROOT / "tools/train_net.py"), "--resume", *engine]

    def weights(self) -> State:
        return load_checkpoint(self.out / "run/model_final.pth")["model"]


class Detectron2(Torchvision):
    name = engine = "detectron2"
    compared = False
    # SIGTERM to the group ends its processes that load data, which may interrupt a destructor.
    tolerated = r"Exception ignored in: .*\nTraceback \(most recent call last\)"


class Pretraining(Target):
    name = "pretraining"

    @staticmethod
    def make_data(root: Path) -> None:
        make_classification(root, size=32, num_train=36, num_val=12)

    def prepare(self) -> None:
        cfg = get_pretrain_cfg()
        (root,) = self.data.iterdir()
        cfg.merge_from_list(
            [*CLASSIFIER, "DATASETS.ROOT", str(root), "DATALOADER.NUM_WORKERS", self.workers,
             "OUTPUT_DIR", str(self.out / "run")]
        )  # fmt: skip
        (self.folder / "config.yaml").write_text(cfg.dump())

    def command(self) -> list[str]:
        config = str(self.folder / "config.yaml")
        return [str(ROOT / "tools/pretrain_imagenet.py"), "--resume", "--config-file", config]

    def weights(self) -> State:
        state = load_checkpoint(self.out / "run/model_final.pth")
        average = {f"ema.{name}": tensor for name, tensor in state["model_ema"].items()}
        return state["model"] | average


class Conversion(Target):
    name = "conversion"

    def prepare(self) -> None:
        from timm import create_model

        torch.manual_seed(0)
        torch.save(create_model("resnet18").state_dict(), self.folder / "resnet18.pth")

    def command(self) -> list[str]:
        files = (str(self.folder / "resnet18.pth"), str(self.out / "resnet18.pkl"))
        tool = str(ROOT / "tools/convert_checkpoint.py")
        return [tool, *files, "--to", "detectron2", "--verify"]

    def weights(self) -> State:
        return load_checkpoint(self.out / "resnet18.pkl")["model"]

    def is_complete(self) -> bool:
        return (self.out / "resnet18.pkl").exists()  # written whole or not at all


class Quickstart(Target):
    """The quickstart's machinery with two steps: a training, and the conversion of its result."""

    name = "quickstart"

    def prepare(self) -> None:
        self.config = _detector_config(self, self.out / "run")

    def command(self) -> list[str]:
        return [str(ROOT / "tests/reliability/two_steps.py"), str(self.out), self.config]

    def weights(self) -> State:
        return load_checkpoint(self.out / "exported.pth")["model"]


class Study(Target):
    """A study of one norm, one seed and one condition."""

    name = "study"

    def prepare(self) -> None:
        shapes = self.data / "shapes"
        register = {
            f"tiny_{split}": [f"{shapes}/annotations/instances_{split}.json", f"{shapes}/{split}"]
            for split in ("train", "val")
        }
        overrides = dict(zip(DETECTOR[::2], DETECTOR[1::2], strict=True))
        overrides |= {"DATALOADER.NUM_WORKERS": self.workers}
        del overrides["SEED"], overrides["MODEL.DEVICE"]
        sets = {"DATASETS.TRAIN": ["tiny_train"], "DATASETS.TEST": ["tiny_val"]}
        content = {
            "task": "detection", "engine": "torchvision",
            "config": str(ROOT / "configs/quickstart/mask_rcnn_R_18_FPN_refbn.yaml"),
            "overrides": overrides | sets, "data": {"register": register}, "seeds": [1],
            "baseline": "RefBN", "norms": {"RefBN": {}}, "conditions": {"iid": {}},
        }  # fmt: skip
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def command(self) -> list[str]:
        study = ("--study", str(self.folder / "tiny.yaml"), "--output-dir", str(self.out / "study"))
        tool = str(ROOT / "tools/measure_generalization.py")
        return [tool, *study, "--jobs", "1", "--only", "norm=RefBN"]

    def weights(self) -> State:
        if not (self.out / "study/results.csv").exists():
            raise FileNotFoundError("results.csv")
        (file,) = (self.out / "study").rglob("model_final.pth")
        return load_checkpoint(file)["model"]


TARGETS: tuple[type[Target], ...] = (
    Torchvision, Detectron2, Pretraining, Conversion, Quickstart, Study,
)  # fmt: skip


def python(target: Target) -> list[str]:
    return [sys.executable, *target.command()]
