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
    """Returns one token a row. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole.

    A row's draw depends on its seed, the step and its logits alone, so not on the other rows of the batch.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    keep = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    if top_k:
        keep &= jnp.arange(logits.shape[-1]) < top_k
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
    rank = jax.vmap(jax.random.categorical)(keys, jnp.where(keep, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
