"""Run a detector's config by Detectron2."""

from refbn_d2.engines.detectron2.trainer import run

__all__ = ["run"]
