"""Records: questions with images and interleaved answers, in one form for all formats and generators."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ilvr_jax.errors import InputError

ImageSource = Path | bytes | np.ndarray
"""An image file, the content of one (PNG, JPEG, ...), or the pixels themselves: uint8 [height, width, 3]."""

IMAGE_MARKER = "<image>"
"""The place of an image in a question."""

MapDesc = tuple[tuple[int, ...], ...]
"""Rows of a FrozenLake map: 1 start, 2 goal, -1 hole, 0 ice."""


@dataclass(frozen=True)
class Text:
    """A text step of the answer."""

    content: str


@dataclass(frozen=True)
class Look:
    """A look in the answer, supervised by ``helper_image``."""

    helper_image: ImageSource


@dataclass(frozen=True)
class Record:
    """One question with its images and its interleaved answer.

    Attributes:
        question: text with ``<image>`` once for each of ``images``, in their order, or with none: all come before it.
        images: the images of the question.
        steps: the answer; empty only for records without an answer, which are for evaluation.
        answer: the final answer, if it is given apart from the steps.
        map_desc: the FrozenLake map of the image, if it shows one.
        name: the record in messages, such as "train.jsonl line 3" or "frozen_lake record 17".
    """

    question: str
    images: tuple[ImageSource, ...]
    steps: tuple[Text | Look, ...]
    answer: str | None = None
    map_desc: MapDesc | None = None
    name: str = ""


class BadRecord(InputError):
    """A record that cannot be used; one sentence names it and the problem."""


@contextlib.contextmanager
def prefix_errors(name: str) -> Iterator[None]:
    """Put a record's name in front of the BadRecords that are raised in the block."""
    try:
        yield
    except BadRecord as error:
        raise BadRecord(f"{name}: {error}") from error


class Fingerprint:
    """A digest of records in their order, for the method `fingerprint` of a source."""

    def __init__(self):
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, *parts: object) -> None:
        """Add bytes, or values with a stable repr: text, numbers, None, and tuples of these."""
        for part in parts:
            content = part if isinstance(part, bytes) else repr(part).encode()
            self._hash.update(len(content).to_bytes(8) + content)

    def text(self, records: int) -> str:
        """Return the fingerprint, with the number of records, for messages."""
        return f"{records} records with digest {self._hash.hexdigest()}"


def image_bytes_count(image: ImageSource) -> int:
    """Return the size of an image in bytes; raise BadRecord for a file that cannot be read."""
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, np.ndarray):
        return image.nbytes
    try:
        return os.stat(image).st_size
    except OSError as error:
        raise BadRecord(f"{image} cannot be read: {error.strerror}") from error
