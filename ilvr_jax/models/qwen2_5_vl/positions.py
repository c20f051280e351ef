"""Multimodal rotary positions of a token sequence (Qwen2-VL's mRoPE, `get_rope_index` in transformers)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def mrope_positions(
    tokens: Int[np.ndarray, " time"], grids: Sequence[tuple[int, int]], image_token: int
) -> Int[np.ndarray, "3 time"]:
    """Return the (temporal, row, column) position of every token of one sequence.

    Text advances all three together. The vision tokens of an image share the temporal position and have their row and
    column in the image added to it; text after the image continues one past the largest position used.
    `grids` holds height and width of each image in vision tokens, in order of appearance.

    Raises ValueError if the vision tokens do not match the images.
    """
    sizes, count = [height * width for height, width in grids], int((tokens == image_token).sum())
    if count != sum(sizes):
        raise ValueError(f"image tokens must be as many as the images' vision tokens {sizes}, got {count}")
    positions = np.empty((3, len(tokens)), np.int32)
    index, start, remaining = 0, 0, iter(grids)
    while index < len(tokens):
        if tokens[index] == image_token:
            height, width = next(remaining)
            grid = np.indices((1, height, width)).reshape(3, -1)
            positions[:, index : index + height * width] = start + grid
            index, start = index + height * width, start + max(height, width)
        else:
            positions[:, index] = start
            index, start = index + 1, start + 1
    return positions
