"""Scores: against scipy and brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ilvr_jax.evaluation.scores import majority, pass_at_k, wilson_interval


@given(st.integers(1, 2000), st.data())
@settings(deadline=None)
def test_the_interval_is_scipys(count, data):
    right = data.draw(st.sampled_from([0, count]) | st.integers(0, count))
    expected = binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = wilson_interval(right, count)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-7)
    assert 0 <= low <= right / count <= high <= 1


def test_no_answers_leave_everything_open():
    assert wilson_interval(0, 0) == (0, 1)


@given(st.integers(1, 8), st.data())
@settings(deadline=None)
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(count, data):
    right, k = data.draw(st.integers(0, count)), data.draw(st.integers(1, count))
    chosen = list(itertools.combinations([True] * right + [False] * (count - right), k))
    assert pass_at_k(right, count, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_pass_at_k_of_many_answers():
    assert pass_at_k(1, 10_000, 5_000) == pytest.approx(0.5)
    assert pass_at_k(0, 10_000, 5_000) == 0


@pytest.mark.parametrize(("right", "count", "k"), [(1, 4, 0), (1, 4, 5), (0, 0, 1), (5, 4, 1), (-1, 4, 1)])
def test_impossible_counts_are_refused(right, count, k):
    with pytest.raises(ValueError, match=r"must be from [01] to the number of answers"):
        pass_at_k(right, count, k)


@pytest.mark.parametrize(("right", "count"), [(2, 1), (-1, 3), (0, -1)])
def test_impossible_rates_are_refused(right, count):
    with pytest.raises(ValueError, match="`right` must be from 0 to the number of answers"):
        wilson_interval(right, count)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], None),
        ([None, None], None),
        (["a"], "a"),
        ([None, None, None, "b"], "b"),
        (["b", "a", "a", "b"], "b"),
        (["c", "a", "b", "b", "a"], "a"),
        (["", "a", ""], ""),
    ],
)
def test_the_majority_is_of_what_was_parsed(answers, expected):
    assert majority(answers) == expected
