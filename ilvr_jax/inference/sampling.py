"""Sampling of the next token: greedy, temperature, top-k and top-p, with settings and a seed for each row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from ilvr_jax.errors import quote


class Sampling(NamedTuple):
    """The settings of each row. Temperature 0 is greedy; top_k 0 and top_p 1 keep the whole distribution."""

    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    seed: UInt32[Array, " rows"]


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError, one sentence that begins with the setting's name, for a value out of range."""
    # The limits keep scaled logits and the thresholds of cumulative probabilities inside float32.
    if not (_is_real(temperature) and (temperature == 0 or 1e-6 <= temperature <= 1e6)):
        raise ValueError(f"temperature must be 0 or a number from 1e-6 to 1e6, got {quote(temperature)}")
    check_whole("top_k", top_k)
    if not (_is_real(top_p) and np.finfo(np.float32).tiny <= top_p <= 1):
        raise ValueError(f"top_p must be a number above 0 and at most 1, got {quote(top_p)}")


def check_whole(name: str, value: object, least: int = 0, most: int = np.iinfo(np.int32).max) -> None:
    """Raise ValueError, one sentence that begins with the name, unless the value is a whole number in these limits."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (whole and least <= value <= most):
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {quote(value)}")


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def sample_tokens(
    logits: Float[Array, "rows vocab"], sampling: Sampling, step: Int[Array, " rows"]
) -> Int[Array, " rows"]:
    """Return one token per row; top-p applies to what top-k leaves, as in transformers.

    A row's draw depends on its own settings, seed, step and logits alone; work that no row needs is skipped.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    sampled = sampling.temperature > 0
    truncated = sampled & ((sampling.top_k > 0) | (sampling.top_p < 1))

    def draw() -> Int[Array, " rows"]:
        scaled = logits / jnp.where(sampled, sampling.temperature, 1.0)[:, None]
        scaled = jax.lax.cond(truncated.any(), lambda: _truncate(scaled, sampling), lambda: scaled)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(sampling.seed, step)
        drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
        return jnp.where(sampled, drawn, greedy)

    return jax.lax.cond(sampled.any(), draw, lambda: greedy)


def _truncate(logits: Float[Array, "rows vocab"], sampling: Sampling) -> Float[Array, "rows vocab"]:
    """Return the logits, minus infinity where top-k or top-p exclude a token."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    top_k, top_p = sampling.top_k[:, None], sampling.top_p[:, None]
    included = (top_k == 0) | (jnp.arange(logits.shape[-1]) < top_k)
    probabilities = jax.nn.softmax(jnp.where(included, ranked, -jnp.inf), axis=-1)
    included &= (top_p >= 1) | (jnp.cumsum(probabilities, axis=-1) - probabilities < top_p)
    rows = jnp.arange(len(logits))[:, None]
    return jnp.where(jnp.zeros_like(included).at[rows, order].set(included), logits, -jnp.inf)
