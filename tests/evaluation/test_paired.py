"""Paired comparisons: against scipy, a bootstrap by its definition, hand computation and simulated data."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from ilvr_jax.evaluation.paired import Paired, bootstrap_interval, compare, mcnemar

LIST_OF_BOOLS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(st.integers(0, 400), st.integers(0, 400))
@settings(deadline=None)
def test_the_p_value_is_scipys(first, second):
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_the_p_value_by_hand():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == 2 / 2**5
    assert mcnemar(1, 6) == 2 * (1 + 7) / 2**7
    assert 0 < mcnemar(800, 1200) < 1e-17


@given(LIST_OF_BOOLS)
@settings(deadline=None, max_examples=40)
def test_a_comparison_counts_pairs(pairs):
    own, other = zip(*pairs, strict=True)
    result = compare(own, other)
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    assert (result.samples, result.own_higher, result.other_higher) == (len(pairs), lost, gained)
    assert result.own == pytest.approx(sum(own) / len(pairs)) and result.other == pytest.approx(sum(other) / len(pairs))
    assert result.difference == pytest.approx((gained - lost) / len(pairs))
    assert result.p == mcnemar(lost, gained)
    low, high = result.interval
    assert -1 <= low <= result.difference <= high <= 1
    mirrored = compare(other, own)
    assert (mirrored.difference, mirrored.p) == (pytest.approx(-result.difference), result.p)


def test_equal_conditions_have_no_difference():
    assert compare([True, False], [True, False]) == Paired(2, 0.5, 0.5, 0.0, (0.0, 0.0), 1.0, 0, 0)
    assert compare([False] * 7, [True] * 7).interval == (1, 1)


def test_shares_of_right_answers_have_an_interval_and_no_p_value():
    result = compare([0.5, 1.0, 0.25], [0.5, 0.0, 0.5])
    assert (result.p, result.own_higher, result.other_higher) == (None, 1, 1)
    assert result.difference == pytest.approx((-1 + 0.25) / 3)
    assert result.interval[0] < result.difference < result.interval[1]
    assert compare([0.0, 1.0], [1, 1]).p == 1  # 0 and 1 in any type


def test_the_interval_is_scipys_percentile_interval():
    random = np.random.default_rng(5)
    for values in (random.choice([-1.0, 0, 1], 80, p=[0.3, 0.5, 0.2]), random.uniform(-1, 1, 50)):
        expected = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
        assert bootstrap_interval(values, 0) == pytest.approx(tuple(expected), abs=0.0126)  # 1 of 80


def test_the_interval_of_two_samples_by_hand():
    # The mean of a resample is -1, 0 or 1 with probability 1/4, 1/2 and 1/4.
    assert bootstrap_interval(np.array([-1.0, 1.0]), 3) == (-1, 1)
    # It is below 1 for three of 4 samples with probability 1 - (3/4)^4, and 0 with 1/256 < 2.5 %.
    assert bootstrap_interval(np.array([0.0, 1, 1, 1]), 3) == (0.25, 1)


def test_the_interval_is_a_function_of_the_seed():
    values = np.random.default_rng(0).uniform(-1, 1, 300)
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1) != bootstrap_interval(values, 2)


def test_many_distinct_values_are_drawn_in_chunks(monkeypatch):
    values = np.random.default_rng(0).uniform(-1, 1, 300)
    whole = bootstrap_interval(values, 1)
    monkeypatch.setattr("ilvr_jax.evaluation.paired.CHUNK", 300 * 999)
    assert bootstrap_interval(values, 1) == whole


@pytest.mark.parametrize("several", [False, True])
def test_95_percent_of_intervals_hold_the_true_difference(several):
    """Conditions of simulated records, whose difficulties vary, so that samples of one record are alike."""
    random, samples, inside, runs = np.random.default_rng(7), 120, 0, 400
    for run in range(runs):
        difficulty = random.beta(1.5, 1, samples)  # mean 0.6; the other condition is right half as often
        count = 4 if several else 1
        own = random.binomial(count, difficulty) / count
        other = random.binomial(count, difficulty / 2) / count
        low, high = compare(own, other, seed=run).interval
        inside += low <= -0.3 <= high
    error = 3 * math.sqrt(0.95 * 0.05 / runs)
    assert 0.95 - error - 0.01 <= inside / runs <= 0.95 + error  # the percentile interval is slightly narrow


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        ([], [], "`own` must be one or more numbers from 0 to 1, got"),
        ([1.5], [1], "`own` must be one or more numbers from 0 to 1, got"),
        ([1], [float("nan")], "`other` must be one or more numbers from 0 to 1, got"),
        ([[1]], [1], "`own` must be one or more numbers"),
        ([1, 0], [1], r"`other` must have as many values as `own` \(2\), got 1"),
    ],
)
def test_impossible_values_are_refused(own, other, message):
    with pytest.raises(ValueError, match=message):
        compare(own, other)
