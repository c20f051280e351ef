"""An engine's state on the device, a row for each request being served, and the compiled functions that change it.

Each function has one shape per engine (`prefill` one per chunk size, `encode_image` one per size of images), so that
requests come and go without compiling. A row's keys and values are in its first `length` columns; those beyond are
never read.
"""

import functools
from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ilvr_jax.inference.decode import SlotState, ends_answer, next_inputs, next_token
from ilvr_jax.inference.requests import Request
from ilvr_jax.inference.sampling import Sampling
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import Model
from ilvr_jax.models.qwen2_5_vl.decoder import LayerKeyValues, decode_by_layers
from ilvr_jax.models.qwen2_5_vl.images import ImageBatch

UNLIMITED = np.iinfo(np.int32).max  # looks


class Status(IntEnum):
    """The status of a row."""

    IDLE = 0
    RUNNING = 1
    LOOKING = 2  # wrote `latent_start` and waits for a picture
    ENDED = 3  # wrote a token that ends its answer
    FULL = 4  # wrote `max_new_tokens`


class Rows(NamedTuple):
    """The state of every row except keys and values. `request_row` sets a request's settings."""

    status: Int[Array, " rows"]
    length: Int[Array, " rows"]  # columns with keys and values
    position: Int[Array, " rows"]  # the rotary position of the next column
    token: Int[Array, " rows"]  # the last one written, the next input in text mode
    hidden: Float[Array, "rows channels"]  # of the last column, the next input in a slot
    slot_state: SlotState
    sampling: Sampling
    pictures: Bool[Array, " rows"]  # whether a look is a picture, which the row waits for, and not slots
    count: Int[Array, " rows"]  # tokens written
    max_new_tokens: Int[Array, " rows"]
    tokens: Int[Array, "rows new_tokens"]  # those written
    log_probabilities: Float[Array, "rows new_tokens"]
    latents: Float[Array, "rows new_tokens channels"]  # inputs of slots; of size 0 where they are not kept
    forced: Int[Array, "rows new_tokens"]  # tokens to write in place of sampled ones, -1 for none


def empty_rows(model: Model, rows: int, new_tokens: int, keep_latents: bool) -> Rows:
    """Return idle rows with room for `new_tokens` tokens of answers."""

    def fill(value: float, dtype: str = "int32") -> Array:
        return jnp.full(rows, value, dtype)

    channels, dtype = model.config.hidden_size, model.config.dtype
    return Rows(
        status=fill(Status.IDLE),
        length=fill(0),
        position=fill(0),
        token=fill(0),
        hidden=jnp.zeros((rows, channels), dtype),
        slot_state=SlotState(fill(0), fill(0), fill(1), fill(False, "bool")),
        sampling=Sampling(fill(0, "float32"), fill(0), fill(1, "float32"), fill(0, "uint32")),
        pictures=fill(False, "bool"),
        count=fill(0),
        max_new_tokens=fill(1),
        tokens=jnp.zeros((rows, new_tokens), jnp.int32),
        log_probabilities=jnp.zeros((rows, new_tokens), jnp.float32),
        latents=jnp.zeros((rows, new_tokens if keep_latents else 0, channels), dtype),
        forced=jnp.full((rows, new_tokens), -1, jnp.int32),
    )


def request_row(idle: Rows, request: Request, special: SpecialTokens) -> Rows:
    """Return `idle`, an idle row on the host, with the settings of a request that has written nothing yet."""
    looks = {"text": 0, "single": 1}.get(request.method, UNLIMITED)
    first = (special.latent_start,) if request.method == "single" else request.forced_tokens
    forced = idle.forced.copy()
    forced[0, : len(first)] = first
    row = idle._replace(
        slot_state=_with(
            idle.slot_state, looks_left=looks, latent_size=request.latent_size, early_end=request.early_end
        ),
        sampling=_with(
            idle.sampling,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
        ),
        forced=forced,
    )
    return _with(row, pictures=request.method == "pixels", max_new_tokens=request.max_new_tokens)


