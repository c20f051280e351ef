"""Tokenizers: a small one made from the generator's text, published ones, and the special tokens of both."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ilvr_jax.data.records import Record, Text
from ilvr_jax.latents.tokens import SpecialTokens

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
PIECES = r" ?\p{Lu}?[\p{Ll}\p{Lm}\p{Lo}\p{M}]+| ?\p{L}| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"


def train_tokenizer(texts: Iterable[str], vocabulary: int = 32768) -> PreTrainedTokenizerFast:
    r"""Makes a byte-level BPE tokenizer in which every word of `texts` is one token.

    Any text can be encoded and comes back unchanged. Digits, capital letters, punctuation and line breaks are
    single tokens. The same texts give the same tokenizer. `vocabulary` bounds the number of tokens.
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
    """Yields every text of some records, to train a tokenizer on."""
    for record in records:
        yield record.question
        yield "".join(step.content for step in record.steps if isinstance(step, Text))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Loads a saved tokenizer, with the latent tokens added if it is a published one that lacks them.

    Raises ValueError if the folder holds no tokenizer.
    """
    tokenizer = read_tokenizer(folder)
    add_latent_tokens(tokenizer)
    return tokenizer


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Loads a saved tokenizer as it is; raises ValueError if the folder holds none."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; a folder saved by a tokenizer is accepted")
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def add_latent_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Adds the latent tokens that a tokenizer lacks, after all its others, and returns the ids that they got."""
    missing = [token for token in LATENT_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    return tuple(tokenizer.convert_tokens_to_ids(missing))


def special_tokens(tokenizer: PreTrainedTokenizerFast, stop: Iterable[int] = ()) -> SpecialTokens:
    """Looks the ids of the special tokens up; `stop` ends answers, too, beside `<|im_end|>`.

    Raises ValueError if the tokenizer lacks one, or does not write "assistant" as one token.
    """
    ids = {token: tokenizer.backend_tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    missing = [token for token, number in ids.items() if number is None]
    if missing:
        raise ValueError(
            f"the tokenizer lacks {', '.join(missing)}; a Qwen2.5 tokenizer with latent tokens is accepted"
        )
    assistant = tokenizer.backend_tokenizer.encode("assistant", add_special_tokens=False).ids
    if len(assistant) != 1:
        raise ValueError(f'the tokenizer writes "assistant" as {len(assistant)} tokens; one is accepted')
    names = {token: token.strip("<|>") for token in SPECIAL_TOKENS[1:]}
    return SpecialTokens(
        pad=ids["<|endoftext|>"],
        assistant=assistant[0],
        stop=tuple(token for token in stop if token != ids["<|im_end|>"]),
        **{name: ids[token] for token, name in names.items()},
    )
