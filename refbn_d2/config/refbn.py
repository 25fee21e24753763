"""This package's own config keys: what they are, and what they may hold."""

import math
import numbers
from dataclasses import dataclass, fields

from refbn_d2.layers.functional import GRADIENTS

REFRESHES = ("static", "full", "slice", "ride")
REFERENCES = ("dataset", "checkpoint")
DEFAULT_REFERENCE_WEIGHT = 0.9


def add_refbn_config(cfg) -> None:
    """Adds MODEL.REFBN, DATASETS.REGISTER and how batches are made up to `cfg`, in place.

    `cfg` is Detectron2's CfgNode or ours.
    """
    add_refbn_model_config(cfg)
    # One's own data in COCO's format: ((name, json file, image folder), ...)
    cfg.DATASETS.REGISTER = ()
    # Training batches: "iid", or "domain": all images of a batch are of one domain.
    cfg.DATALOADER.BATCH_COMPOSITION = "iid"
    cfg.DATALOADER.DOMAIN_FIELD = "domain"  # of the json's images; or a camera's or video's id


def add_refbn_model_config(cfg) -> None:
    """Adds MODEL.REFBN to `cfg`, in place."""
    refbn = cfg.MODEL.REFBN = type(cfg)()
    # w in [0, 1], or "count": w = n_R / (n_R + n_B). None is 0.9: it lets number and word in.
    refbn.REFERENCE_WEIGHT = None
    refbn.GRADIENT = "batch"  # backward of the training batch: "pooled", "batch" or "reference"
    refbn.REFERENCE = "dataset"  # captured on DATASETS.TRAIN; "checkpoint": MODEL.WEIGHTS brings it
    refbn.REFRESH = "ride"  # the reference follows the weights: "static", "full", "slice", "ride"
    refbn.REFRESH_PERIOD = 4  # steps between refreshes
    refbn.SLICE_SIZE = 8  # reference images a refresh, over all workers, for "slice" and "ride"
    refbn.SLICE_MOMENTUM = 0.25  # weight of a slice's moments in their moving average, (0, 1]
    refbn.NUM_IMAGES = 32  # size of the reference batch
    refbn.SEED = 0  # which images, and which augmentations of them, are the reference batch


@dataclass(frozen=True)
class RefBNOptions:
    """MODEL.REFBN, checked, with the reference weight resolved.

    A reference weight or gradient of None leaves every layer its own.
    """

    reference_weight: float | str | None = DEFAULT_REFERENCE_WEIGHT
    gradient: str | None = "batch"
    reference: str = "dataset"
    refresh: str = "ride"
    refresh_period: int = 4
    slice_size: int = 8
    slice_momentum: float = 0.25
    num_images: int = 32
    seed: int = 0

    def __post_init__(self):
        if self.reference_weight is not None:
            _check_weight(self.reference_weight)
        if self.gradient is not None:
            _check_choice("GRADIENT", self.gradient, GRADIENTS)
        _check_choice("REFERENCE", self.reference, REFERENCES)
        _check_choice("REFRESH", self.refresh, REFRESHES)
        _check_int("REFRESH_PERIOD", self.refresh_period, 1)
        _check_int("SLICE_SIZE", self.slice_size, 1)
        _check_int("NUM_IMAGES", self.num_images, 1)
        _check_int("SEED", self.seed, 0)
        if not (_is_number(self.slice_momentum) and 0 < self.slice_momentum <= 1):
            raise _error("SLICE_MOMENTUM", self.slice_momentum, "a number in (0, 1]")
        if self.refresh in ("slice", "ride") and self.slice_size > self.num_images:
            raise _error(
                "SLICE_SIZE",
                self.slice_size,
                f"at most MODEL.REFBN.NUM_IMAGES = {self.num_images} with REFRESH {self.refresh!r}",
            )
        if self.gradient == "reference" and self.refresh != "ride":
            raise _error(
                "GRADIENT",
                self.gradient,
                "only with MODEL.REFBN.REFRESH 'ride' (the gradient needs the reference in the "
                f"batch); REFRESH is {self.refresh!r}",
            )


def refbn_options(cfg) -> RefBNOptions:
    """Reads MODEL.REFBN from `cfg`; the defaults where the node is missing.

    Raises:
        ValueError: names the full key, its value and what is allowed.
    """
    node = cfg.MODEL.get("REFBN")
    if node is None:
        return RefBNOptions()
    values = {field.name: node[field.name.upper()] for field in fields(RefBNOptions)}
    if values["reference_weight"] is None:
        values["reference_weight"] = DEFAULT_REFERENCE_WEIGHT
    return RefBNOptions(**values)


def _error(key: str, value, allowed: str) -> ValueError:
    return ValueError(f"MODEL.REFBN.{key} = {value!r}; allowed: {allowed}")


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_weight(value) -> None:
    if value != "count" and not (_is_number(value) and 0 <= value <= 1):
        raise _error("REFERENCE_WEIGHT", value, "a number in [0, 1], 'count', or None for 0.9")


def _check_choice(key: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _error(key, value, " or ".join(map(repr, choices)))


def _check_int(key: str, value, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _error(key, value, f"an integer of {least} or more")
