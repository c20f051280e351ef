"""The content of latent slots: how much they vary between samples, what moves them, and what can be read from them.

Vectors of slots are [samples, looks, slots, channels], with a mask `valid` [samples, looks, slots] since answers have
different numbers of looks; the others may hold anything. A figure of a place, one slot of one look, is NaN where too
few samples have that slot. Everything is computed in float64.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
TIE = 1e-9  # cosines that differ by less are equal

Vectors = Float[np.ndarray, "samples looks slots channels"]
Valid = Bool[np.ndarray, "samples looks slots"]
Places = Float[np.ndarray, "looks slots"]


def cosine_between_samples(vectors: Vectors, valid: Valid) -> Places:
    """Return the mean cosine between the slots of two different samples at the same place: 1 if all are alike.

    The cosine with a vector of zeros counts as 0. A place needs two samples.
    """

    def mean_cosine(slots: Float[np.ndarray, "samples channels"]) -> float:
        units = _units(slots)
        count = len(units)
        of_pairs = (units.sum(0) ** 2).sum() - (units**2).sum()  # without each sample's cosine with itself
        return of_pairs / (count * (count - 1)) if count > 1 else np.nan

    return _at_each_place(mean_cosine, valid, vectors)


def effective_rank(vectors: Vectors, valid: Valid) -> Places:
    """Return the effective rank (Roy & Vetterli, 2007) of the centred slots of all samples at each place.

    It is the exponential of the entropy of the singular values, divided by their sum: from 1, if all slots are on one
    line, to the number of channels or of samples less 1. It is 0 if all slots are equal. A place needs two samples.
    """

    def rank(slots: Float[np.ndarray, "samples channels"]) -> float:
        if len(slots) < 2:
            return np.nan
        singular = np.linalg.svd(slots - slots.mean(0), compute_uv=False)
        rounding = max(slots.shape) * np.finfo(np.float64).eps * np.linalg.norm(slots)
        singular = singular[singular > rounding]
        shares = singular / singular.sum()
        return float(np.exp(-(shares * np.log(shares)).sum())) if len(singular) else 0.0

    return _at_each_place(rank, valid, vectors)


def movement(own: Vectors, edited: Vectors, valid: Valid) -> Places:
    """Return the mean over samples of 1 - cosine between a sample's slot and that of its edited version.

    It is 0 where an edit changes no direction, 1 where the two are orthogonal. `valid` holds where both have the slot.
    """

    def mean_distance(
        slots: Float[np.ndarray, "samples channels"], others: Float[np.ndarray, "samples channels"]
    ) -> float:
        return 1 - float((_units(slots) * _units(others)).sum(1).mean()) if len(slots) else np.nan

    return _at_each_place(mean_distance, valid, own, edited)


def _at_each_place(function: Callable[..., float], valid: Valid, *arrays: Vectors) -> Places:
    """Return a function of the valid vectors [samples, channels] of each array at each place."""
    for array in arrays:
        if array.ndim != 4 or array.shape[:3] != valid.shape:
            raise ValueError(f"`valid` must have the shape of the slots, {array.shape[:3]}, got {valid.shape}")
    result = np.empty(valid.shape[1:])
    for place in np.ndindex(result.shape):
        chosen = valid[:, *place]
        result[place] = function(*(np.asarray(array[:, *place][chosen], np.float64) for array in arrays))
    return result


def _units(vectors: Float[np.ndarray, "samples channels"]) -> Float[np.ndarray, "samples channels"]:
    """Return vectors of length 1 in float64; those of zeros stay zeros."""
    vectors = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


@dataclasses.dataclass(frozen=True)
class Linear:
    """An affine function of standardised vectors.

    Attributes:
        mean: [channels], subtracted from a vector.
        scale: [channels], by which it is then divided.
        weights: [channels, outputs].
        intercept: [outputs].
    """

    mean: Float[np.ndarray, " channels"]
    scale: Float[np.ndarray, " channels"]
    weights: Float[np.ndarray, "channels outputs"]
    intercept: Float[np.ndarray, " outputs"]

    def predict(self, vectors: Float[np.ndarray, "samples channels"]) -> Float[np.ndarray, "samples outputs"]:
        """Return the outputs for each vector."""
        return (vectors - self.mean) / self.scale @ self.weights + self.intercept


def fit_ridge(
    vectors: Float[np.ndarray, "samples channels"],
    outputs: Float[np.ndarray, "samples outputs"],
    penalties: Sequence[float],
) -> list[Linear]:
    """Return the ridge regression of outputs on standardised vectors for each penalty.

    It minimises the mean over samples of the squared error, plus the penalty times the sum of the squared weights; the
    intercept has no penalty. Raises ValueError unless all penalties are above 0.
    """
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"`penalties` must be one or more numbers above 0, got {tuple(penalties)}")
    vectors, outputs = np.asarray(vectors, np.float64), np.asarray(outputs, np.float64)
    mean, scale, intercept = vectors.mean(0), vectors.std(0), outputs.mean(0)
    scale = np.where(scale > 1e-10 * np.abs(vectors).max(0), scale, 1)  # of a constant channel there is only rounding
    inputs, targets = (vectors - mean) / scale, outputs - intercept
    samples, channels = inputs.shape
    # The smaller one of the two matrices is decomposed: the result is the same.
    few_samples = samples <= channels
    values, basis = np.linalg.eigh(inputs @ inputs.T if few_samples else inputs.T @ inputs)
    rotated = basis.T @ (targets if few_samples else inputs.T @ targets)
    fits = []
    for penalty in penalties:
        solution = basis @ (rotated / (np.maximum(values, 0) + samples * penalty)[:, None])
        fits.append(Linear(mean, scale, inputs.T @ solution if few_samples else solution, intercept))
    return fits


@dataclasses.dataclass(frozen=True)
class Probe:
    """The result of linear probes, one for each target.

    Attributes:
        accuracy: [targets], on the test samples.
        baseline: [targets], the accuracy of the most frequent training label on the test samples.
        penalty: [targets], the chosen penalty.
        predicted: [test, targets], the labels that are predicted for the test samples.
    """

    accuracy: Float[np.ndarray, " targets"]
    baseline: Float[np.ndarray, " targets"]
    penalty: Float[np.ndarray, " targets"]
    predicted: Int[np.ndarray, "test targets"]


def probe(
    train_vectors: Float[np.ndarray, "train channels"],
    train_labels: Int[np.ndarray, "train targets"],
    test_vectors: Float[np.ndarray, "test channels"],
    test_labels: Int[np.ndarray, "test targets"],
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int = 0,
) -> Probe:
    """Fit a linear classifier of vectors for each target, and score it on other samples.

    It is the ridge regression of one-hot labels (`fit_ridge`); the label with the highest output is predicted, so one
    that is not in the training set never is. Each target's penalty is the one with the highest accuracy in
    cross-validation on the training set, the largest among equals. Raises ValueError if labels and vectors differ in
    their numbers, or if there are fewer training samples than folds.
    """
    for name, labels, vectors in (("train", train_labels, train_vectors), ("test", test_labels, test_vectors)):
        if labels.ndim != 2 or len(labels) != len(vectors):
            raise ValueError(f"`{name}_labels` must have shape [{len(vectors)}, targets], got {labels.shape}")
    if not 2 <= folds <= len(train_vectors):
        raise ValueError(f"`folds` must be from 2 to the number of samples ({len(train_vectors)}), got {folds}")
    penalties = sorted(penalties, reverse=True)
    classes = [np.unique(column) for column in train_labels.T]
    one_hot = np.concatenate([train_labels[:, [t]] == values for t, values in enumerate(classes)], axis=1)

    def predict(training: np.ndarray, vectors: np.ndarray) -> Int[np.ndarray, "penalties samples targets"]:
        fits = fit_ridge(train_vectors[training], one_hot[training], penalties)
        return np.array([_classify(fit.predict(vectors), classes) for fit in fits])

    everything = np.arange(len(train_vectors))
    right_in_folds = np.zeros((len(penalties), len(classes)))
    if len(penalties) > 1:
        for held_out in np.array_split(np.random.default_rng(seed).permutation(everything), folds):
            training = np.setdiff1d(everything, held_out)
            right_in_folds += (predict(training, train_vectors[held_out]) == train_labels[held_out]).sum(1)
    chosen = right_in_folds.argmax(0)
    predicted = predict(everything, test_vectors)[chosen, :, np.arange(len(classes))].T
    most_frequent = [
        values[(column[:, None] == values).sum(0).argmax()]
        for column, values in zip(train_labels.T, classes, strict=True)
    ]
    return Probe(
        accuracy=(predicted == test_labels).mean(0),
        baseline=(test_labels == most_frequent).mean(0),
        penalty=np.array(penalties)[chosen],
        predicted=predicted,
    )


def _classify(
    outputs: Float[np.ndarray, "samples classes"], classes: list[np.ndarray]
) -> Int[np.ndarray, "samples targets"]:
    """Return the label with the highest output for each target; `outputs` has the classes of all targets in a row."""
    ends = np.cumsum([len(values) for values in classes])[:-1]
    parts = np.split(outputs, ends, axis=1)
    return np.stack([values[part.argmax(1)] for values, part in zip(classes, parts, strict=True)], axis=1)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """How well predictions find their own candidates: means over samples of functions of its rank, from 1."""

    recall_at_1: float
    recall_at_10: float
    mean_reciprocal_rank: float


def retrieval(
    predicted: Float[np.ndarray, "samples channels"],
    candidates: Float[np.ndarray, "samples channels"],
    count: int = 100,
    seed: int = 0,
) -> Retrieval:
    """Return how well each sample's prediction finds its own candidate among others, by cosine.

    Each sample's candidate competes with those of `count` - 1 other samples, drawn without replacement: chance is a
    recall of 1 / `count` at 1. Among n candidates that tie with it, each of the ranks that they share is equally
    likely. Raises ValueError if there are too few samples.
    """
    samples = len(predicted)
    if len(candidates) != samples:
        raise ValueError(f"`candidates` must be one for each prediction ({samples}), got {len(candidates)}")
    if not 2 <= count <= samples:
        raise ValueError(f"`count` must be from 2 to the number of samples ({samples}), got {count}")
    random, found = np.random.default_rng(seed), []
    predicted, candidates = _units(predicted), _units(candidates)
    for sample, vector in enumerate(predicted):
        others = random.choice(samples - 1, count - 1, replace=False)
        others += others >= sample  # skips the sample itself
        cosines = candidates[others] @ vector
        own = candidates[sample] @ vector
        better, not_worse = (cosines > own + TIE).sum(), (cosines >= own - TIE).sum()
        ranks = np.arange(better, not_worse + 1) + 1
        found.append([(ranks <= 1).mean(), (ranks <= 10).mean(), (1 / ranks).mean()])
    return Retrieval(*np.mean(found, axis=0).tolist())


def cosine_with_own(
    predicted: Float[np.ndarray, "samples channels"], candidates: Float[np.ndarray, "samples channels"]
) -> tuple[float, float]:
    """Return the mean cosine of predictions with their own candidates, and with those of all other samples.

    Raises ValueError for a single sample.
    """
    samples = len(predicted)
    if samples < 2:
        raise ValueError(f"`predicted` must have two samples or more, got {samples}")
    cosines = _units(predicted) @ _units(candidates).T
    own = np.trace(cosines)
    return float(own / samples), float((cosines.sum() - own) / (samples * (samples - 1)))


def side_by_side(
    slots: Float[np.ndarray, "samples slots channels"], valid: Bool[np.ndarray, "samples slots"]
) -> Float[np.ndarray, "samples slots*channels"]:
    """Return each sample's slots as one vector, of which the cosine is the mean of the slots' cosines.

    Each slot has length 1, or 0 where it is not valid: it then adds nothing to the mean.
    """
    return (_units(slots) * valid[..., None]).reshape(len(slots), -1)
