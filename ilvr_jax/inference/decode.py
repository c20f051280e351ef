"""Decoding with latent slots: the rules of a step, row by row, and a loop over a whole batch of prompts.

The loop is for evaluation while training, on any mesh and over processes; `engine` serves requests that come and go.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from ilvr_jax.config.schema import MOST_NEW_TOKENS
from ilvr_jax.inference.sampling import Sampling, check_sampling, check_whole, sample_tokens
from ilvr_jax.method.layout import Batch
from ilvr_jax.method.slots import fill_slots
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import Model
from ilvr_jax.models.lora import decoder_params


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """Settings of decoding. `max_new_tokens` counts slots and markers too."""

    max_new_tokens: int
    latent_size: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    early_end: bool = False  # a look ends where `latent_end` is the most likely token, even at its first slot

    def __post_init__(self):
        check_whole("max_new_tokens", self.max_new_tokens, 1, MOST_NEW_TOKENS)
        check_whole("latent_size", self.latent_size, 1)
        check_sampling(self.temperature, self.top_k, self.top_p)


class Decoded(NamedTuple):
    """New tokens of each row, the one that ended it included; a slot's token is `latent_pad`."""

    tokens: Int[Array, "rows max_new_tokens"]  # pad tokens after the end
    lengths: Int[Array, " rows"]


class SlotState(NamedTuple):
    """Where each row is between text and slots, and its settings of looks."""

    slots_left: Int[Array, " rows"]  # slots still to write; 0 in text, -1 when `latent_end` is due
    looks_left: Int[Array, " rows"]  # looks that the row may still begin
    latent_size: Int[Array, " rows"]  # K
    early_end: Bool[Array, " rows"]


def next_token(
    logits: Float[Array, "rows vocab"],
    slot_state: SlotState,
    sampling: Sampling,
    step: Int[Array, " rows"],
    special: SpecialTokens,
    forced: Int[Array, " rows"] | None = None,
) -> tuple[Int[Array, " rows"], Float[Array, " rows"], SlotState]:
    """Return the token that each row writes, its log-probability, and the row's slot state after it.

    A row in text mode samples a token, never `latent_pad` or `latent_end`, or writes its `forced` one unless that is
    negative. After `latent_start` come K `latent_pad`, then `latent_end`, whatever the logits are, with log-probability
    0. Log-probabilities of text are those before temperature, top-k and top-p.
    """
    never = jnp.array([special.latent_pad, special.latent_end])
    in_text = logits.at[:, never].set(-jnp.inf)
    start = in_text[:, special.latent_start]
    in_text = in_text.at[:, special.latent_start].set(jnp.where(slot_state.looks_left > 0, start, -jnp.inf))
    text = sample_tokens(in_text, sampling, step)
    text = text if forced is None else jnp.where(forced >= 0, forced, text)
    latent = slot_state.slots_left != 0
    ends = slot_state.slots_left < 0
    ends |= slot_state.early_end & latent & (logits[:, special.latent_end] >= logits.max(axis=-1))
    token = jnp.where(latent, jnp.where(ends, special.latent_end, special.latent_pad), text)
    log_probability = jnp.take_along_axis(in_text, text[:, None], axis=1)[:, 0] - jax.nn.logsumexp(in_text, axis=1)
    # After K slots the count passes from 1 to -1: one more step in latent mode, which writes `latent_end`.
    counted = jnp.where(slot_state.slots_left == 1, -1, slot_state.slots_left - 1)
    slots_left = jnp.where(latent & ~ends, counted, 0)
    begins = ~latent & (token == special.latent_start)
    slots_left = jnp.where(begins, slot_state.latent_size, slots_left)
    slot_state = slot_state._replace(slots_left=slots_left, looks_left=slot_state.looks_left - begins)
    return token, jnp.where(latent, 0.0, log_probability), slot_state


