"""Figures of slots: against slow definitions, and on data with a planted rank, planted labels or nothing in them."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom

from ilvr_jax.analysis.slots import (
    cosine_between_samples,
    cosine_with_own,
    effective_rank,
    fit_ridge,
    movement,
    probe,
    retrieval,
    side_by_side,
)

UNLIKELY = 1e-4  # of each tail of a binomial bound


def slots_of(samples=12, looks=3, slots=2, channels=5, seed=0):
    """Return slots, and a mask that hides some; hidden ones are NaN."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(samples, looks, slots, channels)).astype(np.float32)
    valid = random.random((samples, looks, slots)) < 0.7
    valid[:3] = True
    vectors[~valid] = np.nan
    return vectors, valid


def cosine(first, second):
    return np.dot(first, second) / np.linalg.norm(first) / np.linalg.norm(second)


def test_the_cosine_is_the_mean_over_pairs():
    vectors, valid = slots_of()
    vectors += 0.5
    result = cosine_between_samples(vectors, valid)
    assert result.shape == (3, 2)
    for look, slot in np.ndindex(3, 2):
        there = vectors[valid[:, look, slot], look, slot].astype(np.float64)
        expected = np.mean([cosine(*pair) for pair in itertools.combinations(there, 2)])
        assert result[look, slot] == pytest.approx(expected)


def test_the_cosine_of_equal_and_of_opposite_slots():
    vectors = np.ones((4, 1, 3, 2))
    vectors[:2, 0, 1] = -1
    vectors[:, 0, 2] = 0
    np.testing.assert_allclose(cosine_between_samples(vectors, np.ones((4, 1, 3), bool)), [[1, -1 / 3, 0]])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_effective_rank_of_equal_directions_is_their_number(rank):
    """Slots at plus and minus each of `rank` orthogonal directions, away from zero."""
    random = np.random.default_rng(rank)
    directions = np.linalg.qr(random.normal(size=(16, rank)))[0].T
    vectors = np.concatenate([directions, -directions])[:, None, None] + random.normal(size=16)
    vectors = np.concatenate([vectors, np.full((5, 1, 1, 16), np.nan)])
    valid = np.arange(len(vectors))[:, None, None] < 2 * rank
    assert effective_rank(vectors, valid) == pytest.approx(np.array([[rank]]))


def test_the_effective_rank_is_that_of_the_paper():
    vectors, valid = slots_of()
    there = vectors[valid[:, 1, 0], 1, 0].astype(np.float64)
    covariance = np.cov(there.T) * (len(there) - 1)
    singular = np.sqrt(np.linalg.eigvalsh(covariance))
    shares = singular / singular.sum()
    assert effective_rank(vectors, valid)[1, 0] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    noise = np.random.default_rng(0).normal(size=(500, 1, 1, 20))
    assert 19 < effective_rank(noise, np.ones((500, 1, 1), bool)).item() < 20


def test_equal_slots_have_no_rank():
    slot = np.random.default_rng(0).normal(size=(1, 1, 1, 30)).astype(np.float32)
    assert effective_rank(np.repeat(slot, 50, 0), np.ones((50, 1, 1), bool)) == 0


def test_movement_is_one_less_the_cosine():
    vectors, valid = slots_of()
    others, both = slots_of(seed=1)
    both = both & valid
    result = movement(vectors, others, both)
    for look, slot in np.ndindex(3, 2):
        chosen = both[:, look, slot]
        pairs = zip(vectors[chosen, look, slot], others[chosen, look, slot], strict=True)
        assert result[look, slot] == pytest.approx(np.mean([1 - cosine(*pair) for pair in pairs]), rel=1e-5)
    np.testing.assert_allclose(movement(vectors, 3 * vectors, valid), 0, atol=1e-12)
    np.testing.assert_allclose(movement(vectors, -vectors, valid), 2)


def test_places_without_enough_samples_have_no_figure():
    vectors, valid = slots_of()
    valid[1:, 2] = False
    assert np.isnan(cosine_between_samples(vectors, valid)).tolist() == [[False] * 2] * 2 + [[True] * 2]
    assert np.isnan(effective_rank(vectors, valid)).tolist() == [[False] * 2] * 2 + [[True] * 2]
    valid[:, 2] = False
    assert np.isnan(movement(vectors, vectors, valid)).tolist() == [[False] * 2] * 2 + [[True] * 2]
    with pytest.raises(ValueError, match=r"`valid` must have the shape of the slots, \(12, 3, 2\), got \(12, 3\)"):
        effective_rank(vectors, valid[..., 0])


