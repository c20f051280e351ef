"""Attention over parts of keys and values, such as a cache and the present tokens, and over whole sequences.

Whole sequences use a library's kernel where the platform has one, since the scores would fill the memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Array, Bool, Float, Int

from ilvr_jax.errors import InputError

CACHE_BLOCK = 256  # columns of a cache that are read at a time
QUERY_BLOCK = 512  # the same for a single query a row
BLOCKS = (512, 384, 256)  # columns that a kernel takes at a time, multiples of a TPU's 128 lanes


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    keys: Sequence[Float[Array, "batch _ key_value_heads head_dim"]],
    values: Sequence[Float[Array, "batch _ key_value_heads head_dim"]],
    mask: Bool[Array, "batch queries keys"] | Bool[Array, "batch 1 keys"],
) -> Float[Array, "batch queries heads head_dim"]:
    """Return grouped-query attention over the concatenation of the parts, softmax in float32.

    Only the scores of the parts are joined, so that a long cache is never copied. A query that attends to nothing gets
    finite, meaningless numbers.
    """
    batch, queries, heads, head_dim = query.shape
    shared = keys[0].shape[2]
    # Heads that share keys are queries of one head: plain matrix products, and no key is repeated.
    grouped = (query * head_dim**-0.5).reshape(batch, queries, shared, -1, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, shared, -1, head_dim)
    scores = jnp.concatenate(
        [jnp.einsum("bhqd,bkhd->bhqk", grouped, part, preferred_element_type=jnp.float32) for part in keys], axis=-1
    )
    scores = scores.reshape(batch, shared, -1, queries, scores.shape[-1])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype).reshape(*grouped.shape[:3], -1)
    output, start = 0.0, 0
    for part in values:
        part_weights = jax.lax.slice_in_dim(weights, start, start + part.shape[1], axis=-1)
        output += jnp.einsum("bhqk,bkhd->bhqd", part_weights, part)
        start += part.shape[1]
    output = output.reshape(batch, shared, -1, queries, head_dim).transpose(0, 3, 1, 2, 4)
    return output.reshape(batch, queries, heads, head_dim)


def attention_weights(
    query: Float[Array, "*batch queries heads head_dim"],
    key: Float[Array, "*batch keys key_value_heads head_dim"],
    mask: Bool[Array, "*batch queries keys"],
) -> Float[Array, "*batch heads queries keys"]:
    """Return the weights with which `attention` mixes values, in float32; exactly 0 where the mask is false.

    Each query must attend to something.
    """
    queries, heads, head_dim = query.shape[-3:]
    shared = key.shape[-2]
    grouped = (query * head_dim**-0.5).reshape(*query.shape[:-2], shared, heads // shared, head_dim)
    scores = jnp.einsum("...qhgd,...khd->...hgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(*query.shape[:-3], heads, queries, key.shape[-3])
    scores = jnp.where(mask[..., None, :, :], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


class KVCache(NamedTuple):
    """Keys and values of earlier columns, heads first: the first `lengths` columns of each row are valid.

    `keys` and `values` are arrays with a leading axis of layers, or tuples with an array for each layer, as the layers'
    parameters are.
    """

    keys: Float[Array, "layers rows key_value_heads columns head_dim"] | tuple[Array, ...]
    values: Float[Array, "layers rows key_value_heads columns head_dim"] | tuple[Array, ...]
    lengths: Int[Array, " rows"]
    # Columns that each of the present queries does not attend to: from the first number to before the second.
    hidden: Int[Array, "rows queries 2"] | None = None

    @property
    def columns(self) -> int:
        """The room of each row."""
        return self.keys[0].shape[-2]

    def read(self, layer: int | Int[Array, ""], start: int | Int[Array, ""], count: int) -> tuple[Array, Array]:
        """Return keys and values of some columns in a layer, each [rows, key_value_heads, count, head_dim]."""

        def slice_layer(part: Array | tuple[Array, ...]) -> Array:
            if isinstance(part, tuple):
                return jax.lax.dynamic_slice_in_dim(part[layer], start, count, axis=2)
            # In one slice: that of a whole layer would be a copy of it.
            return jax.lax.dynamic_slice(part, (layer, 0, 0, start, 0), (1, *part.shape[1:3], count, part.shape[4]))[0]

        return slice_layer(self.keys), slice_layer(self.values)


def cached_attention(
    query: Float[Array, "rows queries heads head_dim"],
    key: Float[Array, "rows queries key_value_heads head_dim"],
    value: Float[Array, "rows queries key_value_heads head_dim"],
    mask: Bool[Array, "rows queries queries"] | Bool[Array, "1 queries queries"],
    cache: KVCache,
    layer: int | Int[Array, ""],
) -> Float[Array, "rows queries heads head_dim"]:
    """Return grouped-query attention to the cached columns of a layer and, under the mask, to the present ones.

    Each query attends to at least one present column. The cache is read block by block, no further than its longest
    row. A row's result does not depend on the others: a block without valid columns of the row leaves its sums as they
    are, to the last bit.
    """
    batch, queries, heads, head_dim = query.shape
    columns, shared = cache.columns, key.shape[2]
    grouped = (query * head_dim**-0.5).reshape(batch, queries, shared, -1, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, shared, -1, head_dim)

    def add(keys: Array, values: Array, seen: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Add columns to the highest score, the sum of weights and the weighted sum of values so far."""
        highest, weight, output = sums
        scores = jnp.einsum("bhqd,bhkd->bhqk", grouped, keys, preferred_element_type=jnp.float32)
        by_query = scores.reshape(batch, shared, -1, queries, scores.shape[-1])
        by_query = jnp.where(seen[:, None, None], by_query, jnp.finfo(jnp.float32).min)
        scores = by_query.reshape(scores.shape)
        higher = jnp.maximum(highest, scores.max(-1, keepdims=True))
        weights, scale = jnp.exp(scores - higher), jnp.exp(highest - higher)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return higher, weight * scale + weights.sum(-1, keepdims=True), output * scale + mixed

    nothing = jnp.full((*grouped.shape[:3], 1), jnp.finfo(jnp.float32).min), jnp.float32(0), jnp.float32(0)
    sums = add(key.swapaxes(1, 2), value.swapaxes(1, 2), mask, nothing)
    block = CACHE_BLOCK if queries > 1 else QUERY_BLOCK

    def attended(places: Array) -> Array:
        """Return which columns each query attends to, of the cached ones at some places."""
        seen = places < cache.lengths[:, None, None]
        if cache.hidden is None:
            return seen
        return seen & outside(places, cache.hidden)

    def add_block(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start = jnp.minimum(number * block, columns - block)  # the last block may overlap the one before it
        places = start + jnp.arange(block)
        seen = (places >= number * block) & attended(places)
        return add(*cache.read(layer, start, block), seen, sums)

    if columns <= block:
        sums = add(*cache.read(layer, 0, columns), attended(jnp.arange(columns)), sums)
    else:
        sums = jax.lax.fori_loop(0, (cache.lengths.max() + block - 1) // block, add_block, sums)
    output = (sums[2] / sums[1]).astype(query.dtype).reshape(batch, shared, -1, queries, head_dim)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head_dim)


def outside(places: Int[Array, "*batch columns"], hidden: Int[Array, "rows queries 2"]) -> Bool[Array, "..."]:
    """Return which columns are not hidden from each query: those before the first number, and from the second on."""
    return ~((places >= hidden[..., :1]) & (places < hidden[..., 1:]))


def causal_mask(valid: Bool[Array, "rows columns"]) -> Bool[Array, "rows columns columns"]:
    """Return which columns each column attends to when they are in order: earlier ones and itself, never padding."""
    columns = jnp.arange(valid.shape[1])
    return valid[:, None, :] & (columns[None, :, None] >= columns[None, None, :])


def causal_attention(
    query: Float[Array, "rows columns heads head_dim"],
    key: Float[Array, "rows columns key_value_heads head_dim"],
    value: Float[Array, "rows columns key_value_heads head_dim"],
    valid: Bool[Array, "rows columns"],
    kernel: str = "auto",
) -> Float[Array, "rows columns heads head_dim"]:
    """Return grouped-query attention under `causal_mask`; padding gets meaningless numbers.

    `kernel` is one of schema.KERNELS: "splash" is JAX's for TPU (interpreted elsewhere, slowly), "cudnn" NVIDIA's for
    half precision, "xla" is `attention`, and "auto" chooses by the platform that the program is compiled for. Raises
    InputError for "cudnn" where cuDNN cannot be used.
    """
    platform = current_platform()
    half = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] % 8 == 0
    cudnn = half and platform in ("cuda", "gpu")
    if kernel == "auto":
        kernel = "splash" if platform == "tpu" else "cudnn" if cudnn else "xla"
    if kernel == "cudnn" and not cudnn:
        raise InputError(
            "`model.attention` must be auto or xla here: cudnn needs an NVIDIA GPU, half precision and heads of a "
            f"multiple of 8 channels, got {platform}, {query.dtype} and {query.shape[-1]}"
        )
    if kernel == "xla":
        return attention(query, [key], [value], causal_mask(valid))
    columns = query.shape[1]
    block = min(BLOCKS, key=lambda block: -columns % block)

    def pad(array: Array) -> Array:
        return jnp.pad(array, [(0, 0), (0, -columns % block)] + [(0, 0)] * (array.ndim - 2))

    def run(query: Array, key: Array, value: Array, valid: Array) -> Array:
        if kernel == "cudnn":
            mask = causal_mask(valid)[:, None]
            return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
        return _splash(query, key, value, valid, block, interpret=platform != "tpu")

    if not jax.sharding.get_abstract_mesh().empty:  # the compiler cannot partition a kernel
        heads = nn.logical_to_mesh_axes(("rows", None, "heads", None))
        rows = nn.logical_to_mesh_axes(("rows", None))
        run = jax.shard_map(run, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return run(pad(query), pad(key), pad(value), pad(valid))[:, :columns]


def current_platform() -> str:
    """Return the platform of the current mesh, or else the default one."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def _splash(query: Array, key: Array, value: Array, valid: Array, block: int, interpret: bool) -> Array:
    columns, heads, head_dim = query.shape[1:]
    blocks = BlockSizes(*[block] * 8)
    mask = MultiHeadMask([CausalMask((columns, columns))] * heads)
    kernel = make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)

    def attend(query: Array, key: Array, value: Array, valid: Array) -> Array:
        query, key, value = (array.swapaxes(0, 1) for array in (query * head_dim**-0.5, key, value))
        segments = valid.astype(jnp.int32)  # padding attends to padding, so that every query attends to something
        return kernel(query, key, value, SegmentIds(segments, segments)).swapaxes(0, 1)

    return jax.vmap(attend)(query, key, value, valid)
