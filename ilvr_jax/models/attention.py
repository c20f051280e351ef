"""Attention over keys and values that may come in several parts, such as a cache and the present tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    keys: Sequence[Float[Array, "batch _ key_value_heads head_dim"]],
    values: Sequence[Float[Array, "batch _ key_value_heads head_dim"]],
    mask: Bool[Array, "batch queries keys"] | Bool[Array, "batch 1 keys"],
) -> Float[Array, "batch queries heads head_dim"]:
    """Returns grouped-query attention over the concatenation of the parts, softmax in float32.

    The parts are joined only as scores, so a long cache is never copied. A query that may see nothing gets
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
