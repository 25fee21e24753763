"""List the peers by their names in a config, and prepare them for a run."""

from torch import nn

from refbn_d2.layers.peers.base import PeerBatchNorm2d
from refbn_d2.layers.peers.batch_renorm import BatchRenorm2d
from refbn_d2.layers.peers.cross_iteration_bn import CrossIterationBatchNorm2d, link_cbn
from refbn_d2.layers.peers.moving_average_bn import MovingAverageBatchNorm2d, link_mabn

PEERS: dict[str, type[PeerBatchNorm2d]] = {
    "BRN": BatchRenorm2d,
    "CBN": CrossIterationBatchNorm2d,
    "MABN": MovingAverageBatchNorm2d,
}


def peer_options(name: str, total_steps: int) -> dict[str, float]:
    """Return the schedule of the peer `name` for a run of `total_steps` steps, as its arguments.

    The papers' schedules are scaled down for shorter runs:

        BRN    The clips grow over a quarter of the run (40,000 of about 160,000 steps in the
               paper). The running statistics average over a fortieth of that ramp, but at least
               over 10 steps and at most over 100, which is the paper's number.
        CBN    Nothing to scale: the authors' burn-in has 8 steps.
        MABN   The authors' 100 steps of warm-up and 1,000 with r = 1, but each at most a quarter
               of the run. Averages over the first steps diverge, since weights change fast there.

    Raises:
        ValueError: `name` is not a peer.
    """
    if name not in PEERS:
        raise ValueError(f"unknown peer norm {name!r}; known: {', '.join(PEERS)}")
    if name == "BRN":
        ramp = total_steps // 4
        return {"ramp_steps": ramp, "momentum": min(max(40 / max(ramp, 1), 0.01), 0.1)}
    if name == "MABN":
        quarter = total_steps // 4
        return {"warmup_steps": min(quarter, 100), "renorm_steps": min(quarter, 1000)}
    return {}


def prepare_peers(model: nn.Module, total_steps: int) -> None:
    """Prepare the peer norms of a built model for a run of `total_steps` steps.

    Set the schedules of `peer_options`, and link the convolutions that the norms need (`link_cbn`,
    `link_mabn`). A model without peer norms is not changed.

    Raises:
        LinkError: some norms cannot be linked to a convolution; they are named.
    """
    for layer in model.modules():
        for name, peer in PEERS.items():
            if isinstance(layer, peer):
                for option, value in peer_options(name, total_steps).items():
                    setattr(layer, option, value)
    link_cbn(model)
    link_mabn(model)


def has_peers(model: nn.Module) -> bool:
    """Return whether a layer of `model` is a peer norm."""
    return any(isinstance(layer, PeerBatchNorm2d) for layer in model.modules())


def restart_peers(model: nn.Module) -> None:
    """Start the schedules of a model's peer norms at step 0.

    A run that takes the weights of another run calls this once they are loaded; a resumed run does
    not. A model without peer norms is not changed.
    """
    for layer in model.modules():
        if isinstance(layer, PeerBatchNorm2d):
            layer.restart()
