"""Pretrain timm's image classifiers, whose ResNets become Detectron2's backbones."""

from refbn_d2.pretrain.main import run

__all__ = ["run"]
