"""Draw shapes: a synthetic COCO set and an ImageFolder set, the same on every machine."""

from refbn_d2.data.names import DOMAINS, SPLITS, datasets_root, domain_of
from refbn_d2.data.shapes.dataset import (
    GENERATOR,
    VERSION,
    ensure_detection,
    make_classification,
    make_detection,
)
from refbn_d2.data.shapes.drawing import (
    CLASSES,
    OUTLINES,
    Scene,
    draw_classification,
    draw_detection,
    polygons,
)

__all__ = [
    "CLASSES",
    "DOMAINS",
    "GENERATOR",
    "OUTLINES",
    "SPLITS",
    "VERSION",
    "Scene",
    "datasets_root",
    "domain_of",
    "draw_classification",
    "draw_detection",
    "ensure_detection",
    "make_classification",
    "make_detection",
    "polygons",
]
