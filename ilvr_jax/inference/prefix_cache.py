"""Prompts whose keys and values are in the rows of an engine: a new prompt reuses what it begins with."""

import hashlib
import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from ilvr_jax.inference.image_cache import image_digest
from ilvr_jax.method.layout import Sample
from ilvr_jax.method.tokens import SpecialTokens


class Placement(NamedTuple):
    """The row that a prompt is given, and the chunks of it that another row, or the same, holds already."""

    row: int
    source: int
    chunks: int


class PrefixCache:
    """The prompt in each row, as digests of it up to the end of each chunk.

    A row keeps its prompt when its request is done, until the row is given to another.
    """

    def __init__(self, rows: int, share: bool):
        """With `share` false nothing is reused."""
        self._share = share
        self._digests: list[Sequence[bytes]] = [()] * rows
        self._last_used = [0] * rows  # by a count of uses, the same in all processes
        self._uses = itertools.count(1)

    def place(self, digests: Sequence[bytes], free: Collection[int]) -> Placement:
        """Return which of the `free` rows to give to a prompt, and what to reuse.

        The row that shares the most is taken if all of its prompt is reused. Else the least recently used one is, and
        the row that shares the most only if no other is free: the rest of its prompt may serve others.
        """
        source, chunks = self._longest_shared(digests, free)
        if chunks == len(self._digests[source]) and source in free:
            row = source
        else:
            row = min(free, key=lambda row: (row == source, self._last_used[row]))
        return Placement(row, source, chunks)

    def _longest_shared(self, digests: Sequence[bytes], free: Collection[int]) -> tuple[int, int]:
        """Return the row that holds the most chunks of a prompt, preferring a free one, and how many."""
        best, most = 0, 0
        for row, held in enumerate(self._digests if self._share else ()):
            shared = next(
                (place for place, pair in enumerate(zip(held, digests, strict=False)) if pair[0] != pair[1]),
                min(len(held), len(digests)),
            )
            if shared == len(digests) < len(held):  # the hidden state of this prompt's last token was not kept
                shared -= 1
            if (shared, row in free) > (most, best in free):
                best, most = row, shared
        return best, most

    def hold(self, row: int, digests: Sequence[bytes]) -> None:
        """Register the prompt that is prefilled into a row."""
        self._digests[row] = digests

    def forget(self, row: int) -> None:
        """Drop a row's prompt."""
        self._digests[row] = ()

    def release(self, row: int) -> None:
        """Note that a row's request is done."""
        self._last_used[row] = next(self._uses)


def image_columns(prompt: Sample, special: SpecialTokens) -> list[int]:
    """Return the column of a prompt at which the vision tokens of each of its images begin."""
    places = np.flatnonzero(prompt.tokens == special.image_pad)
    firsts = np.cumsum([0, *(image.vision_tokens for image in prompt.images)])[:-1]
    return [int(places[first]) for first in firsts]


def prompt_digests(prompt: Sample, plan: Sequence[tuple[int, int, int]], special: SpecialTokens) -> list[bytes]:
    """Return a digest for each chunk of `plan_chunks`: of the prompt up to its end, images and chunk sizes included."""
    columns, digests, chain = image_columns(prompt, special), [], hashlib.sha256()
    for start, count, size in plan:
        chain.update(size.to_bytes(8, "big") + prompt.tokens[start : start + count].tobytes())
        for image, column in zip(prompt.images, columns, strict=True):
            if start <= column < start + count:
                chain.update(image_digest(image))
        digests.append(chain.digest())
    return digests
