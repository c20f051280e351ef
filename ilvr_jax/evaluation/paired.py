"""Two conditions compared on the same samples: difference in accuracy, bootstrap interval and McNemar's test."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**22  # numbers drawn at once


@dataclasses.dataclass(frozen=True)
class Paired:
    """The accuracy of two conditions on the same samples, and the evidence that they differ.

    Attributes:
        samples: the number of samples, each with a value for both conditions.
        own: the accuracy of the first condition, from 0 to 1.
        other: the accuracy of the second condition.
        difference: `other` minus `own`.
        interval: the bootstrap's 95 % interval of the difference.
        p: McNemar's exact two-sided p-value for equal accuracies; None unless every value is 0 or 1.
        own_higher: the number of samples with the higher value in the first condition: right there alone.
        other_higher: the number of samples with the higher value in the second condition.
    """

    samples: int
    own: float
    other: float
    difference: float
    interval: tuple[float, float]
    p: float | None
    own_higher: int
    other_higher: int


def compare(own: Sequence[bool | float], other: Sequence[bool | float], seed: int = 0) -> Paired:
    """Compare two conditions by their values on the same samples, in the same order.

    A value is whether the answer is right or, where a record has several answers, the share of them that are right:
    the record is then one sample, so that its answers need not be independent. Raises ValueError unless both sequences
    are equally long, not empty, and have values from 0 to 1.
    """
    first, second = np.asarray(own, np.float64), np.asarray(other, np.float64)
    for name, values in (("own", first), ("other", second)):
        if values.ndim != 1 or values.size == 0 or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"`{name}` must be one or more numbers from 0 to 1, got {values}")
    if first.size != second.size:
        raise ValueError(f"`other` must have as many values as `own` ({first.size}), got {second.size}")
    own_higher, other_higher = int((first > second).sum()), int((second > first).sum())
    are_binary = np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()
    return Paired(
        samples=first.size,
        own=float(first.mean()),
        other=float(second.mean()),
        difference=float((second - first).mean()),
        interval=bootstrap_interval(second - first, seed),
        p=mcnemar(own_higher, other_higher) if are_binary else None,
        own_higher=own_higher,
        other_higher=other_higher,
    )


def bootstrap_interval(values: Float[np.ndarray, " samples"], seed: int) -> tuple[float, float]:
    """Return the percentile bootstrap's 95 % interval of a mean (Efron & Tibshirani, 1993).

    Each of RESAMPLES resamples draws as many values as there are, with replacement. Only the number of times that each
    distinct value is drawn matters; these numbers have a multinomial distribution.
    """
    random = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    chunk = max(1, CHUNK // distinct.size)
    sizes = [min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk)]
    means = np.concatenate([random.multinomial(values.size, shares, size) @ distinct for size in sizes]) / values.size
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(first_only: int, second_only: int) -> float:
    """Return McNemar's exact two-sided p-value from the numbers of pairs where one condition alone is right.

    If both conditions are equally accurate, each such pair is of either kind with probability 1/2 (McNemar, 1947): the
    result is the two-sided binomial test of that.
    """
    pairs = first_only + second_only
    tail = sum(math.comb(pairs, count) for count in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / 2**pairs)
