"""Decoded tokens as text for people, with the looks marked."""

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerFast

from ilvr_jax.method.tokens import SpecialTokens


def split_at_looks(
    tokens: Iterable[int], tokenizer: PreTrainedTokenizerFast, special: SpecialTokens
) -> tuple[list[str], tuple[int, ...]]:
    """Return the texts around the looks of decoded tokens, one more than looks, and each look's slots.

    Tokens that end an answer belong to no text.
    """
    texts, slots = [[]], []
    for token in map(int, tokens):
        if token == special.latent_start:
            texts.append([])
            slots.append(0)
        elif token == special.latent_pad and slots:
            slots[-1] += 1
        elif token not in special.ends:
            texts[-1].append(token)
    return [tokenizer.decode(text, skip_special_tokens=True) for text in texts], tuple(slots)


def find_stop(
    tokens: Sequence[int],
    stop: Sequence[str],
    first: int,
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialTokens,
) -> tuple[int, int] | None:
    """Return the number of tokens up to the one that completes a stop string, and the string's place in their text.

    Return None if none is complete. A string that is complete in the text of the `first` tokens does not count.
    """

    def text(count: int) -> str:
        return "".join(split_at_looks(tokens[:count], tokenizer, special)[0])

    begin = len(text(first))

    def place(count: int) -> int:
        """Return the place of the first stop string in the text of so many tokens, -1 if there is none."""
        whole = text(count)
        places = (whole.find(string, max(0, begin - len(string) + 1)) for string in stop)
        return min((place for place in places if place >= 0), default=-1)

    if place(len(tokens)) < 0:
        return None
    return next((count, place(count)) for count in range(first + 1, len(tokens) + 1) if place(count) >= 0)


def cut_texts(texts: Sequence[str], room: int) -> list[str]:
    """Return the texts around looks up to so many characters."""
    kept = []
    for text in texts:
        kept.append(text[: max(0, room)])
        room -= len(text)
        if room <= 0:
            break
    return kept


LOOK = re.compile(r"‹looking: \d+ [a-z ]+›")  # the marks of `show_look`


def show_look(slots: int, picture_tokens: int = 0) -> str:
    """Return the mark of a look in a text: its number of slots, or of a picture's vision tokens."""
    return f"‹looking: {picture_tokens} vision tokens›" if picture_tokens else f"‹looking: {slots} slots›"


def show_text(texts: Sequence[str], looks: Iterable[str]) -> str:
    """Return the texts joined, with the marks of the looks between them; marks after the last text are dropped."""
    return texts[0] + "".join(look + text for look, text in zip(looks, texts[1:], strict=False))
