"""Provide the config of `tools/pretrain_imagenet.py`.

Keys have Detectron2's names where Detectron2 has the key, else timm's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from refbn_d2.config.cfg_node import CfgNode, leaves
from refbn_d2.config.refbn import add_refbn_model_config
from refbn_d2.layers.peers import PEERS
from refbn_d2.utils.errors import ConfigError


class PretrainCfgNode(CfgNode):
    """Config tree for pretraining: its errors do not suggest another engine."""

    UNKNOWN_KEY = "docs/pretraining.md says where all keys are listed."
    CODE = "Write the value out"


def get_pretrain_cfg() -> CfgNode:
    """Return a new config with every key of pretraining and its default."""
    cfg = PretrainCfgNode()
    cfg.OUTPUT_DIR = "./output"  # logs, checkpoints and the backbone go here
    cfg.SEED = -1  # negative: a new seed in each run
    cfg.CUDNN_BENCHMARK = True  # let cuDNN time its algorithms
    _add_model(cfg)
    _add_data(cfg)
    _add_solver(cfg)
    return cfg


def _add_model(cfg: CfgNode) -> None:
    model = cfg.MODEL = PretrainCfgNode()
    model.NAME = "resnet50"  # a timm model with BatchNorm
    # replaces BatchNorm: "RefBN", "RefIN", "BN", "SyncBN", "GN", "BRN", "CBN", "MABN"
    model.NORM = "RefBN"
    model.NUM_CLASSES = 0  # 0: those of the data; else the data must have that many
    model.DROP_RATE = 0.0  # dropout before the classifier
    model.DROP_PATH_RATE = 0.0  # stochastic depth: the rate of the last block
    model.WEIGHTS = ""  # checkpoint to start from, or to evaluate
    model.DEVICE = "cuda"  # or "cpu"
    model.CHANNELS_LAST = True  # memory format
    model.COMPILE = False  # torch.compile
    model.PIXEL_MEAN = [123.675, 116.28, 103.53]  # of 0-255 values, RGB
    model.PIXEL_STD = [58.395, 57.12, 57.375]
    model.EMA = PretrainCfgNode()  # moving average of all weights; also validated and saved
    model.EMA.ENABLED = False
    model.EMA.DECAY = 0.9998  # per step
    model.EMA.WARMUP = False  # a lower decay at the beginning
    add_refbn_model_config(cfg)
    cfg.MODEL.REFBN.REFRESH = "concat"  # RefIN too: a static one learns later


def _add_data(cfg: CfgNode) -> None:
    datasets = cfg.DATASETS = PretrainCfgNode()
    # Folder of the data, relative to $DETECTRON2_DATASETS (./datasets). "": the synthetic shapes.
    datasets.ROOT = ""
    # Inside ROOT: a folder of class folders, a tar file, or shards ("train-{000..127}.tar").
    datasets.TRAIN = "train"
    datasets.TEST = "val"

    inputs = cfg.INPUT = PretrainCfgNode()
    inputs.SIZE = 224  # side in training, pixels
    inputs.SIZE_TEST = 224
    inputs.CROP_PCT = 0.875  # of the shorter side, kept in validation
    inputs.SCALE = (0.08, 1.0)  # area of random resized crops
    inputs.RATIO = (3 / 4, 4 / 3)  # their width / height
    inputs.INTERPOLATION = "bilinear"  # or "bicubic", ...; "random" in training
    inputs.RANDOM_FLIP = "horizontal"  # every second image; or "none"
    inputs.COLOR_JITTER = 0.4  # brightness, contrast, saturation; not with AUTO_AUGMENT
    inputs.AUTO_AUGMENT = ""  # in timm's notation ("rand-m7-mstd0.5-inc1"); "": none
    inputs.RANDOM_ERASING = 0.0  # probability
    inputs.MIXUP_ALPHA = 0.0  # 0: none
    inputs.CUTMIX_ALPHA = 0.0  # 0: none; with both, MIXUP_SWITCH_PROB decides
    inputs.MIXUP_PROB = 1.0  # probability that a batch is mixed
    inputs.MIXUP_SWITCH_PROB = 0.5  # probability of cutmix instead of mixup
    inputs.MIXUP_MODE = "batch"  # one draw for each "batch", "pair" or "elem"
    inputs.MIXUP_OFF_EPOCH = 0  # no mixing from this epoch on; 0: never off

    loader = cfg.DATALOADER = PretrainCfgNode()
    loader.NUM_WORKERS = 4  # processes per GPU that read images; 0: no extra ones
    loader.AUG_REPEATS = 1  # times each image is repeated in a row, with new augmentations
    # Composition of a batch: "iid"; "domain": one photometric domain of the shapes; "class": one
    # group of consecutive classes.
    loader.BATCH_COMPOSITION = "iid"
    loader.CLASSES_PER_BATCH = 10  # with "class"
    loader.MAX_UNREADABLE = 0.001  # largest share of broken images, which are skipped


def _add_solver(cfg: CfgNode) -> None:
    solver = cfg.SOLVER = PretrainCfgNode()
    solver.EPOCHS = 90
    solver.IMS_PER_BATCH = 256  # images per step, over all workers and accumulated parts
    solver.GRAD_ACCUM_STEPS = 1  # parts into which a worker splits its share of a batch
    solver.OPTIMIZER = "sgd"  # a timm name; "sgd" is Nesterov's, "momentum" is plain SGD
    solver.BASE_LR = 0.1  # after the warmup
    solver.MOMENTUM = 0.9
    solver.OPT_KWARGS = ()  # other arguments of the optimizer: (("eps", 1e-6), ...)
    solver.WEIGHT_DECAY = 0.0001  # not for norms and biases
    solver.LR_SCHEDULER_NAME = "cosine"  # timm's names: or "multistep", "tanh", "constant"
    solver.BASE_LR_END = 0.0  # at the end of schedules without milestones
    solver.DECAY_MILESTONES = (30, 60, 80)  # epochs, of "multistep"
    solver.GAMMA = 0.1  # factor on the rate at each of them
    solver.WARMUP_EPOCHS = 5.0  # part of EPOCHS; linear, from WARMUP_LR
    solver.WARMUP_LR = 0.0
    solver.LOSS = "ce"  # cross entropy, or "bce": binary cross entropy of each class
    solver.LABEL_SMOOTHING = 0.0
    solver.BCE_TARGET_THRESH = None  # "bce": mixed targets above it become 1, others 0
    solver.CLIP_GRAD = 0.0  # largest norm of the whole gradient; 0: no limit
    solver.AMP = PretrainCfgNode()
    solver.AMP.ENABLED = False  # automatic mixed precision, in validation too
    solver.AMP.DTYPE = "bfloat16"  # or "float16" on CUDA, with loss scaling
    solver.CHECKPOINT_PERIOD = 5000  # steps; the last and the best checkpoint are kept

    cfg.TEST = PretrainCfgNode()
    cfg.TEST.VAL_INTERVAL = 1  # epochs between validations; 0: only at the end


# ---- allowed values


class _Rule(NamedTuple):
    """What some keys may hold: in words, and as a test of a value."""

    allowed: str
    fits: Callable[[Any], bool]
    keys: tuple[str, ...]


def _one_of(choices: tuple[str, ...], *keys: str) -> _Rule:
    return _Rule(" or ".join(map(repr, choices)), lambda value: value in choices, keys)


def _at_least(least: float, *keys: str) -> _Rule:
    return _Rule(f"{least} or more", lambda value: least <= value < math.inf, keys)


def _is_range(value: Any) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1] < math.inf


_RULES = (
    _one_of(("RefBN", "RefIN", "BN", "SyncBN", "GN", *PEERS), "MODEL.NORM"),
    _one_of(("cuda", "cpu"), "MODEL.DEVICE"),
    _one_of(("horizontal", "none"), "INPUT.RANDOM_FLIP"),
    _one_of(("cosine", "multistep", "tanh", "constant"), "SOLVER.LR_SCHEDULER_NAME"),
    _one_of(("bilinear", "bicubic", "lanczos", "random"), "INPUT.INTERPOLATION"),
    _one_of(("batch", "pair", "elem"), "INPUT.MIXUP_MODE"),
    _one_of(("iid", "domain", "class"), "DATALOADER.BATCH_COMPOSITION"),
    _one_of(("ce", "bce"), "SOLVER.LOSS"),
    _one_of(("bfloat16", "float16"), "SOLVER.AMP.DTYPE"),
    _at_least(32, "INPUT.SIZE", "INPUT.SIZE_TEST"),
    _at_least(
        1, "DATALOADER.AUG_REPEATS", "DATALOADER.CLASSES_PER_BATCH", "SOLVER.EPOCHS",
        "SOLVER.IMS_PER_BATCH", "SOLVER.GRAD_ACCUM_STEPS", "SOLVER.CHECKPOINT_PERIOD",
    ),
    _at_least(
        0, "MODEL.NUM_CLASSES", "INPUT.COLOR_JITTER", "INPUT.MIXUP_ALPHA", "INPUT.CUTMIX_ALPHA",
        "INPUT.MIXUP_OFF_EPOCH", "DATALOADER.NUM_WORKERS", "SOLVER.MOMENTUM", "SOLVER.WEIGHT_DECAY",
        "SOLVER.BASE_LR_END", "SOLVER.WARMUP_EPOCHS", "SOLVER.WARMUP_LR", "SOLVER.CLIP_GRAD",
        "TEST.VAL_INTERVAL",
    ),
    _Rule(
        "a number in [0, 1)", lambda value: 0 <= value < 1,
        ("MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "DATALOADER.MAX_UNREADABLE",
         "SOLVER.LABEL_SMOOTHING"),
    ),
    _Rule(
        "a number in [0, 1]", lambda value: 0 <= value <= 1,
        ("MODEL.EMA.DECAY", "INPUT.RANDOM_ERASING", "INPUT.MIXUP_PROB", "INPUT.MIXUP_SWITCH_PROB"),
    ),
    _Rule(
        "a number in (0, 1]", lambda value: 0 < value <= 1, ("INPUT.CROP_PCT", "SOLVER.GAMMA")
    ),
    _Rule("a number above 0", lambda value: 0 < value < math.inf, ("SOLVER.BASE_LR",)),
    _Rule("two numbers above 0, ascending", _is_range, ("INPUT.SCALE", "INPUT.RATIO")),
    _Rule("3 numbers", lambda value: len(value) == 3, ("MODEL.PIXEL_MEAN",)),
    _Rule(
        "3 numbers above 0", lambda value: len(value) == 3 and min(value) > 0, ("MODEL.PIXEL_STD",)
    ),
    _Rule(
        "epochs, ascending", lambda value: list(value) == sorted(value),
        ("SOLVER.DECAY_MILESTONES",),
    ),
    _Rule(
        "None or a number in [0, 1)", lambda value: value is None or 0 <= value < 1,
        ("SOLVER.BCE_TARGET_THRESH",),
    ),
)  # fmt: skip


def check_pretrain_config(cfg: CfgNode) -> None:
    """Check that every value is allowed, by itself and in combination with the others.

    Raises:
        ConfigError: some are not; the message lists each key, its value and what is allowed.
    """
    values = dict(leaves(cfg))
    problems = []
    for rule in _RULES:
        for key in rule.keys:
            try:
                fits = rule.fits(values[key])
            except TypeError:  # a string for a number
                fits = False
            if not fits:
                problems.append(f"{key} = {values[key]!r}; allowed: {rule.allowed}")
    problems = problems or [f"{key} = {values[key]!r}; {why}" for key, why in _misfits(cfg)]
    if problems:
        raise ConfigError("\n  ".join(["values that are not allowed:", *problems]))


def _misfits(cfg: CfgNode):
    """Yield (key, reason) for allowed values that do not fit together."""
    solver = cfg.SOLVER
    if solver.WARMUP_EPOCHS >= solver.EPOCHS:
        yield "SOLVER.WARMUP_EPOCHS", f"allowed: less than SOLVER.EPOCHS = {solver.EPOCHS}"
    if solver.LR_SCHEDULER_NAME in ("cosine", "tanh") and solver.BASE_LR_END > solver.BASE_LR:
        yield "SOLVER.BASE_LR_END", f"allowed: up to SOLVER.BASE_LR = {solver.BASE_LR}"
    if solver.AMP.ENABLED and solver.AMP.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        yield "SOLVER.AMP.DTYPE", "allowed on the CPU: 'bfloat16'"
    if solver.BCE_TARGET_THRESH is not None and solver.LOSS != "bce":
        yield "SOLVER.BCE_TARGET_THRESH", "allowed with SOLVER.LOSS 'ce': None"
