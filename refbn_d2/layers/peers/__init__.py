"""Provide the norms that RefBN is measured against. They need torch only."""

from refbn_d2.layers.peers.batch_renorm import BatchRenorm2d
from refbn_d2.layers.peers.cross_iteration_bn import CrossIterationBatchNorm2d, link_cbn
from refbn_d2.layers.peers.linking import LinkError
from refbn_d2.layers.peers.moving_average_bn import MovingAverageBatchNorm2d, link_mabn
from refbn_d2.layers.peers.registry import (
    PEERS,
    has_peers,
    peer_options,
    prepare_peers,
    restart_peers,
)

__all__ = [
    "PEERS",
    "BatchRenorm2d",
    "CrossIterationBatchNorm2d",
    "LinkError",
    "MovingAverageBatchNorm2d",
    "has_peers",
    "link_cbn",
    "link_mabn",
    "peer_options",
    "prepare_peers",
    "restart_peers",
]