def _with(row: NamedTuple, **values: float) -> NamedTuple:
    """Return a row with fields set to numbers, in the fields' own dtypes."""
    return row._replace(**{name: np.full_like(getattr(row, name), value) for name, value in values.items()})


Cache = list[LayerKeyValues]  # of each layer, [rows, key_value_heads, columns, head_dim]


def empty_cache(model: Model, rows: int, columns: int) -> Cache:
    """Return room for the keys and values of all rows."""
    config = model.config
    shape = (rows, config.num_key_value_heads, columns, config.head_dim)
    return [(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.num_hidden_layers)]


@functools.partial(jax.jit, static_argnames="model")
def encode_image(model: Model, vision: PyTree, images: ImageBatch) -> Float[Array, "units channels"]:
    """Return the vision tokens of one image; the leading axes of `images` have size 1."""
    return model.encode_images(vision, images)[0, 0]


@functools.partial(jax.jit, donate_argnames="vision_inputs")
def place_features(
    vision_inputs: Float[Array, "places channels"], features: Float[Array, "units channels"], column: Int[Array, ""]
) -> Float[Array, "places channels"]:
    """Return `vision_inputs`, the inputs of vision tokens by column, with an image's features from `column` on."""
    return jax.lax.dynamic_update_slice(vision_inputs, features.astype(vision_inputs.dtype), (column, 0))


@functools.partial(jax.jit, static_argnames=("model", "special"), donate_argnames="cache")
def prefill(
    model: Model,
    decoder: PyTree,
    cache: Cache,
    vision_inputs: Float[Array, "places channels"],
    row: Int[Array, ""],
    start: Int[Array, ""],
    tokens: Int[Array, " chunk"],
    positions: Int[Array, "3 chunk"],
    count: Int[Array, ""],
    special: SpecialTokens,
) -> tuple[Cache, Float[Array, " channels"]]:
    """Append the first `count` tokens of a chunk to a row of `start` columns; return the last one's hidden state too.

    The inputs of vision tokens are those of `vision_inputs` at the same columns.
    """
    chunk, columns = len(tokens), cache[0][0].shape[2]
    features = jax.lax.dynamic_slice_in_dim(vision_inputs, start, chunk)
    embedded = model.embed(decoder, tokens[None])
    inputs = jnp.where((tokens == special.image_pad)[:, None], features.astype(embedded.dtype), embedded[0])
    past = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, row, 1), cache)
    places = jnp.arange(chunk)
    mask = places[:, None] >= places  # padding comes last, so that no token sees it
    lengths = start[None]
    hidden, new = decode_by_layers(model.config, decoder, inputs[None], positions[None], mask[None], past, lengths)
    written = jnp.where(places < count, start + places, columns)  # padding is out of range: dropped
    cache = jax.tree.map(lambda old, part: old.at[row, :, written].set(part[0].swapaxes(0, 1), mode="drop"), cache, new)
    return cache, hidden[0, count - 1]


@functools.partial(jax.jit, donate_argnames="cache")
def copy_row(cache: Cache, source: Int[Array, ""], row: Int[Array, ""]) -> Cache:
    """Return the cache with the keys and values of row `source` copied to `row`."""

    def copy(array: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(array, source, 1)
        return jax.lax.dynamic_update_slice_in_dim(array, part, row, axis=0)

    return jax.tree.map(copy, cache)


@functools.partial(jax.jit, donate_argnames="rows")
def set_row(rows: Rows, row: Int[Array, ""], content: Rows) -> Rows:
    """Return the rows with one of them replaced by `content`."""
    return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, axis=0), rows, content)


