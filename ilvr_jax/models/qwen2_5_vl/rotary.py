"""Rotary position embeddings: two-dimensional in the vision tower, multimodal in the decoder."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ilvr_jax.config.schema import RopeScaling


def rope_magnitude(scaling: RopeScaling) -> float:
    """Return the factor of rotated queries and keys."""
    if scaling.rope_type != "yarn":
        return 1.0
    return scaling.attention_factor or yarn_magnitude(scaling.factor)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's factor of queries and keys for texts `factor` times longer than in pretraining."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def decoder_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """Return the angle in radians by which each pair of a head's channels rotates per position."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    periods = (theta ** exponents.astype(np.float64)).astype(np.float32)  # rounded once, as PyTorch's are
    frequencies, slower = 1.0 / periods, 1.0 / (np.float32(scaling.factor) * periods)
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.rope_type == "default":
        return frequencies

    def channel(turns: float) -> float:  # the pair of channels that makes `turns` rotations in pretraining's length
        period = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return head_dim * math.log(period) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    unchanged = 1 - np.clip(ramp, 0, 1).astype(np.float32)
    return slower * (1 - unchanged) + frequencies * unchanged


def rotary_angles(
    positions: Int[Array, "*batch axes time"], sections: tuple[int, ...], frequencies: Float[np.ndarray, " half"]
) -> Float[Array, "*batch time half"]:
    """Return the angle of each pair of channels: those of section i rotate with positions[..., i, :].

    In the decoder these are multimodal rotary positions: temporal, row and column.
    """
    axis = np.repeat(np.arange(len(sections)), sections)
    return jnp.swapaxes(positions, -1, -2)[..., axis].astype(jnp.float32) * frequencies


def vision_angles(coordinates: Int[Array, "*batch patches 2"], head_dim: int) -> Float[Array, "*batch patches half"]:
    """Return the vision tower's angles: half the channels rotate with the patch's row, half with its column."""
    quarter = 1.0 / 10000.0 ** (np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    positions = jnp.swapaxes(coordinates, -1, -2)
    return rotary_angles(positions, (len(quarter), len(quarter)), np.tile(quarter, 2).astype(np.float32))


def rotate(
    heads: Float[Array, "*batch time heads head_dim"], angles: Float[Array, "*batch time half"], magnitude: float = 1.0
) -> Float[Array, "*batch time heads head_dim"]:
    """Rotate each pair of channels (i, i + half) by its angle and multiply it by `magnitude`, in float32."""
    cosine, sine = magnitude * jnp.cos(angles)[..., None, :], magnitude * jnp.sin(angles)[..., None, :]
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(heads.dtype)
