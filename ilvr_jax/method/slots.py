"""The rules that make a slot's input, each one function, used by stage 1, the roll-out and decoding.

To add one, write a function below (and one that creates its parameters, if it has any) and name it in SLOT_INPUTS.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ilvr_jax.models.base import Model

LONGEST_WAVE, SHORTEST_WAVE = 16.0, 2.0  # of the sinusoids of places, in rows or columns
PARAMETERS = "slot_input"  # key in the trained part of the parameters: decoder or adapters

Channels = Float[Array, "*batch channels"]
Places = Int[Array, "*batch 2"]


class SlotInput(NamedTuple):
    """A rule that fills slots.

    `fill(hidden_states, embeddings, parameters, places)` returns the inputs of slots from the hidden states of the
    columns before them (in stage 1 from the teacher's targets), the embedding of `latent_pad`, the rule's own
    parameters, and the rows and columns of slots in the grids of their looks (`method.positions.grid_places`).
    `init(key, channels)` creates these; it is None for a rule without any.
    """

    fill: Callable[[Channels, Channels, PyTree, Places], Channels]
    init: Callable[[PRNGKeyArray, int], PyTree] | None = None


def fill_hidden(hidden_states: Channels, embeddings: Channels, parameters: PyTree, places: Places) -> Channels:
    """Return the hidden states themselves: the paper's rule (ILVR, section 3)."""
    del parameters, places
    return hidden_states.astype(embeddings.dtype)


def fill_normed(hidden_states: Channels, embeddings: Channels, parameters: PyTree, places: Places) -> Channels:
    """Return the hidden states scaled to a mean square of 1.

    Stage 1 aligns their directions with the targets' but not their lengths: so scaled, slots have the same inputs
    in stage 1 as when the model fills them.
    """
    del parameters, places
    hidden_states = hidden_states.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(hidden_states), axis=-1, keepdims=True)
    return (hidden_states * jax.lax.rsqrt(mean_square + 1e-6)).astype(embeddings.dtype)


def fill_placed(hidden_states: Channels, embeddings: Channels, parameters: PyTree, places: Places) -> Channels:
    """Return those of `fill_normed` plus sinusoids of the slots' rows and columns (Vaswani et al., 2017, section 3.5).

    Text can then find the slot of a cell by its content. Half of the channels are for the rows, half for the columns,
    so that what it looks for is a sum of the two; the waves are short enough that neighbours differ.
    """
    normed = fill_normed(hidden_states, embeddings, parameters, places)
    count = hidden_states.shape[-1] // 4
    waves = SHORTEST_WAVE * (LONGEST_WAVE / SHORTEST_WAVE) ** (jnp.arange(count) / max(count - 1, 1))
    angles = 2 * jnp.pi * places[..., None] / waves
    codes = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return normed + codes.reshape(*codes.shape[:-2], 4 * count).astype(normed.dtype)


def fill_projected(hidden_states: Channels, embeddings: Channels, parameters: PyTree, places: Places) -> Channels:
    """Return the hidden states plus a small MLP of them, whose output is zero at the start."""
    del places
    hidden_states = hidden_states.astype(embeddings.dtype)
    up, down = (parameters[name]["kernel"].astype(embeddings.dtype) for name in ("up", "down"))
    return hidden_states + jax.nn.gelu(hidden_states @ up) @ down


def init_projected(key: PRNGKeyArray, channels: int) -> PyTree:
    """Return the MLP's parameters, float32, half as wide inside."""
    up = jax.random.normal(key, (channels, channels // 2)) * channels**-0.5
    return {"up": {"kernel": up}, "down": {"kernel": jnp.zeros((channels // 2, channels))}}


def fill_pause(hidden_states: Channels, embeddings: Channels, parameters: PyTree, places: Places) -> Channels:
    """Return a learned constant, without information: a control for the effect of additional compute."""
    del places
    return jnp.broadcast_to(parameters["embedding"].astype(embeddings.dtype), hidden_states.shape)


def init_pause(key: PRNGKeyArray, channels: int) -> PyTree:
    """Return the constant, float32, of the scale of final hidden states, which are normed."""
    return {"embedding": jax.random.normal(key, (channels,))}


SLOT_INPUTS = {
    "hidden": SlotInput(fill_hidden),
    "normed": SlotInput(fill_normed),
    "placed": SlotInput(fill_placed),
    "projected": SlotInput(fill_projected, init_projected),
    "pause": SlotInput(fill_pause, init_pause),
}


def fill_slots(
    model: Model, decoder: PyTree, hidden_states: Channels, embeddings: Channels, places: Places
) -> Channels:
    """Return the inputs of slots under the model's rule; see `SlotInput`. `decoder` has the rule's parameters."""
    return SLOT_INPUTS[model.config.slot_input].fill(hidden_states, embeddings, decoder.get(PARAMETERS), places)


def init_params(model: Model, key: PRNGKeyArray) -> PyTree:
    """Return fresh float32 parameters of the model and of the rule that fills its slots."""
    return with_slot_parameters(model, model.init(key), key)


def with_slot_parameters(model: Model, params: PyTree, key: PRNGKeyArray) -> PyTree:
    """Return the model's parameters with fresh ones for the rule that fills its slots, if it has any.

    They are among the adapters' with LoRA, else among the decoder's, and so are trained with them.
    """
    init = SLOT_INPUTS[model.config.slot_input].init
    if init is None:
        return params
    part = "adapters" if "adapters" in params else "decoder"
    own = init(jax.random.fold_in(key, len(PARAMETERS)), model.config.hidden_size)
    return {**params, part: {**params[part], PARAMETERS: own}}
