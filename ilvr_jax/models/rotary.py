"""Rotary position embeddings: two-dimensional in the vision tower, multimodal in the decoder."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary_angles(
    positions: Int[Array, "*batch axes time"], sections: tuple[int, ...], frequencies: Float[np.ndarray, " half"]
) -> Float[Array, "*batch time half"]:
    """Returns the angle of each pair of channels: section i of the channels turns with positions[..., i, :]."""
    axis = np.repeat(np.arange(len(sections)), sections)
    return jnp.swapaxes(positions, -1, -2)[..., axis].astype(jnp.float32) * frequencies


def decoder_angles(
    positions: Int[Array, "batch 3 time"], head_dim: int, theta: float, sections: tuple[int, ...]
) -> Float[Array, "batch time half"]:
    """Returns mRoPE angles: channels are shared out among temporal, row and column positions by `sections`."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return rotary_angles(positions, sections, frequencies.astype(np.float32))


def vision_angles(coordinates: Int[Array, "*batch patches 2"], head_dim: int) -> Float[Array, "*batch patches half"]:
    """Returns the vision tower's angles: half the channels turn with the patch's row, half with its column."""
    quarter = 1.0 / 10000.0 ** (np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    positions = jnp.swapaxes(coordinates, -1, -2)
    return rotary_angles(positions, (len(quarter), len(quarter)), np.tile(quarter, 2).astype(np.float32))


def rotate(
    heads: Float[Array, "*batch time heads head_dim"], angles: Float[Array, "*batch time half"]
) -> Float[Array, "*batch time heads head_dim"]:
    """Turns each pair of channels (i, i + half) by its angle, in float32."""
    cosine, sine = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(heads.dtype)
