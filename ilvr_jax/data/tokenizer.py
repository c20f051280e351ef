"""Tokenizers: small ones trained on records, published ones, and the special tokens of both."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLConfig

from ilvr_jax.data.records import Record, Text
from ilvr_jax.errors import InputError, listed, quote
from ilvr_jax.files import open_regular, read_object, read_text
from ilvr_jax.method.tokens import SpecialTokens

# Files of a tokenizer: all of it, or its two parts; settings beside them; the template of conversations.
TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE = "chat_template.jinja"
LATENT_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    *LATENT_TOKENS,
)

# Words with the space before them, but digits and capitals one by one: the moves in \boxed{RRD} stay single tokens.
# Longer runs of letters are cut into words of 64, since the time for a word grows with the square of its length.
PIECES = r" ?\p{Lu}?[\p{Ll}\p{Lm}\p{Lo}\p{M}]{1,64}| ?\p{L}| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"


class BadTokenizer(InputError):
    """A tokenizer that cannot be used; one sentence names its file, what it must be and what it was."""


def train_tokenizer(texts: Iterable[str], vocabulary: int = 32768) -> PreTrainedTokenizerFast:
    r"""Train a byte-level BPE tokenizer in which every word of `texts` is one token.

    Any text can be encoded and decodes to itself. Digits, capital letters, punctuation and line breaks are single
    tokens. The same texts give the same tokenizer, of at most `vocabulary` tokens.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_chat_words(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
    )


def _with_chat_words(texts: Iterable[str]) -> Iterator[str]:
    yield from texts
    yield "system\nuser\nassistant\n"


def record_texts(records: Iterable[Record]) -> Iterator[str]:
    """Yield the question and the answer of each record, to train a tokenizer on."""
    for record in records:
        yield record.question
        yield "".join(step.content for step in record.steps if isinstance(step, Text))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a saved tokenizer and add the latent tokens that it lacks.

    Raises BadTokenizer as `read_tokenizer` does.
    """
    tokenizer = read_tokenizer(folder)
    add_latent_tokens(tokenizer)
    return tokenizer


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a saved tokenizer as transformers does: from tokenizer.json, or else from vocab.json and merges.txt.

    Raises BadTokenizer, naming the file, if one is missing or damaged.
    """
    files = tokenizer_files(Path(folder))
    # Without a config it would read the model's config.json, and fail at fields that do not matter here.
    config = Qwen2_5_VLConfig() if (Path(folder) / "config.json").is_file() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises plain Exception, transformers errors of every kind
        for path in files:
            if path.name == TOKENIZER:
                _check_serialised(path)
        names = listed(path.name for path in files)
        raise BadTokenizer(f"{folder} must hold a tokenizer, but transformers cannot load {names}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BadTokenizer(f"{folder} must hold a tokenizer of the tokenizers library, got {type(tokenizer).__name__}")
    return tokenizer


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder's tokenizer; raise BadTokenizer, naming the file, if one is missing or damaged.

    A FIFO or a folder of such a name, which transformers silently ignores, counts as damaged.
    """
    files = [folder / name for name in OBJECTS if os.path.lexists(folder / name)]
    for path in files:
        read_object(path, BadTokenizer)
    if os.path.lexists(folder / TEMPLATE):
        files.append(folder / TEMPLATE)
        read_text(folder / TEMPLATE, BadTokenizer)
    if os.path.lexists(folder / TOKENIZER):
        try:
            open_regular(folder / TOKENIZER).close()
        except OSError as error:
            raise BadTokenizer(f"{folder / TOKENIZER} must be a file, but cannot be read: {error.strerror}") from error
        return [folder / TOKENIZER, *files]
    if not all(os.path.lexists(folder / name) for name in (VOCABULARY, MERGES)):
        raise BadTokenizer(f"{folder} must hold a tokenizer: {TOKENIZER}, or {VOCABULARY} and {MERGES}")
    vocabulary = read_object(folder / VOCABULARY, BadTokenizer)
    pairs = [line.split(" ") for line in read_text(folder / MERGES, BadTokenizer).splitlines()]
    merged = {"".join(pair) for pair in pairs if len(pair) == 2}
    if lacking := [token for token in vocabulary if len(token) > 1 and token not in merged and token[0] != "<"]:
        shown = listed(map(quote, lacking))
        raise BadTokenizer(f"{folder / MERGES} must merge every token of {VOCABULARY}, but has no merges for {shown}")
    return [folder / VOCABULARY, folder / MERGES, *files]


def _check_serialised(path: Path) -> None:
    """Raise BadTokenizer, naming the file, if the tokenizers library cannot read it."""
    read_object(path, BadTokenizer)
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the only type that the library raises
        raise BadTokenizer(
            f"{path} must be readable by tokenizers {tokenizers.__version__}, but is damaged or of a newer release "
            f"({error})"
        ) from error


def add_latent_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Add the latent tokens that a tokenizer lacks, after all its other tokens, and return their ids."""
    missing = [token for token in LATENT_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    return tuple(tokenizer.convert_tokens_to_ids(missing))


def special_tokens(tokenizer: PreTrainedTokenizerFast, stop: Iterable[int] = ()) -> SpecialTokens:
    """Return the ids of the special tokens; the tokens of `stop` end answers as `<|im_end|>` does.

    Raises BadTokenizer if the tokenizer lacks a special token, or encodes "assistant" as several tokens.
    """
    ids = {token: tokenizer.backend_tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    missing = [token for token, number in ids.items() if number is None]
    if missing:
        raise BadTokenizer(
            f"the tokenizer must have Qwen2.5's special tokens and the latent tokens, but lacks {', '.join(missing)}"
        )
    assistant = tokenizer.backend_tokenizer.encode("assistant", add_special_tokens=False).ids
    if len(assistant) != 1:
        raise BadTokenizer(f'the tokenizer must encode "assistant" as one token, got {len(assistant)}')
    names = {token: token.strip("<|>") for token in SPECIAL_TOKENS[1:]}
    return SpecialTokens(
        pad=ids["<|endoftext|>"],
        assistant=assistant[0],
        stop=tuple(token for token in stop if token != ids["<|im_end|>"]),
        **{name: ids[token] for token, name in names.items()},
    )
