"""Errors that users read: one line each, of a bounded length, whatever the input holds."""

import reprlib
from collections.abc import Iterable
from typing import Any

SENTENCE_LENGTH = 399  # characters of a message at most
QUOTE_LENGTH = 80  # characters of a value in a message at most
LISTED = 5  # names in a message at most

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = QUOTE_LENGTH
_short.maxlevel = 3


class InputError(ValueError):
    """Input that cannot be used; one sentence names it, says what it must be and what it was.

    The message is one line of at most `SENTENCE_LENGTH` characters: a longer one is cut in its middle, since it begins
    with the name of the input and ends with what to do.
    """

    def __init__(self, sentence: object):
        super().__init__(one_line(str(sentence)))


def one_line(sentence: str) -> str:
    """Returns a sentence on one line, without control characters, cut in its middle to `SENTENCE_LENGTH`."""
    if len(sentence) > SENTENCE_LENGTH:
        half = (SENTENCE_LENGTH - len(" ... ")) // 2
        sentence = f"{sentence[:half]} ... {sentence[-half:]}"
    return "".join(letter if letter.isprintable() else " " for letter in sentence).strip()


def quote(value: Any) -> str:
    """Returns a value as a message shows it: Python's repr in at most `QUOTE_LENGTH` characters.

    No more of a large value is looked at than is shown.
    """
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to write numbers of over 4300 digits
        return f"a number of {value.bit_length()} bits"
    shown = _short.repr(value)
    return shown if len(shown) <= QUOTE_LENGTH else f"{shown[: QUOTE_LENGTH - 3]}..."


def listed(names: Iterable[str], limit: int = LISTED) -> str:
    """Returns names for a message: the first `limit`, each cut as values are, and the number of the others."""
    names = list(names)
    shown = [name if len(name) <= QUOTE_LENGTH else f"{name[: QUOTE_LENGTH - 3]}..." for name in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
