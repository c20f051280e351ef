"""Errors for users: one line of bounded length each, whatever the input holds."""

import reprlib
from collections.abc import Iterable
from typing import Any

SENTENCE_LENGTH = 399  # most characters of a message
QUOTE_LENGTH = 80  # most characters of a value in a message
LISTED = 5  # most names in a message

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = QUOTE_LENGTH
_short.maxlevel = 3


class InputError(ValueError):
    """Input that cannot be used; one sentence names it, what it must be and what it was.

    A message longer than `SENTENCE_LENGTH` is cut in its middle, since it begins with the name of the input and ends
    with what to do.
    """

    def __init__(self, sentence: object):
        super().__init__(one_line(str(sentence)))


def one_line(sentence: str) -> str:
    """Return a sentence as one line without control characters, its middle cut to fit `SENTENCE_LENGTH`."""
    if len(sentence) > SENTENCE_LENGTH:
        half = (SENTENCE_LENGTH - len(" ... ")) // 2
        sentence = f"{sentence[:half]} ... {sentence[-half:]}"
    return "".join(letter if letter.isprintable() else " " for letter in sentence).strip()


def quote(value: Any) -> str:
    """Return a value for a message: its repr in at most `QUOTE_LENGTH` characters.

    Only the part of a large value that is shown is read.
    """
    if isinstance(value, int) and value.bit_length() > 1000:  # Python does not print numbers of over 4300 digits
        return f"a number of {value.bit_length()} bits"
    shown = _short.repr(value)
    return shown if len(shown) <= QUOTE_LENGTH else f"{shown[: QUOTE_LENGTH - 3]}..."


def listed(names: Iterable[str], limit: int = LISTED) -> str:
    """Return names for a message: the first `limit`, each cut to `QUOTE_LENGTH`, and the number of the others."""
    names = list(names)
    shown = [name if len(name) <= QUOTE_LENGTH else f"{name[: QUOTE_LENGTH - 3]}..." for name in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
