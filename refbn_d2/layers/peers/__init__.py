from .batch_renorm import BatchRenorm2d
from .cross_iteration_bn import CrossIterationBatchNorm2d, link_cbn
from .linking import LinkError
from .moving_average_bn import MovingAverageBatchNorm2d, link_mabn
from .registry import PEERS, link_peers, peer_options

__all__ = [
    "PEERS",
    "BatchRenorm2d",
    "CrossIterationBatchNorm2d",
    "LinkError",
    "MovingAverageBatchNorm2d",
    "link_cbn",
    "link_mabn",
    "link_peers",
    "peer_options",
]
