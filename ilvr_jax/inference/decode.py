"""The decode core: the state of a batch of answers, and the compiled functions that advance it.

`prefill` appends the columns of prompts to the cache, `start` lets rows write their first tokens, `decode_steps` the
tokens after them. All run on one device or on the mesh of `sharding.on_mesh`, over any number of processes. Each has
one shape per engine (`prefill` one per chunk and group), so that requests come and go without compiling.
"""

import functools
import math
from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ilvr_jax.inference import kv_cache as caches
from ilvr_jax.inference.interventions import (
    RowSlots,
    fill_row_slots,
    give_inputs,
    give_states,
    given_places,
    init_row_slots,
)
from ilvr_jax.inference.requests import Request
from ilvr_jax.inference.sampling import RowSampling, exclude_tokens, penalize_repetition, sample_tokens
from ilvr_jax.inference.sizes import EngineSettings
from ilvr_jax.method.positions import grid_places
from ilvr_jax.method.slots import fill_slots
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.attention import KVCache, outside
from ilvr_jax.models.base import Model
from ilvr_jax.models.sharding import replicate

UNLIMITED = np.iinfo(np.int32).max  # looks
NEVER = np.iinfo(np.int32).max  # a column that no row has


class Status(IntEnum):
    """The status of a row."""

    IDLE = 0
    RUNNING = 1
    LOOKING = 2  # wrote `latent_start` and waits for a picture
    ENDED = 3  # wrote a token that ends its answer
    FULL = 4  # wrote `max_new_tokens`


class SlotState(NamedTuple):
    """Where each row is between text and slots, and its settings of looks."""

    slots_left: Int[Array, " rows"]  # slots still to write; 0 in text, -1 when `latent_end` is due
    slots_written: Int[Array, " rows"]  # in the whole answer
    looks_left: Int[Array, " rows"]  # looks that the row may still begin
    latent_size: Int[Array, " rows"]  # K, 0 for looks of markers only
    early_end: Bool[Array, " rows"]
    grid_side: Int[Array, " rows"]  # of the square image whose rotary positions slots have; 0 for those of text
    turning: Bool[Array, " rows"]  # whether the grid is turned by half a turn in every second look


class DecodeState(NamedTuple):
    """The state of every row except keys and values, on each device whole. `request_row` sets a request's settings."""

    status: Int[Array, " rows"]
    position: Int[Array, " rows"]  # the rotary position of the next column
    token: Int[Array, " rows"]  # the last one written, the next input in text mode
    hidden_states: Float[Array, "rows channels"]  # of the last column, the next input in a slot
    slot_state: SlotState
    given: RowSlots
    sampling: RowSampling
    hidden: Int[Array, "rows 2"]  # the first column hidden from text after a look, and the first after that; see `hide`
    pictures: Bool[Array, " rows"]  # whether a look is a picture, which the row waits for, and not slots
    count: Int[Array, " rows"]  # tokens written
    max_new_tokens: Int[Array, " rows"]
    tokens: Int[Array, "rows new_tokens"]  # those written
    log_probabilities: Float[Array, "rows new_tokens"]
    latents: Float[Array, "rows new_tokens channels"]  # inputs of slots; of size 0 where they are not kept
    forced: Int[Array, "rows new_tokens"]  # tokens to write in place of sampled ones, -1 for none
    seen: Bool[Array, "rows vocab"]  # tokens that are penalized; of size 0 where no request asks for it


