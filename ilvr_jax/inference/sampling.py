"""Sampling of the next token: greedy, temperature, top-k, top-p, a seed for each row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


def sample_tokens(
    logits: Float[Array, "rows vocab"],
    seeds: UInt32[Array, " rows"],
    step: Int[Array, ""],
    temperature: float,
    top_k: int,
    top_p: float,
) -> Int[Array, " rows"]:
    """Returns one token a row. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole;
    top-p is of what top-k left, as in transformers.

    A row's draw depends on its seed, the step and its logits alone, so not on the other rows of the batch.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
    if top_p < 1:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        ranked = jnp.where(jnp.cumsum(probabilities, axis=-1) - probabilities < top_p, ranked, -jnp.inf)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