@pytest.mark.parametrize(("samples", "channels"), [(30, 8), (8, 30), (9, 9)])
def test_ridge_regression_minimises_its_loss(samples, channels):
    random = np.random.default_rng(0)
    vectors = random.normal(3, 2, (samples, channels))
    vectors[:, 2] = 0.1  # constant
    outputs = random.normal(5, 1, (samples, 2))
    inputs = vectors - vectors.mean(0)
    inputs[:, 2] = 0
    inputs /= np.where(vectors.std(0) > 1e-9, vectors.std(0), 1)
    for penalty, fit in zip((0.01, 1.0), fit_ridge(vectors, outputs, (0.01, 1.0)), strict=True):
        # Least squares of the outputs, and of zeros, one for each weight; the intercept is a column of ones.
        stacked = np.block(
            [[inputs, np.ones((samples, 1))], [np.sqrt(samples * penalty) * np.eye(channels, channels + 1)]]
        )
        solution = np.linalg.lstsq(stacked, np.concatenate([outputs, np.zeros((channels, 2))]), rcond=None)[0]
        np.testing.assert_allclose(fit.weights, solution[:-1], atol=1e-9)
        np.testing.assert_allclose(fit.intercept, solution[-1])
        np.testing.assert_allclose(fit.predict(vectors), inputs @ solution[:-1] + solution[-1], atol=1e-9)
    with pytest.raises(ValueError, match="`penalties` must be one or more numbers above 0"):
        fit_ridge(vectors, outputs, (1.0, 0.0))


def planted(samples, channels, noise, random):
    """Return vectors, and labels with 2, 4 and 3 values: two can be read from them, the third is random."""
    labels = np.stack([random.integers(0, 2, samples), 3 * random.integers(0, 4, samples)], axis=1)
    means = np.random.default_rng(99).normal(size=(2, 12, channels))
    vectors = means[0, labels[:, 0]] + means[1, labels[:, 1]] + noise * random.normal(size=(samples, channels)) + 7
    vectors[:, 0] = 5
    return vectors.astype(np.float32), np.concatenate(
        [labels, random.choice([-2, 0, 5], (samples, 1), p=[0.2, 0.5, 0.3])], 1
    )


@pytest.mark.parametrize("channels", [24, 600])
def test_probes_read_planted_labels_and_no_others(channels):
    random = np.random.default_rng(0)
    train_vectors, train_labels = planted(300, channels, 0.5, random)
    test_vectors, test_labels = planted(400, channels, 0.5, random)
    result = probe(train_vectors, train_labels, test_vectors, test_labels)
    assert (result.accuracy[:2] > 0.97).all()
    assert result.baseline[:2] == pytest.approx([0.5, 0.25], abs=0.1)
    assert result.baseline[2] == (test_labels[:, 2] == 0).mean()
    # The third label is 0 with probability 1/2: no reader of the vectors does better on average.
    assert result.accuracy[2] * 400 <= binom.isf(UNLIKELY, 400, 0.5)
    assert {result.accuracy.shape, result.baseline.shape, result.penalty.shape} == {(3,)}
    np.testing.assert_array_equal((result.predicted == test_labels).mean(0), result.accuracy)


def test_probes_of_random_vectors_are_at_chance():
    random = np.random.default_rng(1)
    vectors, labels = random.normal(size=(800, 50)), random.integers(0, 4, (800, 6))
    accuracy = probe(vectors[:400], labels[:400], vectors[400:], labels[400:]).accuracy
    low, high = binom.ppf(UNLIKELY, 400, 0.25), binom.isf(UNLIKELY, 400, 0.25)
    assert ((low <= accuracy * 400) & (accuracy * 400 <= high)).all()


def test_the_penalty_is_chosen_for_each_target():
    random = np.random.default_rng(2)
    train_vectors, train_labels = planted(150, 140, 3.0, random)
    test_vectors, test_labels = planted(2000, 140, 3.0, random)
    chosen = probe(train_vectors, train_labels, test_vectors, test_labels, penalties=(1e-6, 1.0))
    alone = [probe(train_vectors, train_labels, test_vectors, test_labels, (penalty,)) for penalty in (1e-6, 1.0)]
    assert (chosen.penalty[:2] == 1).all() and (alone[1].accuracy[:2] > alone[0].accuracy[:2]).all()
    expected = [alone[int(penalty == 1)].accuracy[target] for target, penalty in enumerate(chosen.penalty)]
    assert chosen.accuracy == pytest.approx(expected)


