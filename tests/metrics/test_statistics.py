"""Statistics against values from tables, calculated by hand, and by enumeration."""

import itertools
import math

import numpy as np
import pytest

from refbn_d2.metrics.statistics import (
    holm,
    mean_interval,
    mean_performance_under_corruption,
    paired_difference,
    steps_to,
)
from refbn_d2.utils.errors import DataError


def test_interval_with_t_from_the_table():
    # t(0.975; 1) = 12.706, t(0.975; 2) = 4.303, t(0.95; 2) = 2.920
    mean, interval, n = mean_interval([1.0, 3.0])
    assert (mean, n) == (2, 2)
    assert interval == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)  # s / sqrt(2) = 1
    mean, interval, n = mean_interval([4.0, 7.0, 10.0])
    assert (mean, n) == (7, 3)
    assert interval == pytest.approx(
        (7 - 4.303 * 3 / math.sqrt(3), 7 + 4.303 * 3 / 3**0.5), abs=2e-3
    )
    low, high = mean_interval([4.0, 7.0, 10.0], confidence=0.9).interval
    assert high - low == pytest.approx(2 * 2.920 * 3**0.5, abs=2e-3)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(5, 2, 4)).interval for _ in range(2000)]
    covered = np.mean([low <= 5 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_interval():
    assert mean_interval([2.5]) == (2.5, None, 1)
    difference = paired_difference({7: 3.0}, {7: 1.0})
    assert difference == (2.0, None, None, None, 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0]]])
def test_bad_values(values):
    with pytest.raises(DataError, match="the values are"):
        mean_interval(values)


def test_paired_difference_by_student():
    """Student's own example of 1908: hours of sleep gained with two drugs; t = -4.0621, df 9."""
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    a, b = dict(enumerate(one)), dict(enumerate(two))
    result = paired_difference({**a, 100: 5.0}, {**b, 200: 5.0})  # seeds without a partner
    assert result.n == 10
    assert result.mean == pytest.approx(-1.58)
    assert result.p_value == pytest.approx(0.002833, abs=1e-6)
    assert result.interval == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)
    # The sign-flip test by enumeration
    differences = np.subtract(one, two)
    means = [np.dot(signs, differences) / 10 for signs in itertools.product((-1, 1), repeat=10)]
    at_least = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    assert result.p_sign_flip == pytest.approx(at_least)
    reversed_ = paired_difference(b, a)
    assert reversed_.mean == -result.mean and reversed_.p_value == result.p_value


def test_pairs_are_made_by_seed_not_by_order():
    result = paired_difference({1: 10.0, 2: 20.0, 3: 30.5}, {3: 30.0, 1: 9.0, 2: 19.2})
    assert result.mean == pytest.approx((1 + 0.8 + 0.5) / 3)
    assert result.interval[0] > 0


def test_equal_differences_have_no_t():
    result = paired_difference({1: 0.3, 2: 0.4}, {1: 0.1, 2: 0.2})
    assert result.mean == pytest.approx(0.2)
    assert result[1:] == (None, None, 0.5, 2)  # of the 4 signs, two are as far from 0
    assert paired_difference({1: 1, 2: 2}, {1: 1, 2: 2}) == (0, None, None, 1, 2)


def test_many_pairs_take_a_sample_of_the_signs():
    a = {seed: seed % 3 + 0.5 for seed in range(24)}
    b = {seed: seed % 3 for seed in range(24)}
    assert paired_difference(a, b).p_sign_flip < 1e-4
    assert paired_difference(a, b) == paired_difference(a, b)


def test_no_common_seed():
    with pytest.raises(DataError, match=r"no seed is in both: one has \[1, 2\], the other \[3"):
        paired_difference({1: 1.0, 2: 2.0}, {3: 1.0})
    with pytest.raises(DataError, match="diverged"):
        paired_difference({1: math.nan}, {1: 1.0})


def test_holm_by_hand():
    # R: p.adjust(c(.01, .04, .03, .005), "holm") is .03 .06 .06 .02
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == [] and holm([None]) == [None]
    for bad in (1.1, -0.1, math.nan):
        with pytest.raises(DataError, match="is not in 0-1"):
            holm([0.5, bad])


def test_performance_under_corruption_by_hand():
    corrupted = {"fog": [30, 20, 10, 5, 0], "snow": {5: 3, 4: 6, 3: 9, 2: 12, 1: 15}}
    mpc, rpc = mean_performance_under_corruption(40, corrupted)
    assert mpc == pytest.approx((13 + 9) / 2)
    assert rpc == pytest.approx(100 * 11 / 40)
    assert mean_performance_under_corruption(0, {"fog": [0]}) == (0, None)


@pytest.mark.parametrize(
    "clean, corrupted, message",
    [
        (1, {}, "no corruption"),
        (1, {"fog": [1, 2], "snow": [1]}, r"snow has severities \[1\], fog has \[1, 2\]"),
        (1, {"fog": {1: 1.0}, "snow": {2: 1.0}}, r"snow has severities \[2\]"),
        (1, {"fog": [1, math.nan]}, "values of fog"),
        (1, {"fog": []}, "values of fog"),
        (math.nan, {"fog": [1]}, "clean"),
    ],
)
def test_bad_corruption_results(clean, corrupted, message):
    with pytest.raises(DataError, match=message):
        mean_performance_under_corruption(clean, corrupted)


def test_steps_to():
    steps = [10, 20, 30, 40, 50]
    loss = [5, 1, 3, 2, 0]
    assert steps_to(steps, loss, 1, below=True) == 20  # a value equal to the target counts
    assert steps_to(steps, loss, 0.5, below=True) == 50
    assert steps_to(steps, loss, -1, below=True) is None
    # Means of 3: 3, 2, 5 / 3 at steps 30, 40, 50
    assert steps_to(steps, loss, 2.5, below=True, window=3) == 40
    assert steps_to(steps, loss, 3, below=True, window=3) == 30
    assert steps_to(steps, loss, 1.6, below=True, window=3) is None
    assert steps_to(steps, loss, 3, below=False) == 10
    assert steps_to(steps, [0, 0, 2, 4, 4], 3, below=False, window=2) == 40
    assert steps_to(steps, loss, 100, below=True, window=6) is None
    assert steps_to([], [], 1, below=True) is None


def test_steps_to_a_value_of_a_run_that_diverged():
    curve = [3, 2, math.nan, math.inf, -math.inf]
    assert steps_to(range(5), curve, 1, below=True) is None
    assert steps_to(range(5), curve, 4, below=False) is None
    assert steps_to(range(5), curve, 2, below=True) == 1


def test_bad_curves():
    with pytest.raises(DataError, match=r"steps \(2,\), but values \(1,\)"):
        steps_to([1, 2], [1], 0, below=True)
    with pytest.raises(DataError, match="do not increase: 1 follows 2"):
        steps_to([1, 2, 1], [1, 1, 1], 0, below=True)
    with pytest.raises(DataError, match="window is 0"):
        steps_to([1], [1], 0, below=True, window=0)
