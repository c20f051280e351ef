"""The tokens that end an answer of a published checkpoint, as transformers' `generate` finds them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ilvr_jax.errors import quote
from ilvr_jax.files import read_object
from ilvr_jax.models.tensor_files import BadCheckpoint

GENERATION = "generation_config.json"
KEY = "eos_token_id"
BEGINNING, PADDING = "bos_token_id", "pad_token_id"
# What transformers writes for models that were made without this key. A vocabulary too small for it never had it.
DEFAULT = 151645


def read_stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> tuple[int, ...]:
    """Returns the ids that end an answer: generation_config.json's, else config.json's, else the tokenizer's.

    A file without the key, or with null, leaves it to the next; so does a folder without the file. Raises
    BadCheckpoint as `check_stop_tokens` does and for ids that are not below `vocabulary`, the embedding's rows.
    """
    for path, ids in _named(folder):
        if ids == (DEFAULT,) and DEFAULT >= vocabulary:
            continue
        if max(ids) >= vocabulary:
            raise BadCheckpoint(f"`{KEY}` in {path} must be below {vocabulary}, the model's tokens, got {max(ids)}")
        return ids
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def check_stop_tokens(folder: Path) -> None:
    """Raises BadCheckpoint, naming file and key, for what is neither a token id nor a list of them, in either file."""
    for _ in _named(folder):
        pass


def _named(folder: Path) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """Yields the files that name ids, the one that counts first, with these."""
    generation, config = folder / GENERATION, folder / "config.json"
    described = read_object(config, BadCheckpoint)
    text, own = described.get("text_config"), described.get(KEY)
    of_config = text.get(KEY) if own is None and isinstance(text, Mapping) else own
    for path, value in ((generation, read_generation_config(folder).get(KEY)), (config, of_config)):
        ids = value if isinstance(value, list) else [value]
        if value is None:
            continue
        if not ids or not all(type(token) is int and token >= 0 for token in ids):
            raise BadCheckpoint(
                f"`{KEY}` in {path} must be a token id, a whole number from 0, or a list of them, got {quote(value)}"
            )
        yield path, tuple(dict.fromkeys(ids))


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Returns the content of generation_config.json, empty without one; raises BadCheckpoint if it is damaged."""
    path = folder / GENERATION
    return read_object(path, BadCheckpoint) if os.path.lexists(path) else {}


def generation_config(published: Mapping[str, Any], ends: Sequence[int], pad: int, vocabulary: int) -> dict[str, Any]:
    """Returns a generation_config.json of a model whose answers end with `ends`; the other fields are kept.

    So are the ids of padding and of a beginning that are in the vocabulary; otherwise they are `pad`.
    """
    described = {name: value for name, value in published.items() if name != "_from_model_config"}
    ids = {name: _kept(described.get(name), pad, vocabulary) for name in (BEGINNING, PADDING)}
    return described | {KEY: list(ends)} | ids


def set_stop_tokens(described: dict[str, Any], ends: Sequence[int], pad: int, vocabulary: int) -> None:
    """Sets these ids in a config.json: in its text_config, if it has one, and at the top wherever they are there.

    Only the first of `ends` is named, as in the files of Qwen2.5-VL; padding, for which embeddings in PyTorch learn
    nothing, only where it is named already.
    """
    decoder = described.get("text_config", described)
    for section in (described, decoder):
        ids = {KEY: ends[0]} | {name: _kept(section.get(name), pad, vocabulary) for name in (BEGINNING, PADDING)}
        always = (KEY, BEGINNING) if section is decoder else ()
        section |= {name: value for name, value in ids.items() if name in always or section.get(name) is not None}


def _kept(value: Any, pad: int, vocabulary: int) -> int:
    return value if type(value) is int and 0 <= value < vocabulary else pad
