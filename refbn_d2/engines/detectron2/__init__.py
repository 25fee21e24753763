"""The engine that drives Detectron2 itself."""

from refbn_d2.engines.detectron2.trainer import run

__all__ = ["run"]
