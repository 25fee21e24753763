"""Provide RefBN as a layer, convert models to it and back, and fold it. Needs torch only."""

from refbn_d2.layers.convert import convert_from_refbn, convert_to_refbn
from refbn_d2.layers.fold import fold
from refbn_d2.layers.functional import ref_batch_norm, ref_instance_norm
from refbn_d2.layers.instance_norm import RefInstanceNorm2d
from refbn_d2.layers.ref_batch_norm import RefBatchNorm2d
from refbn_d2.layers.reference_norm import (
    Moments,
    Recording,
    ReferenceNorm,
    has_refbn,
    refbn_layers,
)

__all__ = [
    "Moments",
    "Recording",
    "RefBatchNorm2d",
    "RefInstanceNorm2d",
    "ReferenceNorm",
    "convert_from_refbn",
    "convert_to_refbn",
    "fold",
    "has_refbn",
    "ref_batch_norm",
    "ref_instance_norm",
    "refbn_layers",
]
