"""Interventions on slots: what the model is given in place of its own slots in a second answer to the same sample.

To add one, write a function as `zero` and name it in INTERVENTIONS and MAKERS (and, if it has keys and values, in
WITH_STATES), and in READINGS of reports/slots.py.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from ilvr_jax.inference.requests import GivenSlots, RequestOutput

INTERVENTIONS: dict[str, str] = {
    "own": "The model's own slots.",
    "self": "The model's own slots, recorded and given back.",
    "zero": "Vectors of zeros.",
    "mean": "The mean of all slots of the run.",
    "noise": "Normal noise with the mean and the covariance of the run's slots.",
    "pause": "The embedding of the token `latent_pad`.",
    "first": "The first slot of the answer, repeated.",
    "permute": "The answer's own slots in another order.",
    "swap": "The slots of another, unrelated sample.",
    "donor": "For a sample edited so that another answer is right: the slots of the original.",
    "unrelated": "For the same edited sample: the slots of another, unrelated sample.",
    "oracle": "The features of the true helper images.",
    "skip": "No look: the answer continues without markers and slots.",
    "markers": "Looks without slots: the markers alone.",
}
WITHOUT_SLOTS = ("skip", "markers")  # replace looks as a whole, by the settings of requests
WITH_STATES = ("self", "first", "permute", "swap", "donor", "unrelated")  # can replace keys and values, too
OF_EDITS = ("donor", "unrelated")  # ask about samples that are edited

Vector = Float[np.ndarray, " channels"]


@dataclasses.dataclass(frozen=True)
class Slots:
    """The contents of an answer's slots, by their number in the answer; only recorded ones have states."""

    inputs: Float[np.ndarray, "slots channels"]
    keys: Float[np.ndarray, "layers slots key_value_heads head_dim"] | None = None
    values: Float[np.ndarray, "layers slots key_value_heads head_dim"] | None = None
    positions: Int[np.ndarray, " slots"] | None = None  # rotary ones of the keys

    def take(self, numbers: Int[np.ndarray, " some"]) -> "Slots":
        """Return the slots of these numbers, in their order."""
        if self.keys is None:
            return Slots(self.inputs[numbers])
        return Slots(self.inputs[numbers], self.keys[:, numbers], self.values[:, numbers], self.positions[numbers])


@dataclasses.dataclass(frozen=True)
class Spread:
    """The mean of vectors, and the directions whose outer products add up to their covariance."""

    mean: Vector
    directions: Float[np.ndarray, "directions channels"]


@dataclasses.dataclass(frozen=True)
class Material:
    """The material for the slots of one answer.

    Attributes:
        own: the slots of the sample's own answer.
        spread: of the inputs of all own slots of the run.
        pause: the embedding of `latent_pad`.
        swap: the slots of another sample, None if there is none.
        oracle: the features of the true helper images, None if there are none.
        seed: of random interventions.
    """

    own: Slots
    spread: Spread
    pause: Vector
    swap: Slots | None = None
    oracle: Slots | None = None
    seed: Sequence[int] = (0,)


def recorded(output: RequestOutput) -> Slots:
    """Return the slots of an answer that was asked for their vectors and states."""
    return Slots(output.latent_vectors, output.slot_keys, output.slot_values, output.slot_positions)


def measure_spread(inputs: Sequence[Float[np.ndarray, "slots channels"]]) -> Spread:
    """Return mean and covariance of the slots of all answers, of which there is at least one."""
    vectors = np.concatenate(inputs).astype(np.float64)
    mean = vectors.mean(0)
    centred = vectors - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / len(vectors))
    return Spread(mean, np.sqrt(np.maximum(variances, 0))[:, None] * directions.T)


def draw_noise(spread: Spread, count: int, seed: Sequence[int]) -> Float[np.ndarray, "count channels"]:
    """Draw vectors of the normal distribution with that mean and covariance."""
    random = np.random.default_rng(seed)
    return spread.mean + random.standard_normal((count, len(spread.directions))) @ spread.directions


def shuffle(own: Slots, seed: Sequence[int]) -> Slots:
    """Return the slots in another order, as long as there are two."""
    order = np.random.default_rng(seed).permutation(len(own.inputs))
    moved = np.roll(order, 1)  # one cycle through all places: none keeps its slot
    places = np.empty_like(order)
    places[order] = moved
    return own.take(places)


def repeat(own: Slots, vector: Vector) -> Slots:
    """Return as many slots as the answer has, all with one vector as input."""
    return Slots(np.broadcast_to(vector, own.inputs.shape))


MAKERS: dict[str, Callable[[Material], Slots | None]] = {  # None where there are none to give
    "self": lambda material: material.own,
    "zero": lambda material: repeat(material.own, np.zeros_like(material.spread.mean)),
    "mean": lambda material: repeat(material.own, material.spread.mean),
    "noise": lambda material: Slots(draw_noise(material.spread, len(material.own.inputs), material.seed)),
    "pause": lambda material: repeat(material.own, material.pause),
    "first": lambda material: material.own.take(np.zeros(len(material.own.inputs), int)),
    "permute": lambda material: shuffle(material.own, material.seed),
    "swap": lambda material: material.swap,
    "donor": lambda material: material.own,  # those of the original, for the question about its edit
    "unrelated": lambda material: material.swap,
    "oracle": lambda material: material.oracle,
}


def chosen_slots(count: int, latent_size: int, look: int | None, place: int | None) -> Bool[np.ndarray, " slots"]:
    """Return which of `count` slots, `latent_size` to a look, are of one look and one place, both from 1; None: all."""
    looks, places = np.divmod(np.arange(count), latent_size)
    chosen = np.ones(count, bool)
    if look is not None:
        chosen &= looks == look - 1
    if place is not None:
        chosen &= places == place - 1
    return chosen


def give(
    slots: Slots | None, states: bool, latent_size: int, look: int | None = None, place: int | None = None
) -> GivenSlots | None:
    """Return slots for a request, with keys and values if `states`, those of one look or place alone if given.

    Return None if none of the slots are given. Looks after the last given one get its slots again, unless a `look` is
    chosen: then they are the model's own.
    """
    if slots is None:
        return None
    numbers = np.arange(len(slots.inputs))
    given = chosen_slots(len(numbers), latent_size, look, place)
    if not given.any():
        return None
    if look is not None:  # the engine repeats the last look: one more, which is not given
        numbers = np.append(numbers, np.zeros((-len(numbers)) % latent_size + latent_size, int))
        given = np.append(given, np.zeros(len(numbers) - len(given), bool))
    slots = slots.take(numbers)
    own_states = (slots.keys, slots.values, slots.positions) if states else ()
    return GivenSlots(slots.inputs.astype(np.float32), given, *own_states)


def pair_others(kinds: Sequence[object], seed: int) -> list[int | None]:
    """Return for each sample the number of another one of another kind, drawn at random, each at most once.

    Samples of one kind are not paired: maps that are equal are. Return None for those for whom none is left, which
    happens only if more than half of the samples are of one kind.
    """
    random = np.random.default_rng(seed)
    members: dict[object, list[int]] = {}
    for number in random.permutation(len(kinds)).tolist():
        members.setdefault(kinds[number], []).append(number)
    order = [number for group in members.values() for number in group]
    shift = max(map(len, members.values()), default=0)  # no group reaches from a place to the one so far behind
    others = dict(zip(order, order[shift:] + order[:shift], strict=True))
    return [others[n] if kinds[others[n]] != kinds[n] else None for n in range(len(kinds))]
