from .functional import ref_batch_norm
from .ref_batch_norm import Moments, RefBatchNorm2d, refbn_layers

__all__ = ["Moments", "RefBatchNorm2d", "ref_batch_norm", "refbn_layers"]
