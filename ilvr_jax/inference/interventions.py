"""Inputs, keys and values that requests give for slots, as data of each row: rows with and without share a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ilvr_jax.inference.requests import GivenSlots
from ilvr_jax.models.base import Model
from ilvr_jax.models.qwen2_5_vl.decoder import KeyValues


class RowSlots(NamedTuple):
    """The slots that are given to each row; see GivenSlots. Axes of slots are of size 0 where no request needs them."""

    count: Int[Array, " rows"]  # places in use, given or not
    given: Bool[Array, "rows slots"]
    inputs: Float[Array, "rows slots channels"]
    with_states: Bool[Array, " rows"]  # whether keys and values are given as well
    keys: Float[Array, "rows slots layers key_value_heads head_dim"]
    values: Float[Array, "rows slots layers key_value_heads head_dim"]
    positions: Int[Array, "rows slots"]  # of the keys


def init_row_slots(model: Model, rows: int, slots: int, states: bool) -> RowSlots:
    """Return rows without given slots, with room for so many, and with `states` for their keys and values."""
    config, with_states = model.config, slots if states else 0
    shape = (rows, with_states, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    return RowSlots(
        count=jnp.zeros(rows, jnp.int32),
        given=jnp.zeros((rows, slots), bool),
        inputs=jnp.zeros((rows, slots, config.hidden_size), config.dtype),
        with_states=jnp.zeros(rows, bool),
        keys=jnp.zeros(shape, config.dtype),
        values=jnp.zeros(shape, config.dtype),
        positions=jnp.zeros((rows, with_states), jnp.int32),
    )


def fill_row_slots(idle: RowSlots, slots: GivenSlots | None) -> RowSlots:
    """Return `idle`, one row on the host, with what a request gives."""
    if slots is None:
        return idle
    row, count = jax.tree.map(np.copy, idle), len(slots.inputs)
    row.count[0], row.given[0, :count], row.inputs[0, :count] = count, slots.given, slots.inputs
    if slots.keys is not None:
        row.with_states[0], row.positions[0, :count] = True, slots.positions
        row.keys[0, :count], row.values[0, :count] = slots.keys.swapaxes(0, 1), slots.values.swapaxes(0, 1)
    return row


def repeat_last_look(slot: Int[Array, " rows"], count: Int[Array, " rows"], latent_size: Int[Array, " rows"]) -> Array:
    """Return the place of a slot among `count` given ones; after the last, those of the last look come again.

    For a slot without a given one at its place of a look, as there are fewer than a look has, it is the last place.
    """
    alike = count - 1 - (count - 1 - slot) % jnp.maximum(latent_size, 1)  # the last at the same place of a look
    return jnp.where(slot < count, slot, jnp.where(alike < 0, count - 1, alike))


def given_places(slots: RowSlots, slot: Int[Array, " rows"], latent_size: Int[Array, " rows"]) -> Int[Array, " rows"]:
    """Return which given slot takes the place of each row's present one, -1 for none.

    `slot` is the number of the present one in the row's answer, -1 in text.
    """
    if not slots.given.shape[1]:
        return jnp.full_like(slot, -1)
    place = repeat_last_look(slot, slots.count, latent_size)
    given = jnp.take_along_axis(slots.given, jnp.maximum(place, 0)[:, None], axis=1)[:, 0]
    return jnp.where((slot >= 0) & given, place, -1)


def give_inputs(
    slots: RowSlots, places: Int[Array, " rows"], own: Float[Array, "rows 1 channels"]
) -> Float[Array, "rows 1 channels"]:
    """Return the rows' own inputs, or the given ones at places from 0 on."""
    if not slots.inputs.shape[1]:
        return own
    given = slots.inputs[jnp.arange(len(places)), jnp.maximum(places, 0)]
    return jnp.where((places >= 0)[:, None, None], given[:, None], own)


def give_states(
    model: Model, slots: RowSlots, places: Int[Array, " rows"], position: Int[Array, " rows"], own: KeyValues
) -> KeyValues:
    """Return the rows' own keys and values of one column, or the given ones at places from 0 on.

    Given keys are rotated from the position where they were computed to the row's `position`.
    """
    if not slots.keys.shape[1]:
        return own
    chosen = jnp.arange(len(places)), jnp.maximum(places, 0)
    keys, values, positions = (part[chosen] for part in (slots.keys, slots.values, slots.positions))
    keys = model.shift_keys(keys, (position - positions)[:, None])
    replaced = ((places >= 0) & slots.with_states)[:, None, None, None]

    def replace(own: Array, given: Array) -> Array:
        return jnp.where(replaced, given, own)

    def replace_layers(own: Array | tuple[Array, ...], given: Array) -> Array | tuple[Array, ...]:
        given = given.swapaxes(0, 1)[:, :, None]  # [layers, rows, 1, key_value_heads, head_dim]
        return tuple(map(replace, own, given)) if isinstance(own, tuple) else replace(own, given)

    return replace_layers(own[0], keys), replace_layers(own[1], values)
