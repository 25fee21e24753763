"""Define this package's own config keys, their defaults and their allowed values."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from refbn_d2.layers import has_refbn, refbn_layers
from refbn_d2.layers.functional import GRADIENT, GRADIENTS, PRIOR_COUNT, REFERENCE_WEIGHT
from refbn_d2.layers.ref_batch_norm import WEIGHTINGS
from refbn_d2.utils.errors import ConfigError

logger = logging.getLogger(__name__)

REFRESHES = ("auto", "static", "full", "slice", "concat")
REFERENCES = ("dataset", "checkpoint")
LAYER_OPTIONS = ("reference_weight", "weighting", "gradient", "prior_count")  # of the layers


@dataclass(frozen=True)
class RefBNOptions:
    """Values of the keys of MODEL.REFBN, with lower-case names.

    If one of LAYER_OPTIONS is None, every layer keeps its own.

    Raises:
        ConfigError: a value is not allowed; the message names the full key, the value and what is
            allowed.
    """

    reference_weight: float | None = REFERENCE_WEIGHT  # w of the reference in the mixture, [0, 1]
    weighting: str | None = WEIGHTINGS[0]  # "fixed": w as above; "count": w = n_R / (n_R + n_B)
    gradient: str | None = GRADIENT  # training batch's backward: "pooled", "batch" or "reference"
    prior_count: float | None = PRIOR_COUNT  # RefIN: n_0 in w = n_0 / (n_0 + H W)
    reference: str = "dataset"  # captured on DATASETS.TRAIN; "checkpoint": from MODEL.WEIGHTS
    refresh: str = "auto"  # how its moments are refreshed: one of REFRESHES
    refresh_period: int = 4  # steps between refreshes
    slice_size: int = 8  # "slice", "concat": reference images per refresh, over all workers
    slice_momentum: float = 0.25  # weight of a slice's moments in their moving average, (0, 1]
    num_images: int = 32  # size of the reference batch
    seed: int = 0  # draws the reference images and their augmentations

    def __post_init__(self) -> None:
        if self.reference_weight is not None:
            w = self.reference_weight
            _require(_is_number(w) and 0 <= w <= 1, "REFERENCE_WEIGHT", w, "a number in [0, 1]")
        if self.weighting is not None:
            _require_choice("WEIGHTING", self.weighting, WEIGHTINGS)
        if self.gradient is not None:
            _require_choice("GRADIENT", self.gradient, GRADIENTS)
        if self.prior_count is not None:
            n = self.prior_count
            _require(_is_number(n) and n >= 0, "PRIOR_COUNT", n, "a number of 0 or more")
        _require_choice("REFERENCE", self.reference, REFERENCES)
        _require_choice("REFRESH", self.refresh, REFRESHES)
        _require_int("REFRESH_PERIOD", self.refresh_period, 1)
        _require_int("SLICE_SIZE", self.slice_size, 1)
        _require_int("NUM_IMAGES", self.num_images, 1)
        _require_int("SEED", self.seed, 0)
        m = self.slice_momentum
        _require(_is_number(m) and 0 < m <= 1, "SLICE_MOMENTUM", m, "a number in (0, 1]")
        _require(
            self.slice_size <= self.num_images or self.refresh in ("static", "full"),
            "SLICE_SIZE",
            self.slice_size,
            f"at most MODEL.REFBN.NUM_IMAGES = {self.num_images} with REFRESH {self.refresh!r}",
        )
        _require(
            self.gradient != "reference" or self.refresh in ("auto", "concat"),
            "GRADIENT",
            self.gradient,
            "only with MODEL.REFBN.REFRESH 'concat' (the gradient needs the reference in the "
            f"batch); REFRESH is {self.refresh!r}",
        )


def add_refbn_config(cfg) -> None:
    """Add MODEL.REFBN and the other keys that Detectron2 does not have to `cfg`, in place.

    `cfg` is Detectron2's CfgNode or ours.
    """
    add_refbn_model_config(cfg)
    # Your own data in COCO's format: ((name, json file, image folder), ...)
    cfg.DATASETS.REGISTER = ()
    # Training batches: "iid", or "domain": all images of a batch are of one domain.
    cfg.DATALOADER.BATCH_COMPOSITION = "iid"
    cfg.DATALOADER.DOMAIN_FIELD = "domain"  # of the json's images; or a camera's or video's id
    # Detections of an image and class that count in COCO's AP; TEST.DETECTIONS_PER_IMAGE cuts them.
    cfg.TEST.MAX_DETS_PER_IMAGE = 100


def add_refbn_model_config(cfg) -> None:
    """Add MODEL.REFBN to `cfg`, in place, with the defaults of `RefBNOptions`."""
    refbn = cfg.MODEL.REFBN = type(cfg)()
    for field in fields(RefBNOptions):
        refbn[field.name.upper()] = field.default


def refbn_options(cfg) -> RefBNOptions:
    """Return MODEL.REFBN of `cfg`, or the defaults if the node is missing.

    Raises:
        ConfigError: a value is not allowed; the message names the full key, the value and what is
            allowed.
    """
    node = cfg.MODEL.get("REFBN")
    if node is None:
        return RefBNOptions()
    return RefBNOptions(**{field.name: node[field.name.upper()] for field in fields(RefBNOptions)})


def apply_options(model: nn.Module, options: RefBNOptions) -> None:
    """Give every RefBN and RefIN layer of `model` those of LAYER_OPTIONS that it has."""
    for _, layer in refbn_layers(model):
        for name in LAYER_OPTIONS:
            if hasattr(layer, name) and (value := getattr(options, name)) is not None:
                setattr(layer, name, value)


def check_model(model: nn.Module, cfg) -> None:
    """Check before training that a model whose config names RefBN or RefIN has it.

    torch's and timm's converters to SyncBN, for example, turn RefBN into SyncBN without a word. A
    model whose norms are all frozen gets a warning.

    Raises:
        ConfigError: there are batch norms, but no RefBN or RefIN layer.
    """
    keys = _keys_with(cfg.MODEL, ("RefBN", "RefIN"), "MODEL")
    if not keys or has_refbn(model):
        return
    found = sorted({type(m).__name__ for m in model.modules() if isinstance(m, _BatchNorm)})
    problem = f"{' and '.join(keys)} is RefBN or RefIN, but the model has no such layer"
    if not found:
        logger.warning("%s: its norms are frozen, or have no such key.", problem)
        return
    raise ConfigError(
        f"{problem}, only {', '.join(found)}. If something converted the model after it was built "
        "(convert_sync_batchnorm does), leave that out; else set the key to the norm in the model."
    )


def _keys_with(node: Mapping, values: tuple[str, ...], prefix: str) -> list[str]:
    """Return the full names of all keys NORM below `node` that have one of the values."""
    keys = []
    for key, inner in node.items():
        if isinstance(inner, Mapping):
            keys += _keys_with(inner, values, f"{prefix}.{key}")
        elif key == "NORM" and inner in values:
            keys.append(f"{prefix}.{key}")
    return keys


def _require(fits: bool, key: str, value: Any, allowed: str) -> None:
    if not fits:
        raise ConfigError(f"MODEL.REFBN.{key} = {value!r}; allowed: {allowed}")


def _require_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, value, " or ".join(map(repr, choices)))


def _require_int(key: str, value: Any, least: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int and value >= least, key, value, f"an integer of {least} or more")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
