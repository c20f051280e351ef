"""The tokens that end an answer of a published checkpoint, found as transformers' `generate` finds them."""

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
# The id that transformers writes for models created without this key; ignored in a vocabulary too small for it.
DEFAULT = 151645


def read_stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> tuple[int, ...]:
    """Return the ids that end an answer: generation_config.json's, else config.json's, else the tokenizer's.

    A missing file, a missing key and null leave it to the next. Raises BadCheckpoint as `check_stop_tokens` does, and
    for ids that are not below `vocabulary`, the embedding's rows.
    """
    for path, ids in _named(folder):
        if ids == (DEFAULT,) and DEFAULT >= vocabulary:
            continue
        if max(ids) >= vocabulary:
            raise BadCheckpoint(f"`{KEY}` in {path} must be below {vocabulary}, the model's tokens, got {max(ids)}")
        return ids
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def check_stop_tokens(folder: Path) -> None:
    """Raise BadCheckpoint, naming file and key, unless the key holds a token id or a list of them in both files."""
    for _ in _named(folder):
        pass


def _named(folder: Path) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """Yield the files that have stop tokens, with their ids, in order of precedence."""
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
    """Return the content of generation_config.json, empty without one; raises BadCheckpoint if it is damaged."""
    path = folder / GENERATION
    return read_object(path, BadCheckpoint) if os.path.lexists(path) else {}


def generation_config(published: Mapping[str, Any], ends: Sequence[int], pad: int, vocabulary: int) -> dict[str, Any]:
    """Return the generation_config.json of a model whose answers end with `ends`, with the other fields of `published`.

    The ids of padding and of the beginning become `pad` if they are not in the vocabulary.
    """
    described = {name: value for name, value in published.items() if name != "_from_model_config"}
    ids = {name: _kept(described.get(name), pad, vocabulary) for name in (BEGINNING, PADDING)}
    return described | {KEY: list(ends)} | ids


def set_stop_tokens(described: dict[str, Any], ends: Sequence[int], pad: int, vocabulary: int) -> None:
    """Set these ids in a config.json: in its text_config, if it has one, and at the top if they are present there.

    Only the first of `ends` is set, as in the files of Qwen2.5-VL. Padding, whose embedding PyTorch does not train, is
    set only where it is present.
    """
    decoder = described.get("text_config", described)
    for section in (described, decoder):
        ids = {KEY: ends[0]} | {name: _kept(section.get(name), pad, vocabulary) for name in (BEGINNING, PADDING)}
        always = (KEY, BEGINNING) if section is decoder else ()
        section |= {name: value for name, value in ids.items() if name in always or section.get(name) is not None}


def _kept(value: Any, pad: int, vocabulary: int) -> int:
    return value if type(value) is int and 0 <= value < vocabulary else pad
