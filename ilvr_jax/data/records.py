"""What one sample of training data says, whatever format it was read from, or generated."""

from __future__ import annotations

import hashlib
import os
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


class Fingerprint:
    """A digest of records in their order, for the method `fingerprint` of a source that adds them as it opens."""

    def __init__(self):
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, *parts: object) -> None:
        """Adds bytes, or the repr of values that have a stable one: text, numbers, None, and tuples of these."""
        for part in parts:
            content = part if isinstance(part, bytes) else repr(part).encode()
            self._hash.update(len(content).to_bytes(8) + content)

    def text(self, records: int) -> str:
        """Returns the fingerprint of so many records, as messages show it."""
        return f"{records} records with digest {self._hash.hexdigest()}"


def image_bytes_count(image: ImageSource) -> int:
    """Returns the size of an image file, of the content of one or of pixels; raises BadRecord if there is no file."""
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, np.ndarray):
        return image.nbytes
    try:
        return os.stat(image).st_size
    except OSError as error:
        raise BadRecord(f"{image} cannot be read: {error.strerror}") from error