@functools.partial(jax.jit, static_argnums=range(3))
def init_decode_state(model: Model, rows: int, settings: EngineSettings) -> DecodeState:
    """Return idle rows with the room that an engine's settings give to each."""

    def fill(value: float, dtype: str = "int32") -> Array:
        return jnp.full(rows, value, dtype)

    config, new_tokens = model.config, settings.max_new_tokens
    state = DecodeState(
        status=fill(int(Status.IDLE)),
        position=fill(0),
        token=fill(0),
        hidden_states=jnp.zeros((rows, config.hidden_size), config.dtype),
        slot_state=SlotState(
            *(fill(value) for value in (0, 0, 0, 1)), fill(False, "bool"), fill(0), fill(False, "bool")
        ),
        given=init_row_slots(model, rows, settings.given_slots, settings.given_states),
        sampling=RowSampling(
            *(fill(0, dtype) for dtype in ("float32", "int32", "float32", "float32", "int32", "uint32"))
        ),
        hidden=jnp.zeros((rows, 2), jnp.int32),
        pictures=fill(False, "bool"),
        count=fill(0),
        max_new_tokens=fill(1),
        tokens=jnp.zeros((rows, new_tokens), jnp.int32),
        log_probabilities=jnp.zeros((rows, new_tokens), jnp.float32),
        latents=jnp.zeros((rows, new_tokens if settings.latent_vectors else 0, config.hidden_size), config.dtype),
        forced=jnp.full((rows, new_tokens), -1, jnp.int32),
        seen=jnp.zeros((rows, config.vocab_size if settings.repetition_penalty else 0), bool),
    )
    return replicate(state)


def request_row(idle: DecodeState, request: Request, seed: int, special: SpecialTokens) -> DecodeState:
    """Return `idle`, an idle row on the host, with the settings of a request that has written nothing yet."""
    looks = {"text": 0, "single": 1}.get(request.method, UNLIMITED)
    first = (special.latent_start,) if request.method == "single" else request.forced_tokens
    forced, seen, params = idle.forced.copy(), idle.seen.copy(), request.sampling
    forced[0, : len(first)] = first
    if seen.size and params.repetition_penalty != 1:
        seen[0, request.prompt.tokens] = True
        seen[0, list(special.of_looks)] = False
    slot_state = _with(idle.slot_state, looks_left=looks, latent_size=request.latent_size, early_end=params.early_end)
    if request.slot_positions != "text":
        side, turning = math.isqrt(request.latent_size), request.slot_positions == "turning_grid"
        slot_state = _with(slot_state, grid_side=side, turning=turning)
    names = (name for name in RowSampling._fields if name != "seed")
    sampling = _with(idle.sampling, seed=seed, **{name: getattr(params, name) for name in names})
    hidden = np.array([[NEVER, 0]], np.int32)
    images = np.flatnonzero(request.prompt.tokens == special.image_pad)
    if request.image_visibility == "until_look" and len(images):
        hidden[0, 0] = images[0]
    given = fill_row_slots(idle.given, request.given_slots)
    row = idle._replace(slot_state=slot_state, given=given, sampling=sampling, hidden=hidden, forced=forced, seen=seen)
    return _with(row, pictures=request.method == "pixels", max_new_tokens=params.max_new_tokens)


def _with(row: NamedTuple, **values: float) -> NamedTuple:
    """Return a row with fields set to numbers, in the fields' own dtypes."""
    return row._replace(**{name: np.full_like(getattr(row, name), value) for name, value in values.items()})


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: DecodeState, row: Int[Array, ""], content: DecodeState) -> DecodeState:
    """Return the state with one row replaced by `content`."""

    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, row, axis=0)

    return replicate(jax.tree.map(put, state, content))


