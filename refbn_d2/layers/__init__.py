from refbn_d2.layers.convert import convert_from_refbn, convert_to_refbn
from refbn_d2.layers.fold import fold
from refbn_d2.layers.functional import ref_batch_norm
from refbn_d2.layers.ref_batch_norm import Moments, RefBatchNorm2d, refbn_layers

__all__ = [
    "Moments",
    "RefBatchNorm2d",
    "convert_from_refbn",
    "convert_to_refbn",
    "fold",
    "ref_batch_norm",
    "refbn_layers",
]
