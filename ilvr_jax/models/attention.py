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


class Cache(NamedTuple):
    """Keys and values of earlier columns, heads first: the first `lengths` columns of each row are valid."""

    keys: Float[Array, "batch key_value_heads columns head_dim"]
    values: Float[Array, "batch key_value_heads columns head_dim"]
    lengths: Int[Array, " batch"]


def cached_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch queries key_value_heads head_dim"],
    value: Float[Array, "batch queries key_value_heads head_dim"],
    mask: Bool[Array, "batch queries queries"] | Bool[Array, "1 queries queries"],
    cache: Cache,
) -> Float[Array, "batch queries heads head_dim"]:
    """Return grouped-query attention to the columns of a cache and, under the mask, to the present ones.

    Each query attends to at least one present column. For several queries the cache is read block by block, no further
    than its longest row. A row's result does not depend on the others: a block without valid columns of the row leaves
    its sums as they are, to the last bit. For a single query, slicing blocks would take longer than it saves.
    """
    batch, queries, heads, head_dim = query.shape
    columns, shared = cache.keys.shape[2], key.shape[2]
    if queries == 1:
        seen = jnp.pad(jnp.arange(columns) < cache.lengths[:, None], ((0, 0), (0, 1)), constant_values=True)
        keys, values = (part.swapaxes(1, 2) for part in cache[:2])
        return attention(query, [keys, key], [values, value], seen[:, None])
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
    present = add(key.swapaxes(1, 2), value.swapaxes(1, 2), mask, nothing)
    block = min(columns, CACHE_BLOCK)

    def add_block(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start = jnp.minimum(number * block, columns - block)  # the last block may overlap the one before it
        keys, values = (jax.lax.dynamic_slice_in_dim(part, start, block, axis=2) for part in cache[:2])
        places = start + jnp.arange(block)
        return add(keys, values, (places >= number * block) & (places < cache.lengths[:, None, None]), sums)

    blocks = (cache.lengths.max() + block - 1) // block
    _, weight, output = jax.lax.fori_loop(0, blocks, add_block, present)
    output = (output / weight).astype(query.dtype).reshape(batch, shared, -1, queries, head_dim)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, head_dim)


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
    platform = _platform()
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


def _platform() -> str:
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
