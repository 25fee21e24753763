"""Provide Faster and Mask R-CNN with Detectron2's numerics, parameter names and config keys."""

from refbn_d2.engines.torchvision.modeling.meta_arch import GeneralizedRCNN, build_model

__all__ = ["GeneralizedRCNN", "build_model"]
