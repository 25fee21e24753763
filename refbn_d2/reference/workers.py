"""Make the reference equal on all workers (torch.distributed): same images, same moments."""

import torch
import torch.distributed as dist

from refbn_d2.layers import Moments, ReferenceNorm
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import ConfigError


def check_same_on_all_workers(identity: dict) -> None:
    """Check that every worker has the reference batch `identity`.

    Raises:
        ConfigError: one has another; the message names the worker and the first difference.
    """
    workers = distributed.world_size()
    if workers == 1:
        return
    identities: list = [None] * workers
    dist.all_gather_object(identities, identity)
    first = identities[0]
    for rank, other in enumerate(identities):
        if other == first:
            continue
        images = zip(other["images"], first["images"], strict=False)
        differences = [(other[key], first[key]) for key in ("dataset", "seed")]
        differences += [*images, (len(other["images"]), len(first["images"]))]
        theirs, ours = next((a, b) for a, b in differences if a != b)
        raise ConfigError(
            f"Worker {rank} has another reference batch than worker 0: {theirs} against {ours}. "
            "All workers need the same config, datasets and files."
        )


def pool_over_workers(
    recorded: list[Moments | None], layers: list[ReferenceNorm], average_count: bool
) -> list[Moments | None]:
    """Pool each layer's moments over the workers by count, in one all-reduce.

    Args:
        average_count: take the mean of the workers' counts, not their sum: all ran the same images.
    """
    workers = distributed.world_size()
    if workers == 1:
        return recorded
    sums = []  # count, count mean, count E[x^2] of every layer
    for moments, layer in zip(recorded, layers, strict=True):
        if moments is None:
            sums.append(layer.ref_mean.new_zeros(1 + 2 * layer.num_features, dtype=torch.float64))
        else:
            mean, var = moments.mean.double(), moments.var.double()
            one = mean.new_ones(1)
            sums.append(moments.count * torch.cat([one, mean, var + mean.square()]))
    flat = torch.cat(sums)
    dist.all_reduce(flat)
    pooled: list[Moments | None] = []
    for part in flat.split([len(s) for s in sums]):
        if part[0] == 0:
            pooled.append(None)
            continue
        mean, square = (part[1:] / part[0]).chunk(2)
        count = int(part[0]) // (workers if average_count else 1)
        pooled.append(Moments(mean, (square - mean.square()).clamp(min=0), count))
    return pooled
