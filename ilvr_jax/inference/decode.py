"""Decoding with latent slots: one compiled loop a prompt layout, text and latent mode row by row."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, UInt32

from ilvr_jax.inference.sampling import sample_tokens
from ilvr_jax.latents.layout import Batch
from ilvr_jax.latents.tokens import SpecialTokens
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.models.qwen2_5_vl import Qwen2_5VL


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """How to decode. `max_new_tokens` counts slots and markers too."""

    max_new_tokens: int
    latent_size: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    early_end: bool = False  # ends a segment where the model prefers `latent_end` to all else, even at its first slot

    def __post_init__(self):
        for name, good, accepted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("latent_size", self.latent_size >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is {accepted}")


class Decoded(NamedTuple):
    """New tokens of each row, `<|im_end|>` included where it came; a slot's token is `latent_pad`."""

    tokens: Int[Array, "rows max_new_tokens"]  # pad tokens after the end
    lengths: Int[Array, " rows"]


class _Loop(NamedTuple):
    step: Array
    token: Array  # [rows] the last token emitted, the next input in text mode
    hidden: Array  # [rows, channels] of the last column, the next input in latent mode
    slots_left: Array  # [rows] slots still to write; 0 in text mode, -1 when `latent_end` is due
    finished: Array
    tokens: Array
    cache: tuple


def _next_token(model, decoder, hidden, loop_slots, step, seeds, settings, special):
    """Returns the token each row emits after `hidden`, and its slots left after emitting it."""
    logits = model.logits(decoder, hidden)
    in_text = logits.at[:, jnp.array([special.latent_pad, special.latent_end])].set(-jnp.inf)
    text = sample_tokens(in_text, seeds, step, settings.temperature, settings.top_k, settings.top_p)
    latent = loop_slots != 0
    ends = loop_slots < 0
    if settings.early_end:
        ends |= latent & (jnp.argmax(logits, axis=-1) == special.latent_end)
    token = jnp.where(latent, jnp.where(ends, special.latent_end, special.latent_pad), text)
    # After K slots the count passes from 1 to -1: one more step in latent mode, which emits `latent_end`.
    counted = jnp.where(loop_slots == 1, -1, loop_slots - 1)
    slots_left = jnp.where(latent, jnp.where(ends, 0, counted), 0)
    return token, jnp.where(~latent & (token == special.latent_start), settings.latent_size, slots_left)


@functools.partial(jax.jit, static_argnames=("model", "settings", "special"))
def generate(
    model: Qwen2_5VL,
    params: PyTree,
    batch: Batch,
    seeds: UInt32[Array, " rows"],
    settings: DecodeSettings,
    special: SpecialTokens,
) -> Decoded:
    """Decodes a batch of prompts (a layout without segments, each ending with its assistant header).

    A row in text mode samples a token, never `latent_pad` or `latent_end`. `latent_start` switches the row to
    latent mode: K times its input is its own last hidden state and its token `latent_pad`; then it emits
    `latent_end` and is back in text mode. Rows switch and finish by themselves; the loop ends with the last.
    """
    decoder = decoder_params(params)
    features = model.encode_images(params["vision"], batch.images)
    inputs = model.embed(decoder, batch.tokens, batch.image_index, features)
    hidden, prompt_cache = model.decode(decoder, inputs, batch.positions, batch.valid)
    hidden = hidden[:, -1]  # prompts end in the last column
    rows, prefix = batch.tokens.shape
    next_position = batch.positions.max((1, 2)) + 1
    room = ((0, 0), (0, 0), (0, settings.max_new_tokens), (0, 0), (0, 0))
    cache = jax.tree.map(lambda array: jnp.pad(array, room), prompt_cache)
    prompt_valid = jnp.pad(batch.valid, ((0, 0), (0, settings.max_new_tokens)))
    token, slots_left = _next_token(
        model, decoder, hidden, jnp.zeros(rows, jnp.int32), jnp.int32(0), seeds, settings, special
    )
    tokens = jnp.full((rows, settings.max_new_tokens), special.pad, jnp.int32).at[:, 0].set(token)
    start = _Loop(jnp.int32(1), token, hidden, slots_left, token == special.im_end, tokens, cache)

    def running(loop: _Loop):
        return (loop.step < settings.max_new_tokens) & ~loop.finished.all()

    def advance(loop: _Loop) -> _Loop:
        latent_input = loop.token == special.latent_pad
        embedded = model.embed(decoder, loop.token[:, None])
        inputs = jnp.where(latent_input[:, None, None], loop.hidden[:, None].astype(embedded.dtype), embedded)
        position = jnp.broadcast_to((next_position + loop.step - 1)[:, None, None], (rows, 3, 1))
        columns = jnp.arange(prefix + settings.max_new_tokens)
        seen = prompt_valid | ((columns >= prefix) & (columns < prefix + loop.step - 1))
        mask = jnp.pad(seen, ((0, 0), (0, 1)), constant_values=True)[:, None]
        hidden, new = model.decode(decoder, inputs, position, mask, [loop.cache])
        cache = jax.tree.map(
            lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, prefix + loop.step - 1, 2), loop.cache, new
        )
        hidden = hidden[:, 0]
        token, slots_left = _next_token(model, decoder, hidden, loop.slots_left, loop.step, seeds, settings, special)
        token = jnp.where(loop.finished, special.pad, token)
        tokens = loop.tokens.at[:, loop.step].set(token)
        finished = loop.finished | (token == special.im_end)
        return _Loop(loop.step + 1, token, hidden, slots_left, finished, tokens, cache)

    tokens = jax.lax.while_loop(running, advance, start).tokens
    ended = tokens == special.im_end
    lengths = jnp.where(ended.any(1), jnp.argmax(ended, axis=1) + 1, settings.max_new_tokens)
    return Decoded(tokens, lengths)
