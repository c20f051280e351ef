"""The cache of keys and values: a row for each request, a column for each token."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.linen import logical_to_mesh_axes, with_logical_constraint
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, PyTree

from ilvr_jax.models.attention import KVCache, current_platform
from ilvr_jax.models.base import Model
from ilvr_jax.models.qwen2_5_vl.decoder import KeyValues
from ilvr_jax.models.sharding import replicate

AXES = ("rows", "heads", None, None)  # of a layer's keys or values, in sharding.RULES


@functools.partial(jax.jit, static_argnums=range(4))
def init_kv_cache(model: Model, rows: int, columns: int, split: bool) -> KVCache:
    """Return an empty cache, sharded over rows and heads on a mesh; with `split`, for SplitLayers."""
    config = model.config
    layers, shape = config.num_hidden_layers, (rows, config.num_key_value_heads, columns, config.head_dim)

    def zeros() -> Array | tuple[Array, ...]:
        if split:
            return tuple(jnp.zeros(shape, config.dtype) for _ in range(layers))
        return with_logical_constraint(jnp.zeros((layers, *shape), config.dtype), (None, *AXES))

    return KVCache(zeros(), zeros(), jnp.zeros(rows, jnp.int32))


def take_rows(cache: KVCache, rows: Int[Array, " some"], lengths: Int[Array, " some"]) -> KVCache:
    """Return these rows of the cache, with new lengths."""
    keys, values = _map_layers(lambda part: jnp.take(part, rows, axis=0, mode="clip"), cache)
    return KVCache(keys, values, lengths)


def write_columns(
    cache: KVCache,
    new: KeyValues,
    starts: Int[Array, " some"],
    counts: Int[Array, " some"],
    rows: Int[Array, " some"] | None = None,
) -> KVCache:
    """Return the cache with the first `counts` of the new columns written from `starts` on.

    They are of all rows in order, or of those given; numbers of rows out of range must come with a count of 0.
    """
    write = _write_windows if current_platform() == "tpu" else _scatter
    if rows is None and not jax.sharding.get_abstract_mesh().empty:  # each device writes its own rows
        part, columns, row = (logical_to_mesh_axes(axes) for axes in (AXES, (AXES[0], None, AXES[1], None), AXES[:1]))
        write = jax.shard_map(write, in_specs=(part, columns, row, row), out_specs=part, check_vma=False)
    others = (starts, counts) if rows is None else (starts, counts, rows)
    keys, values = _map_layers(lambda part, new: write(part, new, *others), cache, new)
    return KVCache(keys, values, cache.lengths)


def keep_layout(cache: KVCache) -> KVCache:
    """Return the cache with columns in memory as attention reads them; in a loop XLA would choose the writes' order."""
    return jax.tree.map(lambda part: with_layout_constraint(part, Layout(tuple(range(part.ndim)))), cache)


def _scatter(part: Array, new: Array, starts: Array, counts: Array, rows: Array | None = None) -> Array:
    """Return a layer's keys or values with new columns, for `write_columns`."""
    rows, columns = jnp.arange(len(part)) if rows is None else rows, jnp.arange(new.shape[1])
    places = jnp.where(columns < counts[:, None], starts[:, None] + columns, part.shape[2])  # out of range: dropped
    return part.at[rows[:, None], :, places].set(new, mode="drop")


def _write_windows(part: Array, new: Array, starts: Array, counts: Array, rows: Array | None = None) -> Array:
    """Return what `_scatter` does, by a slice for each row: on a TPU, a scatter would lay out the whole cache anew."""
    columns, new = jnp.arange(new.shape[1]), new.swapaxes(1, 2)
    for number in range(len(new)):
        row = number if rows is None else rows[number]
        start = jnp.minimum(starts[number], part.shape[2] - len(columns))  # as dynamic slices clamp it
        shift, place = starts[number] - start, (row, 0, start, 0)
        old = jax.lax.dynamic_slice(part, place, (1, *new.shape[1:]))
        written = ((columns >= shift) & (columns < shift + counts[number]))[:, None]
        window = jnp.where(written, jnp.roll(new[number : number + 1], shift, axis=2), old)
        part = jax.lax.dynamic_update_slice(part, window, place)
    return part


def copy_row(cache: KVCache, source: Int[Array, ""], row: Int[Array, ""]) -> KVCache:
    """Return the cache with the row `source` copied to `row`."""

    def copy(part: Array) -> Array:
        one = jax.lax.dynamic_slice_in_dim(part, source, 1)
        return jax.lax.dynamic_update_slice_in_dim(part, one, row, axis=0)

    return KVCache(*_map_layers(copy, cache), copy(cache.lengths))


@jax.jit
def read_columns(
    cache: KVCache, row: Int[Array, ""], columns: Int[Array, " some"]
) -> tuple[Float[Array, "layers some key_value_heads head_dim"], Float[Array, "layers some key_value_heads head_dim"]]:
    """Return keys and values of some columns of a row, on each device whole."""

    def read(part: Array) -> Array:
        one = jax.lax.dynamic_slice_in_dim(part, row, 1)[0]
        return jnp.take(one, columns, axis=1, mode="clip").swapaxes(0, 1)

    keys, values = _map_layers(read, cache)
    return replicate((jnp.stack(keys), jnp.stack(values)))


def _map_layers(function: Callable[..., Array], cache: KVCache, *others: PyTree) -> tuple[PyTree, PyTree]:
    """Return keys and values with a function of one layer's applied to each layer, stacked or not."""
    parts = (cache.keys, cache.values)
    if isinstance(cache.keys, tuple):
        return jax.tree.map(function, parts, *others)
    return jax.tree.map(jax.vmap(function), parts, *others)
