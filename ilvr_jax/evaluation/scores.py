"""Statistics of right answers: intervals, pass@k and majority votes."""

import math
from collections import Counter
from collections.abc import Sequence


def wilson_interval(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of the rate `right` / `count`: 95 % at the default `z`, (0, 1) for no answers.

    Raises ValueError unless 0 <= right <= count.
    """
    _check_counts(right, count)
    if count == 0:
        return 0.0, 1.0
    rate, square = right / count, z * z / count
    centre = (rate + square / 2) / (1 + square)
    half = z * math.sqrt(rate * (1 - rate) / count + square / (4 * count)) / (1 + square)
    # The bounds for none and all are exactly 0 and 1, which rounding misses.
    return (0.0 if right == 0 else centre - half), (1.0 if right == count else centre + half)


def pass_at_k(right: int, count: int, k: int) -> float:
    """Return the unbiased estimate, from `count` answers, that one of `k` is right (Chen et al., 2021).

    It is the share of the subsets of k answers that contain a right one. Raises ValueError unless
    0 <= right <= count and 1 <= k <= count.
    """
    _check_counts(right, count)
    if not 1 <= k <= count:
        raise ValueError(f"`k` must be from 1 to the number of answers ({count}), got {k}")
    return 1 - math.comb(count - right, k) / math.comb(count, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """Return the most common of canonical answers, the first one among equals; None if all are None."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__, default=None)


def _check_counts(right: int, count: int) -> None:
    if not 0 <= right <= count:
        raise ValueError(f"`right` must be from 0 to the number of answers ({count}), got {right}")