def ends_answer(token: Int[Array, "*batch"], special: SpecialTokens) -> Bool[Array, "*batch"]:
    """Return whether each token ends its answer."""
    return jnp.isin(token, jnp.array(special.ends))


def next_inputs(
    model: Model,
    decoder: PyTree,
    token: Int[Array, " rows"],
    hidden: Float[Array, "rows channels"],
    special: SpecialTokens,
) -> Float[Array, "rows 1 channels"]:
    """Return each row's next input: in a slot what `fill_slots` makes, else its last token's embedding."""
    embedded = model.embed(decoder, token[:, None])
    filled = fill_slots(model, decoder, hidden[:, None], embedded)
    return jnp.where((token == special.latent_pad)[:, None, None], filled, embedded)


class _Loop(NamedTuple):
    step: Array
    token: Array  # [rows] the last one written, the next input in text mode
    hidden: Array  # [rows, channels] of the last column, the next input in latent mode
    slot_state: SlotState
    finished: Array
    tokens: Array
    cache: tuple


@functools.partial(jax.jit, static_argnames=("model", "settings", "special"))
def generate(
    model: Model,
    params: PyTree,
    batch: Batch,
    seeds: UInt32[Array, " rows"],
    settings: DecodeSettings,
    special: SpecialTokens,
) -> Decoded:
    """Decode a batch of prompts (a layout without segments, each ending with its assistant header).

    Each row switches between text and latent mode by itself (see `next_token`); the loop ends when all are done.
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

    def fill(value: float) -> Array:
        return jnp.full(rows, value)

    sampling = Sampling(fill(settings.temperature), fill(settings.top_k), fill(settings.top_p), seeds)
    slot_state = SlotState(fill(0), fill(settings.max_new_tokens), fill(settings.latent_size), fill(settings.early_end))

    def write(hidden: Array, slot_state: SlotState, step: Array) -> tuple[Array, SlotState]:
        steps = jnp.broadcast_to(step, rows)
        token, _, slot_state = next_token(model.logits(decoder, hidden), slot_state, sampling, steps, special)
        return token, slot_state

    token, slot_state = write(hidden, slot_state, jnp.int32(0))
    tokens = jnp.full((rows, settings.max_new_tokens), special.pad, jnp.int32).at[:, 0].set(token)
    start = _Loop(jnp.int32(1), token, hidden, slot_state, ends_answer(token, special), tokens, cache)

    def running(loop: _Loop):
        return (loop.step < settings.max_new_tokens) & ~loop.finished.all()

    def advance(loop: _Loop) -> _Loop:
        inputs = next_inputs(model, decoder, loop.token, loop.hidden, special)
        position = jnp.broadcast_to((next_position + loop.step - 1)[:, None, None], (rows, 3, 1))
        columns = jnp.arange(prefix + settings.max_new_tokens)
        seen = prompt_valid | ((columns >= prefix) & (columns < prefix + loop.step - 1))
        mask = jnp.pad(seen, ((0, 0), (0, 1)), constant_values=True)[:, None]
        hidden, new = model.decode(decoder, inputs, position, mask, [loop.cache])
        cache = jax.tree.map(
            lambda old, part: jax.lax.dynamic_update_slice_in_dim(old, part, prefix + loop.step - 1, 2), loop.cache, new
        )
        hidden = hidden[:, 0]
        token, slot_state = write(hidden, loop.slot_state, loop.step)
        token = jnp.where(loop.finished, special.pad, token)
        tokens = loop.tokens.at[:, loop.step].set(token)
        finished = loop.finished | ends_answer(token, special)
        return _Loop(loop.step + 1, token, hidden, slot_state, finished, tokens, cache)

    tokens = jax.lax.while_loop(running, advance, start).tokens
    ended = ends_answer(tokens, special)
    lengths = jnp.where(ended.any(1), jnp.argmax(ended, axis=1) + 1, settings.max_new_tokens)
    return Decoded(tokens, lengths)
