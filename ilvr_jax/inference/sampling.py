"""Sampling of the next token, with parameters and a seed for each row."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from ilvr_jax.config.fields import BadConfig, read
from ilvr_jax.config.schema import SamplingParams
from ilvr_jax.errors import quote
from ilvr_jax.method.tokens import SpecialTokens


class RowSampling(NamedTuple):
    """The sampling parameters of each row; see SamplingParams."""

    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    repetition_penalty: Float[Array, " rows"]
    min_new_tokens: Int[Array, " rows"]
    seed: UInt32[Array, " rows"]


def check_sampling(params: SamplingParams) -> None:
    """Raise ValueError, one sentence that begins with the field's name, for a value out of range."""
    try:
        read(SamplingParams, {field.name: getattr(params, field.name) for field in dataclasses.fields(SamplingParams)})
    except BadConfig as error:
        raise ValueError(str(error).replace("`", "")) from error


def check_whole(name: str, value: object, least: int = 0, most: int = np.iinfo(np.int32).max) -> None:
    """Raise ValueError, one sentence that begins with the name, unless the value is a whole number in these limits."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (whole and least <= value <= most):
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {quote(value)}")


def exclude_tokens(
    logits: Float[Array, "rows vocab"],
    sampling: RowSampling,
    step: Int[Array, " rows"],
    may_look: Bool[Array, " rows"],
    special: SpecialTokens,
) -> Float[Array, "rows vocab"]:
    """Return the logits of text, minus infinity for tokens that a row must not write now.

    These are `latent_pad` and `latent_end`, `latent_start` unless the row may look, and the ends of an answer in the
    first `min_new_tokens`.
    """
    logits = logits.at[:, jnp.array([special.latent_pad, special.latent_end])].set(-jnp.inf)
    start = jnp.where(may_look, logits[:, special.latent_start], -jnp.inf)
    logits = logits.at[:, special.latent_start].set(start)
    ends = jnp.array(special.ends)
    too_early = (step < sampling.min_new_tokens)[:, None]
    return logits.at[:, ends].set(jnp.where(too_early, -jnp.inf, logits[:, ends]))


def penalize_repetition(
    logits: Float[Array, "rows vocab"], sampling: RowSampling, seen: Bool[Array, "rows vocab"]
) -> Float[Array, "rows vocab"]:
    """Return the logits, those of seen tokens divided by the penalty if positive, else multiplied by it.

    As in transformers, except that the latent markers are never seen (`decode._write_tokens`).
    """
    if not seen.size:
        return logits
    penalty = sampling.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_tokens(
    logits: Float[Array, "rows vocab"], sampling: RowSampling, step: Int[Array, " rows"]
) -> Int[Array, " rows"]:
    """Return one token per row; top-p applies to what top-k leaves, as in transformers.

    A row's draw depends on its own parameters, seed, step and logits alone; work that no row needs is skipped.
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


def _truncate(logits: Float[Array, "rows vocab"], sampling: RowSampling) -> Float[Array, "rows vocab"]:
    """Return the logits, minus infinity where top-k or top-p exclude a token."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    top_k, top_p = sampling.top_k[:, None], sampling.top_p[:, None]
    included = (top_k == 0) | (jnp.arange(logits.shape[-1]) < top_k)
    probabilities = jax.nn.softmax(jnp.where(included, ranked, -jnp.inf), axis=-1)
    included &= (top_p >= 1) | (jnp.cumsum(probabilities, axis=-1) - probabilities < top_p)
    rows = jnp.arange(len(logits))[:, None]
    return jnp.where(jnp.zeros_like(included).at[rows, order].set(included), logits, -jnp.inf)
