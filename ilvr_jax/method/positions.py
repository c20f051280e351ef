"""The rotary positions of slots: those of text, or of the vision tokens of a square image."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.base import PositionIds


def sample_positions(
    tokens: Int[np.ndarray, " time"],
    grids: Sequence[tuple[int, int]],
    slot_starts: Sequence[int],
    latent_size: int,
    special: SpecialTokens,
    rule: str,
    position_ids: PositionIds,
) -> Int[np.ndarray, "axes time"]:
    """Return the positions of a sample's tokens under a rule of schema.SLOT_POSITIONS.

    "text" are those of the paper. With "grid" the slots of a look have the positions of an image of as many vision
    tokens, in reading order; with "turning_grid" those of every second look are in the reverse order, as suits a
    helper image that is turned by half a turn. `grids` are heights and widths of the images in vision tokens.

    Raises ValueError if images and tokens do not match.
    """
    if rule == "text" or not slot_starts:
        return position_ids(tokens, grids, special.image_pad)
    side, pads = math.isqrt(latent_size), np.flatnonzero(tokens == special.image_pad)
    firsts = np.cumsum([0, *(height * width for height, width in grids)])[: len(grids)]
    if firsts.size and firsts[-1] >= len(pads):
        raise ValueError(f"image tokens must be as many as the images' vision tokens, got {len(pads)}")
    squares = [(start, (side, side)) for start in slot_starts]
    in_order = sorted([*zip(pads[firsts].tolist(), grids, strict=True), *squares])
    as_images = np.where(tokens == special.latent_pad, special.image_pad, tokens)
    positions = position_ids(as_images, [grid for _, grid in in_order], special.image_pad)
    for start in slot_starts[1::2] if rule == "turning_grid" else ():
        look = slice(start, start + latent_size)
        positions[:, look] = positions[:, look][:, ::-1]
    return positions


def grid_places(position_ids: Int[Array, "rows axes *columns"]) -> Int[Array, "rows *columns 2"]:
    """Return the row and the column of slots in the grid of their look, by their positions; 0 with those of text.

    A look that is turned has those of the cells that its slots stand for.
    """
    return jnp.moveaxis(position_ids[:, 1:] - position_ids[:, :1], 1, -1)


def answer_positions(
    tokens: Int[np.ndarray, " time"], latent_size: int, special: SpecialTokens, rule: str
) -> Int[np.ndarray, " time"]:
    """Return the temporal positions of an answer's tokens, from 0; with grids, all slots of a look have the same."""
    advance = np.ones(len(tokens), np.int64)
    if rule != "text":
        slots = np.flatnonzero(tokens == special.latent_pad)
        last = np.arange(len(slots)) % latent_size == latent_size - 1
        advance[slots] = np.where(last, math.isqrt(latent_size), 0)
    return np.cumsum(advance) - advance
