"""Pretrain timm's image classifiers, whose ResNets become Detectron2's backbones."""
