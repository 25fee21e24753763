"""Compute a study's statistics: intervals over seeds, paired differences, corruptions, steps.

    n           the number of seeds (or of pairs of runs) that a result is based on
    interval    (low, high), by default with 95 % confidence; None if n is too small

Runs that diverged have no finite value, which is an error here: report them as diverged.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from refbn_d2.utils.errors import DataError

EXACT_PAIRS = 16  # up to this number n of pairs the sign-flip test goes through all 2^n signs


class Estimate(NamedTuple):
    """A mean over n seeds; `interval` is None with one seed."""

    mean: float
    interval: tuple[float, float] | None
    n: int


class Difference(NamedTuple):
    """A mean difference a - b over n pairs.

    With one pair, `interval` and both p-values are None. If all differences are equal, `interval`
    and `p_value` (paired t) are None: t needs some spread. `p_sign_flip` does not assume a normal
    distribution, but it is at least 2 / 2^n: 0.5 with 2 pairs, 0.03 with 6.
    """

    mean: float
    interval: tuple[float, float] | None
    p_value: float | None
    p_sign_flip: float | None
    n: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """mean +- t(n - 1) s / sqrt(n), the t interval of the mean over seeds

    Raises:
        DataError: there is no value, or one is not finite.
    """
    sample = _finite(values, "values")
    mean, n = float(sample.mean()), len(sample)
    if n == 1:
        return Estimate(mean, None, 1)
    half = scipy.stats.sem(sample) * scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    return Estimate(mean, (float(mean - half), float(mean + half)), n)


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], confidence: float = 0.95
) -> Difference:
    """Compare two norms by seed: a - b over the seeds that both have.

    Args:
        a, b: seed -> value.
        confidence: the confidence of the interval.

    Raises:
        DataError: no seed is in both, or a value is not finite.
    """
    seeds = sorted(set(a) & set(b))
    if not seeds:
        raise DataError(
            f"no seed is in both: one has {sorted(a)}, the other {sorted(b)}; pairs need runs with "
            "the same seeds"
        )
    left, right = (_finite([runs[s] for s in seeds], "values of the pairs") for runs in (a, b))
    differences = left - right
    estimate = mean_interval(differences, confidence)
    # Equal up to rounding: 0.3 - 0.1 and 0.4 - 0.2 differ in the last bit.
    rounding = 8 * np.finfo(float).eps * max(np.abs(left).max(), np.abs(right).max())
    spread = np.ptp(differences) > rounding
    return Difference(
        mean=estimate.mean,
        interval=estimate.interval if spread else None,
        p_value=float(scipy.stats.ttest_rel(left, right).pvalue) if spread else None,
        p_sign_flip=_sign_flip(differences),
        n=len(seeds),
    )


def _sign_flip(differences: np.ndarray) -> float | None:
    """Return how often the mean with random signs is at least as far from 0; two-sided."""
    if len(differences) == 1:
        return None
    exact = len(differences) <= EXACT_PAIRS
    return float(
        scipy.stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf if exact else 99_999,
            batch=2**12,
            random_state=np.random.default_rng(0),  # named rng since SciPy 1.15
        ).pvalue
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for their number: p_(i) -> max over j <= i of (m - j + 1) p_(j), at most 1.

    Holm, "A simple sequentially rejective multiple test procedure" (1979). Call corrected values
    below alpha significant: the chance of any false finding among all m is then at most alpha. None
    (no test was possible) stays None and does not count in m.

    Raises:
        DataError: a p-value is not in 0-1.
    """
    tested = {i: p for i, p in enumerate(p_values) if p is not None}
    for p in tested.values():
        if not 0 <= p <= 1:
            raise DataError(f"p-value {p} is not in 0-1")
    order = sorted(tested, key=tested.__getitem__)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * tested[index]))
        corrected[index] = highest
    return corrected


class UnderCorruption(NamedTuple):
    """Mean and relative performance under corruption."""

    mpc: float
    rpc: float | None  # in percent; None if the clean performance is 0


def mean_performance_under_corruption(
    clean: float, corrupted: Mapping[str, Sequence[float] | Mapping[int, float]]
) -> UnderCorruption:
    """mPC = mean over corruptions of the mean over severities;  rPC = 100 mPC / clean

    Michaelis et al., "Benchmarking Robustness in Object Detection" (2019). Use a metric for which
    higher is better: AP or accuracy, not an error.

    Args:
        clean: the performance on clean pictures.
        corrupted: corruption -> its performance at each severity, by position or by severity.

    Raises:
        DataError: there is no corruption, they have different severities, or a value is not finite.
    """
    if not corrupted:
        raise DataError("there is no corruption to average over; give 1 or more")
    rows = {
        name: dict(values) if isinstance(values, Mapping) else dict(enumerate(values, start=1))
        for name, values in corrupted.items()
    }
    first, severities = next((name, sorted(row)) for name, row in rows.items())
    for name, row in rows.items():
        if sorted(row) != severities:
            raise DataError(
                f"{name} has severities {sorted(row)}, {first} has {severities}; the mean needs "
                "the same severities for all"
            )
    means = [_finite(list(row.values()), f"values of {name}").mean() for name, row in rows.items()]
    (clean,) = _finite([clean], "clean values")
    mpc = float(np.mean(means))
    return UnderCorruption(mpc, float(100 * mpc / clean) if clean else None)


def steps_to(
    steps: Sequence[float],
    values: Sequence[float],
    target: float,
    *,
    below: bool,
    window: int = 1,
) -> float | None:
    """Return the first step at which the mean of the last `window` values reaches `target`.

    Args:
        steps, values: the curve, in order. Values that are not finite do not reach the target.
        target: the value to reach; a mean equal to it counts.
        below: True for a loss or an error, False for AP or accuracy.
        window: the number of points to average; the first window - 1 points are not tested.

    Returns:
        The step, or None if it is never reached.

    Raises:
        DataError: the curve's lengths differ, its steps do not increase, or the window is below 1.
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if x.ndim != 1 or x.shape != y.shape:
        raise DataError(f"the curve has steps {x.shape}, but values {y.shape}")
    if (np.diff(x) <= 0).any():
        index = int(np.argmax(np.diff(x) <= 0))
        raise DataError(
            f"the curve's steps do not increase: {x[index + 1]:g} follows {x[index]:g} "
            "(two runs in one file?)"
        )
    if window < 1:
        raise DataError(f"the window is {window}; give 1 or more points")
    if len(y) < window:
        return None
    means = np.lib.stride_tricks.sliding_window_view(y, window).mean(axis=1)
    reached = np.isfinite(means) & ((means <= target) if below else (means >= target))
    return float(x[window - 1 + np.argmax(reached)]) if reached.any() else None


def _finite(values: Sequence[float], what: str) -> np.ndarray:
    array = np.asarray(values, float)
    if array.ndim != 1 or not len(array):
        raise DataError(f"the {what} are {array.tolist()}; give one or more numbers")
    if not all(map(math.isfinite, array)):
        raise DataError(
            f"the {what} are {array.tolist()}; leave out runs without a finite result (diverged)"
        )
    return array
