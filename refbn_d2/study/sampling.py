"""Choose pictures at random, the same ones in all runs of a study."""

from collections.abc import Hashable, Sequence

import numpy as np

from refbn_d2.study.spec import Data

SEED = 0


def stratified(groups: Sequence[Hashable], number: int, seed: int = SEED) -> list[int]:
    """Choose `number` indices at random (0: all), in which each group keeps its share."""
    if number <= 0 or number >= len(groups):
        return list(range(len(groups)))
    rng = np.random.default_rng([seed, len(groups)])
    shuffled = sorted(rng.permutation(len(groups)).tolist(), key=lambda i: str(groups[i]))
    places = np.linspace(0, len(groups), number, endpoint=False) + len(groups) / number / 2
    return sorted(shuffled[int(place)] for place in places)


def split(groups: Sequence[Hashable], data: Data) -> tuple[list[int], list[int] | None]:
    """Return the indices of training images to train on and, with `data.tuning`, to evaluate on."""
    rest, held = list(range(len(groups))), None
    if data.tuning:
        held = stratified(groups, max(1, round(data.tuning * len(groups))))
        rest = sorted(set(rest) - set(held))
    chosen = stratified([groups[i] for i in rest], data.train_images)
    return [rest[i] for i in chosen], held
