"""Name the folder of the data sets, and the splits and domains of the shapes; no OpenCV needed."""

import os
from pathlib import Path

SPLITS = ("train", "val")
DOMAINS = ("plain", "lighting", "palette", "blur", "noise", "contrast", "inverted")


def datasets_root() -> Path:
    """Return the folder of datasets: the environment's DETECTRON2_DATASETS, else "./datasets"."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets")


def domain_of(file_name: str) -> str | None:
    """Return the domain of a file of `make_classification`, or None for any other file."""
    domain = Path(file_name).stem.rpartition("_")[2]
    return domain if domain in DOMAINS else None