@functools.partial(jax.jit, static_argnames=("model", "special"), donate_argnames=("kv_cache", "last_hidden"))
def prefill(
    model: Model,
    decoder: PyTree,
    kv_cache: KVCache,
    last_hidden: Float[Array, "rows channels"],
    vision_inputs: Float[Array, "slots places channels"],
    rows: Int[Array, " group"] | None,
    tokens: Int[Array, "group chunk"],
    position_ids: Int[Array, "group 3 chunk"],
    starts: Int[Array, " group"],
    counts: Int[Array, " group"],
    hidden: Int[Array, "group 2"],
    special: SpecialTokens,
) -> tuple[KVCache, Float[Array, "rows channels"]]:
    """Append the first `counts` tokens of each chunk to rows of `starts` columns.

    Return also `last_hidden` with the hidden states of the last of these. `rows` is None for a group of all rows, in
    order; else a slot without a row has a number out of range, or a count of 0. The inputs of vision tokens are in the
    middle places of `vision_inputs`, at their columns of the chunk. Columns from `hidden[:, 0]` to before
    `hidden[:, 1]` are hidden from `latent_end`, the one text token in the columns of a picture.
    """
    group, chunk = tokens.shape
    margin = chunk_margin(vision_inputs, chunk)
    features = vision_inputs[:group, margin : margin + chunk]
    columns = jnp.arange(chunk)
    image_index = jnp.where(tokens == special.image_pad, columns, -1)
    inputs_embeds = model.embed(decoder, tokens, image_index, features[:, None])
    cached = kv_cache._replace(lengths=starts) if rows is None else caches.take_rows(kv_cache, rows, starts)
    places = starts[:, None] + columns
    unseen = jnp.where((tokens == special.latent_end)[..., None], hidden[:, None], 0)
    # Padding comes last, so that no token sees it.
    attention_mask = (columns[:, None] >= columns) & outside(places[:, None], unseen)
    cached = cached._replace(hidden=unseen)
    hidden_states, new = model.decode(decoder, inputs_embeds, position_ids, attention_mask, cached)
    room = last_hidden.shape[0]
    kv_cache = caches.write_columns(kv_cache, new, starts, counts, rows)
    last = jnp.take_along_axis(hidden_states, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    written = jnp.where(counts > 0, jnp.arange(room) if rows is None else rows, room)
    lengths = kv_cache.lengths.at[written].set(starts + counts, mode="drop")
    last_hidden = last_hidden.at[written].set(last.astype(last_hidden.dtype), mode="drop")
    return kv_cache._replace(lengths=replicate(lengths)), replicate(last_hidden)


def chunk_margin(vision_inputs: Float[Array, "slots places channels"], chunk: int) -> int:
    """Return the place at which the columns of a chunk begin in the inputs of vision tokens."""
    return (vision_inputs.shape[1] - chunk) // 2


@functools.partial(jax.jit, donate_argnames=("kv_cache", "last_hidden"))
def copy_prompt(
    kv_cache: KVCache, last_hidden: Float[Array, "rows channels"], source: Int[Array, ""], row: Int[Array, ""]
) -> tuple[KVCache, Float[Array, "rows channels"]]:
    """Return both with the prompt in row `source` copied to `row`."""
    return caches.copy_row(kv_cache, source, row), last_hidden.at[row].set(last_hidden[source])


@functools.partial(jax.jit, static_argnames=("model", "special"), donate_argnames=("lengths", "state"))
def start(
    model: Model,
    decoder: PyTree,
    lengths: Int[Array, " rows"],
    state: DecodeState,
    last_hidden: Float[Array, "rows channels"],
    starting: Bool[Array, " rows"],
    columns: Int[Array, " rows"],
    position: Int[Array, " rows"],
    special: SpecialTokens,
) -> tuple[Int[Array, " rows"], DecodeState]:
    """Let some rows run: each writes the token after its first `columns`, of which `last_hidden` is the last state.

    Return the lengths of the cache and the state.
    """
    state = state._replace(
        status=jnp.where(starting, Status.RUNNING, state.status),
        position=jnp.where(starting, position, state.position),
        hidden_states=jnp.where(starting[:, None], last_hidden, state.hidden_states),
    )
    lengths = jnp.where(starting, columns, lengths)
    return replicate((lengths, _write_tokens(model, decoder, state, starting, lengths, special)))


@functools.partial(jax.jit, static_argnames=("model", "special"), donate_argnames=("kv_cache", "state"))
def decode_steps(
    model: Model,
    decoder: PyTree,
    kv_cache: KVCache,
    state: DecodeState,
    steps: Int[Array, ""],
    most_stopped: Int[Array, ""],
    special: SpecialTokens,
) -> tuple[KVCache, DecodeState]:
    """Let all running rows write up to `steps` tokens; return sooner if `most_stopped` of them stop."""
    running_before = (state.status == Status.RUNNING).sum()

    def unfinished(carry: tuple[Array, KVCache, DecodeState]) -> Array:
        step, _, state = carry
        running = (state.status == Status.RUNNING).sum()
        return (step < steps) & (running > 0) & (running_before - running < most_stopped)

    def advance(carry: tuple[Array, KVCache, DecodeState]) -> tuple[Array, KVCache, DecodeState]:
        step, kv_cache, state = carry
        running = state.status == Status.RUNNING
        in_slot, slot_state = state.token == special.latent_pad, state.slot_state
        slot = jnp.where(in_slot, slot_state.slots_written - 1, -1)
        places = given_places(state.given, slot, slot_state.latent_size)
        position_ids, distance = next_positions(state, in_slot)
        inputs_embeds = next_inputs(model, decoder, state, position_ids, special)
        inputs_embeds = give_inputs(state.given, places, inputs_embeds)
        columns = kv_cache.lengths
        cached = kv_cache._replace(lengths=jnp.where(running, columns, 0))  # other rows attend to nothing
        cached = cached._replace(hidden=hide(state, columns, special)[:, None])
        hidden_states, new = model.decode(decoder, inputs_embeds, position_ids, jnp.ones((1, 1, 1), bool), cached)
        new = give_states(model, state.given, places, state.position, new)
        kv_cache = caches.keep_layout(caches.write_columns(kv_cache, new, kv_cache.lengths, running))
        kv_cache = kv_cache._replace(lengths=kv_cache.lengths + running)
        state = state._replace(
            hidden_states=jnp.where(running[:, None], hidden_states[:, 0], state.hidden_states),
            position=state.position + jnp.where(running, distance, 0),
            latents=_set(state.latents, state.count - 1, inputs_embeds[:, 0], running & in_slot),
        )
        return step + 1, kv_cache, _write_tokens(model, decoder, state, running, kv_cache.lengths, special)

    _, kv_cache, state = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), kv_cache, state))
    return kv_cache._replace(lengths=replicate(kv_cache.lengths)), replicate(state)