@functools.partial(jax.jit, static_argnames=("model", "special"), donate_argnames="rows")
def resume_row(
    model: Model,
    decoder: PyTree,
    rows: Rows,
    row: Int[Array, ""],
    hidden: Float[Array, " channels"],
    length: Int[Array, ""],
    position: Int[Array, ""],
    special: SpecialTokens,
) -> Rows:
    """Return the rows with one running: it writes the token after its last column, of hidden state `hidden`."""
    content = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, row, 1, axis=0), rows)
    content = content._replace(
        status=jnp.full(1, Status.RUNNING),
        length=length[None],
        position=position[None],
        hidden=hidden[None].astype(content.hidden.dtype),
    )
    return set_row(rows, row, _write(model, decoder, content, special))


@functools.partial(jax.jit, static_argnames=("model", "special"), donate_argnames=("cache", "rows"))
def decode_rows(
    model: Model, decoder: PyTree, cache: Cache, rows: Rows, steps: Int[Array, ""], special: SpecialTokens
) -> tuple[Cache, Rows]:
    """Let all running rows write up to `steps` tokens; return sooner if one of them stops."""
    running = rows.status == Status.RUNNING

    def unfinished(carry: tuple[Array, Cache, Rows]) -> Array:
        step, _, rows = carry
        return (step < steps) & jnp.all((rows.status == Status.RUNNING) == running) & running.any()

    def advance(carry: tuple[Array, Cache, Rows]) -> tuple[Array, Cache, Rows]:
        step, cache, rows = carry
        columns = cache[0][0].shape[2]
        inputs = next_inputs(model, decoder, rows.token, rows.hidden, special)
        position = jnp.broadcast_to(rows.position[:, None, None], (*rows.position.shape, 3, 1))
        lengths = jnp.where(running, rows.length, 0)  # other rows attend to nothing in the cache
        mask = jnp.ones((1, 1, 1), bool)
        hidden, new = decode_by_layers(model.config, decoder, inputs, position, mask, cache, lengths)
        written = jnp.where(running, rows.length, columns)  # other rows are out of range: dropped
        index = jnp.arange(len(written))
        cache = jax.tree.map(lambda old, part: old.at[index, :, written].set(part[:, :, 0], mode="drop"), cache, new)
        rows = rows._replace(
            hidden=jnp.where(running[:, None], hidden[:, 0], rows.hidden),
            length=rows.length + running,
            position=rows.position + running,
        )
        return step + 1, cache, _write(model, decoder, rows, special)

    _, cache, rows = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), cache, rows))
    return cache, rows


def _write(model: Model, decoder: PyTree, rows: Rows, special: SpecialTokens) -> Rows:
    """Let running rows write the token that follows their hidden state."""
    running = rows.status == Status.RUNNING
    new_tokens = rows.tokens.shape[1]
    forced = jnp.take_along_axis(rows.forced, jnp.minimum(rows.count, new_tokens - 1)[:, None], axis=1)[:, 0]
    logits = model.logits(decoder, rows.hidden)
    token, log_probability, slot_state = next_token(logits, rows.slot_state, rows.sampling, rows.count, special, forced)
    looking = rows.pictures & (token == special.latent_start)
    slot_state = slot_state._replace(slots_left=jnp.where(looking, 0, slot_state.slots_left))
    index, place = jnp.arange(len(token)), jnp.where(running, rows.count, new_tokens)  # out of range: dropped
    in_slot = jnp.where(token == special.latent_pad, place, new_tokens)
    count = rows.count + running
    status = jnp.where(looking, Status.LOOKING, rows.status)
    status = jnp.where(count == rows.max_new_tokens, Status.FULL, status)
    status = jnp.where(ends_answer(token, special), Status.ENDED, status)
    return rows._replace(
        status=jnp.where(running, status, rows.status),
        token=jnp.where(running, token, rows.token),
        slot_state=jax.tree.map(lambda new, old: jnp.where(running, new, old), slot_state, rows.slot_state),
        count=count,
        tokens=rows.tokens.at[index, place].set(token, mode="drop"),
        log_probabilities=rows.log_probabilities.at[index, place].set(log_probability, mode="drop"),
        latents=rows.latents.at[index, in_slot].set(rows.hidden, mode="drop"),
    )
