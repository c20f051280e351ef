"""Decoded tokens as text for people, with the looks marked."""

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


def show_look(slots: int, picture_tokens: int = 0) -> str:
    """Return the mark of a look in a text: its number of slots, or of a picture's vision tokens."""
    return f"‹looking: {picture_tokens} vision tokens›" if picture_tokens else f"‹looking: {slots} slots›"


def show_text(texts: Sequence[str], looks: Iterable[str]) -> str:
    """Return the texts joined, with the marks of the looks between them."""
    return texts[0] + "".join(look + text for look, text in zip(looks, texts[1:], strict=True))