def hide(state: DecodeState, columns: Int[Array, " rows"], special: SpecialTokens) -> Int[Array, "rows 2"]:
    """Return the first column that each row's next input, at `columns`, does not attend to, and the first after these.

    With `image_visibility="until_look"` these are the columns from the first image to the first `latent_start`, for
    text after that: see `method.tokens.Visibility`.
    """
    ends = state.hidden[:, 1]
    after = (ends > 0) & (columns >= ends) & (state.token != special.latent_pad)
    return jnp.where(after[:, None], state.hidden, 0)


def next_positions(
    state: DecodeState, in_slot: Bool[Array, " rows"]
) -> tuple[Int[Array, "rows 3 1"], Int[Array, " rows"]]:
    """Return the rotary positions of each row's next input, and the distance to those of the input after it.

    In text all three are equal. Slots may have those of a grid; see `method.positions.sample_positions`.
    """
    slot_state = state.slot_state
    size, side = jnp.maximum(slot_state.latent_size, 1), slot_state.grid_side
    place = slot_state.latent_size - 1 - jnp.maximum(slot_state.slots_left, 0)  # of the slot that was written last
    look = (slot_state.slots_written - 1) // size
    cell = jnp.where(slot_state.turning & (look % 2 == 1), size - 1 - place, place)
    in_grid, width = in_slot & (side > 0), jnp.maximum(side, 1)
    in_image = jnp.stack([jnp.zeros_like(cell), cell // width, cell % width], axis=1)
    position_ids = state.position[:, None] + jnp.where(in_grid[:, None], in_image, 0)
    return position_ids[:, :, None], jnp.where(in_grid, jnp.where(place == size - 1, side, 0), 1)


def next_inputs(
    model: Model, decoder: PyTree, state: DecodeState, position_ids: Int[Array, "rows 3 1"], special: SpecialTokens
) -> Float[Array, "rows 1 channels"]:
    """Return each row's next input: in a slot what `fill_slots` makes, else its last token's embedding."""
    embedded = model.embed(decoder, state.token[:, None])
    filled = fill_slots(model, decoder, state.hidden_states[:, None], embedded, grid_places(position_ids))
    return jnp.where((state.token == special.latent_pad)[:, None, None], filled, embedded)


def _write_tokens(
    model: Model,
    decoder: PyTree,
    state: DecodeState,
    writing: Bool[Array, " rows"],
    columns: Int[Array, " rows"],
    special: SpecialTokens,
) -> DecodeState:
    """Let rows write the token that follows their hidden state, and that will be in the given columns."""
    new_tokens = state.tokens.shape[1]
    forced = jnp.take_along_axis(state.forced, jnp.minimum(state.count, new_tokens - 1)[:, None], axis=1)[:, 0]
    logits = model.logits(decoder, state.hidden_states)
    token, log_probability, slot_state = next_token(logits, state, forced, special)
    looking = state.pictures & (token == special.latent_start)
    slot_state = slot_state._replace(slots_left=jnp.where(looking, 0, slot_state.slots_left))
    first_look = writing & (token == special.latent_start) & (state.hidden[:, 1] == 0)
    count = state.count + writing
    status = jnp.where(looking, Status.LOOKING, state.status)
    status = jnp.where(count == state.max_new_tokens, Status.FULL, status)
    status = jnp.where(jnp.isin(token, jnp.array(special.ends)), Status.ENDED, status)
    seen_now = writing & ~jnp.isin(token, jnp.array(special.of_looks))
    return state._replace(
        status=jnp.where(writing, status, state.status),
        token=jnp.where(writing, token, state.token),
        slot_state=jax.tree.map(lambda new, old: jnp.where(writing, new, old), slot_state, state.slot_state),
        hidden=state.hidden.at[:, 1].set(jnp.where(first_look, columns + 1, state.hidden[:, 1])),
        count=count,
        tokens=_set(state.tokens, state.count, token, writing),
        log_probabilities=_set(state.log_probabilities, state.count, log_probability, writing),
        seen=_set(state.seen, token, True, seen_now),
    )


def _set(part: Array, places: Int[Array, " rows"], values: Array | bool, writing: Bool[Array, " rows"]) -> Array:
    """Return an array [rows, places, ...] with a value of some rows set each; places without room are dropped."""
    return part.at[jnp.arange(len(part)), jnp.where(writing, places, part.shape[1])].set(values, mode="drop")


def next_token(
    logits: Float[Array, "rows vocab"], state: DecodeState, forced: Int[Array, " rows"], special: SpecialTokens
) -> tuple[Int[Array, " rows"], Float[Array, " rows"], SlotState]:
    """Return the token that each row writes, its log-probability, and the row's slot state after it.

    A row in text mode samples a token, never `latent_pad` or `latent_end`, or writes its `forced` one unless that is
    negative. After `latent_start` come K `latent_pad`, then `latent_end`, whatever the logits are, with log-probability
    0. Log-probabilities of text are those before the repetition penalty, temperature, top-k and top-p.
    """
    slot_state = state.slot_state
    in_text = exclude_tokens(logits, state.sampling, state.count, slot_state.looks_left > 0, special)
    text = sample_tokens(penalize_repetition(in_text, state.sampling, state.seen), state.sampling, state.count)
    text = jnp.where(forced >= 0, forced, text)
    latent = slot_state.slots_left != 0
    ends = slot_state.slots_left < 0
    ends |= slot_state.early_end & latent & (logits[:, special.latent_end] >= logits.max(axis=-1))
    token = jnp.where(latent, jnp.where(ends, special.latent_end, special.latent_pad), text)
    log_probability = jnp.take_along_axis(in_text, text[:, None], axis=1)[:, 0] - jax.nn.logsumexp(in_text, axis=1)
    # After K slots the count passes from 1 to -1: one more step in latent mode, which writes `latent_end`.
    counted = jnp.where(slot_state.slots_left == 1, -1, slot_state.slots_left - 1)
    slots_left = jnp.where(latent & ~ends, counted, 0)
    begins = ~latent & (token == special.latent_start)
    first = jnp.where(slot_state.latent_size == 0, -1, slot_state.latent_size)
    slot_state = slot_state._replace(
        slots_left=jnp.where(begins, first, slots_left),
        slots_written=slot_state.slots_written + (token == special.latent_pad),
        looks_left=slot_state.looks_left - begins,
    )
    return token, jnp.where(latent, 0.0, log_probability), slot_state
