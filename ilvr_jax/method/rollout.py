"""The stage 2 roll-out: latent slots filled by the model's own hidden states, one after another.

Columns are processed in order: the prefix in parallel, then, segment by segment, K single-column steps and the text
after them in parallel, then the tail. Keys and values of finished columns are cached, so that all of it costs one
forward pass; recomputing the prefix for each slot would cost S * K + 1 of them.

The backward pass differentiates the loops with respect to the slots' inputs alone. Given these gradients, one parallel
pass over all columns, with the slots' inputs fixed, gives the gradient of the parameters. Memory then holds one
gradient of the parameters, where differentiating the nested loops would hold one for each level.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.method.layout import Batch
from ilvr_jax.method.positions import grid_places
from ilvr_jax.method.slots import PARAMETERS, fill_slots
from ilvr_jax.models.base import Model
from ilvr_jax.models.qwen2_5_vl.decoder import KeyValues

Hidden = Float[Array, "rows columns channels"]
Keys = Key[Array, "rows columns"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def roll_out(
    model: Model, settings: LatentsConfig, decoder: PyTree, inputs: Hidden, batch: Batch, dropout_keys: Keys
) -> Hidden:
    """Return the final hidden states when each slot's input is made from the hidden state of the column before it.

    `fill_slots` makes the inputs, and gradients flow through every slot. `dropout_keys` is for adapters.
    """
    return _forward(model, settings, decoder, inputs, batch, dropout_keys)[0]


def _forward(model: Model, settings: LatentsConfig, decoder: PyTree, inputs: Hidden, batch: Batch, dropout_keys: Keys):
    end = batch.layout.prefix
    prefix, cache = model.decode(
        decoder,
        inputs[:, :end],
        batch.positions[..., :end],
        batch.valid[:, :end],
        dropout_keys=_columns(dropout_keys, 0, end),
    )
    no_change = jnp.zeros((*inputs[:, batch.layout.slot_columns].shape,), prefix.dtype)
    after = _after_prefix(model, settings, decoder, inputs, batch, dropout_keys, prefix[:, -1:], cache, no_change)
    hidden = jnp.concatenate([prefix, after], axis=1)
    return hidden, (decoder, inputs, batch, dropout_keys, hidden, cache)


def _backward(model: Model, settings: LatentsConfig, residuals: tuple, gradient: Hidden):
    decoder, inputs, batch, dropout_keys, hidden, cache = residuals
    end, slots = batch.layout.prefix, batch.layout.slot_columns

    def after_prefix(change: Array) -> Array:
        last = hidden[:, end - 1 : end]
        return _after_prefix(model, settings, decoder, inputs, batch, dropout_keys, last, cache, change)

    if slots.size:
        _, by_change = jax.vjp(after_prefix, jnp.zeros((*inputs[:, slots].shape,), hidden.dtype))
        own = {name: decoder[name] for name in (PARAMETERS,) if name in decoder}
        fill = functools.partial(fill_slots, model, places=grid_places(batch.positions[..., slots]))
        filled, by_fill = jax.vjp(fill, own, hidden[:, slots - 1], inputs[:, slots])
        of_fill, of_hidden, of_embedding = by_fill(by_change(gradient[:, end:])[0].astype(filled.dtype))
        gradient = gradient.at[:, slots - 1].add(of_hidden)
        inputs = inputs.at[:, slots].set(filled)
    else:
        of_fill, of_embedding = {}, 0.0

    def in_parallel(decoder: PyTree, inputs: Array) -> Array:
        mask = batch.attention_mask(settings)
        return model.decode(decoder, inputs, batch.positions, mask, dropout_keys=dropout_keys)[0]

    _, by_parameters = jax.vjp(in_parallel, decoder, inputs)
    of_decoder, of_inputs = by_parameters(gradient)
    of_decoder = {**of_decoder, **of_fill}  # `decode` does not use the parameters that fill slots
    return of_decoder, of_inputs.at[:, slots].set(of_embedding), None, None


roll_out.defvjp(_forward, _backward)


def _after_prefix(
    model: Model,
    settings: LatentsConfig,
    decoder: PyTree,
    inputs: Hidden,
    batch: Batch,
    dropout_keys: Keys,
    last: Float[Array, "rows 1 channels"],
    prefix_cache: KeyValues,
    change: Float[Array, "rows segments latent_size channels"],
) -> Hidden:
    """Return the hidden states after the prefix, given its last one, with `change` added to the slots' inputs."""
    layout, positions, valid, rows = batch.layout, batch.positions, batch.valid, len(inputs)
    size, width = layout.latent_size, layout.latent_size + layout.text
    tail_start = layout.columns - layout.tail
    masks = batch.causal_mask(settings)  # of text; slots attend to all columns before them

    def decode(inputs: Array, mask: Array, past: Sequence[KeyValues], start: Array | int):
        """Return hidden states, keys and values of the columns from `start` on."""
        count = inputs.shape[1]
        position, keys = columns_from(positions, start, count, 2), _columns(dropout_keys, start, count)
        return model.decode(decoder, inputs, position, mask, past, keys)

    # Only columns before the present segment have been written; the rest of the cache is masked.
    room = ((0, 0), (0, 0), (0, layout.segments * width), (0, 0), (0, 0))
    cache = jax.tree.map(lambda array: jnp.pad(array, room), prefix_cache)
    empty = jax.tree.map(lambda array: jnp.zeros_like(array, shape=(*array.shape[:2], size, *array.shape[3:])), cache)

    columns_from = jax.lax.dynamic_slice_in_dim
    write_columns = jax.lax.dynamic_update_slice_in_dim

    @jax.checkpoint  # so that one segment's activations exist at a time
    def segment(carry, numbered_change):
        (cache, before), (number, changes) = carry, numbered_change
        start = layout.prefix + number * width
        done = (jnp.arange(tail_start) < start) & valid[:, :tail_start]
        slots_valid = columns_from(valid, start, size, 1)

        def slot(carry, indexed_change):
            (slot_cache, before), (index, change) = carry, indexed_change
            # A slot attends to the finished columns, the slots before it and itself.
            mask = jnp.concatenate([done, slots_valid & (jnp.arange(size) < index), jnp.ones((rows, 1), bool)], axis=1)
            embedding = columns_from(inputs, start + index, 1, 1)
            places = grid_places(columns_from(positions, start + index, 1, 2))
            filled = fill_slots(model, decoder, before, embedding, places) + change[:, None]
            hidden, new = decode(filled, mask[:, None], [cache, slot_cache], start + index)
            slot_cache = jax.tree.map(lambda slots, column: write_columns(slots, column, index, 2), slot_cache, new)
            return (slot_cache, hidden), hidden[:, 0]

        (new, last), hidden = jax.lax.scan(slot, (empty, before), (jnp.arange(size), changes))
        hidden = jnp.swapaxes(hidden, 0, 1)
        if layout.text:
            text_start, text = start + size, layout.text
            seen = columns_from(masks, text_start, text, 1)
            before = seen[:, :, :tail_start] & (jnp.arange(tail_start) < start)
            mask = jnp.concatenate([before, columns_from(seen, start, width, 2)], axis=2)
            text_hidden, text_new = decode(columns_from(inputs, text_start, text, 1), mask, [cache, new], text_start)
            new = jax.tree.map(lambda slots, words: jnp.concatenate([slots, words], axis=2), new, text_new)
            hidden, last = jnp.concatenate([hidden, text_hidden], axis=1), text_hidden[:, -1:]
        cache = jax.tree.map(lambda whole, part: write_columns(whole, part, start, 2), cache, new)
        return (cache, last), hidden

    changes = change.transpose(1, 2, 0, 3)
    (cache, _), hidden = jax.lax.scan(segment, (cache, last), (jnp.arange(layout.segments), changes))
    hidden = jnp.swapaxes(hidden, 0, 1).reshape(rows, layout.segments * width, last.shape[-1])
    if layout.tail:
        tail, _ = decode(inputs[:, tail_start:], masks[:, tail_start:], [cache], tail_start)
        hidden = jnp.concatenate([hidden, tail], axis=1)
    return hidden


def _columns(keys: Keys, start: Array | int, count: int) -> Keys:
    return None if keys is None else jax.lax.dynamic_slice_in_dim(keys, start, count, 1)
