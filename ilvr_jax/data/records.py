"""What one sample of training data says, whatever format it was read from, or generated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ilvr_jax.errors import InputError

ImageSource = Path | bytes | np.ndarray
"""An image file, the content of one (PNG, JPEG, ...), or the pixels themselves: uint8 [height, width, 3]."""

IMAGE_MARKER = "<image>"
"""Stands in a question where an image belongs."""

MapDesc = tuple[tuple[int, ...], ...]
"""Rows of a FrozenLake map: 1 start, 2 goal, -1 hole, 0 ice."""


@dataclass(frozen=True)
class Text:
    """A text step of the answer."""

    content: str


@dataclass(frozen=True)
class Look:
    """A latent step of the answer: the model looks ahead at ``helper_image``."""

    helper_image: ImageSource


@dataclass(frozen=True)
class Record:
    """One question with its images and its interleaved answer.

    ``question`` may hold ``<image>`` once for each of ``images``, where it belongs, in their order; when it holds
    none, all images come before it. ``steps`` (``sequence_plan``) is empty only for evaluation records; ``answer`` is
    ``original_final_answer``; ``map_desc`` holds 1 for the start, 2 for the goal, -1 for a hole and 0 for ice;
    ``name`` is for messages, such as "train.jsonl line 3" or "frozen_lake record 17".
    """

    question: str
    images: tuple[ImageSource, ...]
    steps: tuple[Text | Look, ...]
    answer: str | None = None
    map_desc: MapDesc | None = None
    name: str = ""


class BadRecord(InputError):
    """A record that cannot be used; the message is one sentence naming the record and what is wrong with it."""
