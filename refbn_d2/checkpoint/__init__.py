from refbn_d2.checkpoint.convert import Contents, convert_state, identify, pack
from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.checkpoint.inspection import describe
from refbn_d2.checkpoint.loading import LoadReport, load_weights
from refbn_d2.checkpoint.names import (
    detectron2_to_torchvision,
    to_detectron2,
    torchvision_to_detectron2,
)
from refbn_d2.checkpoint.source import WeightsSource, load_source, parse_source
from refbn_d2.utils.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "Contents",
    "LoadReport",
    "WeightsSource",
    "convert_state",
    "describe",
    "detectron2_to_torchvision",
    "identify",
    "load_checkpoint",
    "load_source",
    "load_weights",
    "pack",
    "parse_source",
    "save_checkpoint",
    "to_detectron2",
    "torchvision_to_detectron2",
]
