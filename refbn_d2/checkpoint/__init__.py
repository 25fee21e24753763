from .files import CheckpointError, LoadReport, load_checkpoint, load_weights, save_checkpoint
from .names import detectron2_to_torchvision, to_detectron2, torchvision_to_detectron2

__all__ = [
    "CheckpointError",
    "LoadReport",
    "detectron2_to_torchvision",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
    "to_detectron2",
    "torchvision_to_detectron2",
]
