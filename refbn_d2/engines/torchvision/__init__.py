"""Run detectors without Detectron2: its numerics and names, on torchvision's operators."""

from refbn_d2.engines.torchvision.main import run

__all__ = ["run"]
