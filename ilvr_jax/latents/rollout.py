"""The stage 2 roll-out: latent slots filled by the model's own hidden states, one after another.

The columns are processed in order: the prefix in parallel, then segment by segment K single-column steps and the
text after them in parallel, then the tail. Keys and values of finished columns are kept, so all of it costs one
forward pass; recomputing the prefix for each slot would cost S * K + 1 of them.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ilvr_jax.latents.layout import Batch
from ilvr_jax.models.decoder import KeyValues
from ilvr_jax.models.qwen2_5_vl import Qwen2_5VL, causal_mask


def roll_out(
    model: Qwen2_5VL,
    decoder: PyTree,
    inputs: Float[Array, "rows columns channels"],
    batch: Batch,
    dropout_key: PRNGKeyArray,
) -> Float[Array, "rows columns channels"]:
    """Returns the final hidden states when each slot's input is the hidden state of the column before it.

    The gradient flows through every slot. What `inputs` hold in the slots is not used. `dropout_key` is for adapters.
    """

    def decode(inputs: Array, positions: Array, mask: Array, past: Sequence[KeyValues], start: Array | int):
        """Runs columns from `start` on, each run under a key of its own."""
        key = jax.random.fold_in(dropout_key, start)
        return model.decode(decoder, inputs, positions, mask, past, dropout_key=key)

    layout, positions, valid, rows = batch.layout, batch.positions, batch.valid, len(inputs)
    size, width = layout.latent_size, layout.latent_size + layout.text
    prefix_end, tail_start = layout.prefix, layout.columns - layout.tail
    hidden, key_values = decode(
        inputs[:, :prefix_end], positions[..., :prefix_end], causal_mask(valid[:, :prefix_end]), (), 0
    )
    if not layout.segments:
        return _with_tail(decode, inputs, batch, [hidden], key_values)
    config = model.config
    heads = (config.num_key_value_heads, config.head_dim)
    empty = jnp.zeros((config.num_hidden_layers, rows, size, *heads), key_values[0].dtype)
    # Only columns before the present segment have been written; the rest of the cache is masked.
    room = ((0, 0), (0, 0), (0, layout.segments * width), (0, 0), (0, 0))
    cache = jax.tree.map(lambda array: jnp.pad(array, room), key_values)

    columns_from = jax.lax.dynamic_slice_in_dim
    write_columns = jax.lax.dynamic_update_slice_in_dim

    @jax.checkpoint  # keeps one segment's activations at a time
    def segment(carry, number):
        cache, before = carry
        start = prefix_end + number * width
        done = (jnp.arange(tail_start) < start) & valid[:, :tail_start]
        slots_valid = columns_from(valid, start, size, 1)

        def slot(carry, index):
            slot_cache, before = carry
            # A slot sees the finished columns, the slots before it, and itself.
            mask = jnp.concatenate([done, slots_valid & (jnp.arange(size) < index), jnp.ones((rows, 1), bool)], axis=1)
            position = columns_from(positions, start + index, 1, 2)
            hidden, new = decode(before, position, mask[:, None], [cache, slot_cache], start + index)
            slot_cache = jax.tree.map(lambda slots, one: write_columns(slots, one, index, 2), slot_cache, new)
            return (slot_cache, hidden), hidden[:, 0]

        (new, last), hidden = jax.lax.scan(slot, ((empty, empty), before), jnp.arange(size))
        hidden = jnp.swapaxes(hidden, 0, 1)
        if layout.text:
            text_start, text = start + size, layout.text
            seen = jnp.concatenate([done, slots_valid], axis=1)[:, None]
            mask = jnp.concatenate(
                [
                    jnp.broadcast_to(seen, (rows, text, seen.shape[-1])),
                    causal_mask(columns_from(valid, text_start, text, 1)),
                ],
                axis=2,
            )
            text_inputs = columns_from(inputs, text_start, text, 1)
            text_positions = columns_from(positions, text_start, text, 2)
            text_hidden, text_new = decode(text_inputs, text_positions, mask, [cache, new], text_start)
            new = jax.tree.map(lambda slots, words: jnp.concatenate([slots, words], axis=2), new, text_new)
            hidden, last = jnp.concatenate([hidden, text_hidden], axis=1), text_hidden[:, -1:]
        cache = jax.tree.map(lambda whole, some: write_columns(whole, some, start, 2), cache, new)
        return (cache, last), hidden

    (cache, _), segment_hidden = jax.lax.scan(segment, (cache, hidden[:, -1:]), jnp.arange(layout.segments))
    segment_hidden = jnp.swapaxes(segment_hidden, 0, 1).reshape(rows, layout.segments * width, -1)
    return _with_tail(decode, inputs, batch, [hidden, segment_hidden], cache)


def _with_tail(decode: Callable, inputs: Array, batch: Batch, hidden: list[Array], cache: KeyValues) -> Array:
    """Adds the hidden states of the columns after the last segment's text."""
    tail_start = batch.layout.columns - batch.layout.tail
    if batch.layout.tail:
        mask = causal_mask(batch.valid)[:, tail_start:]
        tail, _ = decode(inputs[:, tail_start:], batch.positions[..., tail_start:], mask, [cache], tail_start)
        hidden = [*hidden, tail]
    return jnp.concatenate(hidden, axis=1)