def test_probes_have_labels_for_every_vector():
    vectors, labels = np.zeros((6, 2)), np.zeros((6, 1), int)
    assert probe(vectors, labels, vectors, labels).accuracy == 1
    assert probe(vectors, labels, vectors, labels + 1).accuracy == 0  # a label that training never had
    with pytest.raises(ValueError, match=r"`test_labels` must have shape \[6, targets\], got \(6,\)"):
        probe(vectors, labels, vectors, labels[:, 0])
    with pytest.raises(ValueError, match=r"`folds` must be from 2 to the number of samples \(4\), got 5"):
        probe(vectors[:4], labels[:4], vectors, labels)


def test_retrieval_finds_planted_candidates():
    random = np.random.default_rng(0)
    candidates = random.normal(size=(150, 40))
    assert retrieval(candidates * random.uniform(0.1, 9, (150, 1)), candidates).recall_at_1 == 1
    assert retrieval(-candidates, candidates).recall_at_1 == 0
    assert 0.5 < retrieval(candidates + 2 * random.normal(size=(150, 40)), candidates, 20).recall_at_1 < 1


def test_retrieval_of_random_predictions_is_at_chance():
    random = np.random.default_rng(1)
    share = retrieval(random.normal(size=(2000, 10)), random.normal(size=(2000, 10)), 50).recall_at_1
    assert binom.ppf(UNLIKELY, 2000, 1 / 50) <= share * 2000 <= binom.isf(UNLIKELY, 2000, 1 / 50)


def test_candidates_that_are_equal_are_found_by_chance():
    predicted = np.random.default_rng(1).normal(size=(30, 10))
    assert retrieval(predicted, np.ones((30, 10)), 10).recall_at_1 == pytest.approx(1 / 10)
    assert retrieval(np.zeros((30, 10)), predicted, 30).recall_at_1 == pytest.approx(1 / 30)
    # Every candidate is there twice, and all of them compete.
    assert retrieval(np.repeat(predicted[:15], 2, 0), np.repeat(predicted[:15], 2, 0), 30).recall_at_1 == pytest.approx(
        1 / 2
    )


def test_retrieval_needs_enough_samples():
    vectors = np.ones((20, 3))
    with pytest.raises(ValueError, match=r"`count` must be from 2 to the number of samples \(20\), got 100"):
        retrieval(vectors, vectors)
    with pytest.raises(ValueError, match=r"`candidates` must be one for each prediction \(20\), got 19"):
        retrieval(vectors, vectors[1:], 5)


def test_ranks_among_all_candidates_are_those_by_sorting():
    random = np.random.default_rng(3)
    candidates = random.normal(size=(60, 8))
    candidates[30:34] = candidates[30]
    predicted = candidates + 1.5 * random.normal(size=(60, 8))
    result, ranks = retrieval(predicted, candidates, 60), []
    for sample, vector in enumerate(predicted):
        cosines = np.array([cosine(vector, candidate) for candidate in candidates])
        alike = np.isclose(cosines, cosines[sample])
        ranks.append(1 + (cosines[~alike] > cosines[sample]).sum() + np.arange(alike.sum()))
    assert {len(shared) for shared in ranks} == {1, 4}
    assert result.recall_at_1 == pytest.approx(np.mean([(shared <= 1).mean() for shared in ranks]))
    assert result.recall_at_10 == pytest.approx(np.mean([(shared <= 10).mean() for shared in ranks]))
    assert result.mean_reciprocal_rank == pytest.approx(np.mean([(1 / shared).mean() for shared in ranks]))
    assert result.recall_at_1 < result.mean_reciprocal_rank < result.recall_at_10 < 1


def test_cosines_of_slots_side_by_side_are_the_means_over_slots():
    random = np.random.default_rng(4)
    slots, others = random.normal(size=(2, 5, 3, 6)) * random.uniform(0.1, 9, (2, 5, 3, 1))
    valid = np.ones((5, 3), bool)
    valid[:, 2] = False
    cosines = np.array([[np.mean([cosine(a[place], b[place]) for place in range(2)]) for b in others] for a in slots])
    own, of_others = cosine_with_own(side_by_side(slots, valid), side_by_side(others, valid))
    assert own == pytest.approx(np.trace(cosines) / 5)
    assert of_others == pytest.approx(cosines[~np.eye(5, dtype=bool)].mean())
    with pytest.raises(ValueError, match="`predicted` must have two samples or more, got 1"):
        cosine_with_own(np.ones((1, 3)), np.ones((1, 3)))
