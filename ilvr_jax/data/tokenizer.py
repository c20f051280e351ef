"""Tokenizers: a small one made from the generator's text, published ones, and the special tokens of both."""

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

# The files of a tokenizer: all of it, or its parts; JSON objects beside them; the template of its conversations.
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

# Words with the space before them, but digits and capitals one by one: the moves in \boxed{RRD} stay single tokens. A
# longer run of letters is cut into words of 64, since the time that a word takes grows with its square.
PIECES = r" ?\p{Lu}?[\p{Ll}\p{Lm}\p{Lo}\p{M}]{1,64}| ?\p{L}| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"


class BadTokenizer(InputError):
    """A tokenizer that cannot be used; one sentence names its file, what it must be and what it is."""


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

    Raises BadTokenizer as `read_tokenizer` does.
    """
    tokenizer = read_tokenizer(folder)
    add_latent_tokens(tokenizer)
    return tokenizer


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Loads a saved tokenizer as it is: tokenizer.json, or without it vocab.json and merges.txt, as transformers does.

    Raises BadTokenizer, naming the file, if there is none or one of its files is damaged.
    """
    files = tokenizer_files(Path(folder))
    # By itself it would read the model's config.json beside the tokenizer, and fail at fields that are harmless here.
    config = Qwen2_5_VLConfig() if (Path(folder) / "config.json").is_file() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises plain Exception, transformers whatever reading what it holds does
        for path in files:
            if path.name == TOKENIZER:
                _check_serialised(path)
        names = listed(path.name for path in files)
        raise BadTokenizer(f"{folder}: transformers must make a tokenizer of {names}, but fails: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BadTokenizer(f"{folder} must hold a tokenizer of the tokenizers library, not {type(tokenizer).__name__}")
    return tokenizer


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of a folder's tokenizer; raises BadTokenizer, naming it, if one is missing or damaged.

    What transformers would skip in silence, a FIFO or a folder of that name, is damage too.
    """
    found = [folder / name for name in OBJECTS if os.path.lexists(folder / name)]
    for path in found:
        read_object(path, BadTokenizer)
    if os.path.lexists(folder / TEMPLATE):
        found.append(folder / TEMPLATE)
        read_text(folder / TEMPLATE, BadTokenizer)
    if os.path.lexists(folder / TOKENIZER):
        try:
            open_regular(folder / TOKENIZER).close()
        except OSError as error:
            problem = f"must be a tokenizer's file, but cannot be read: {error.strerror}"
            raise BadTokenizer(f"{folder / TOKENIZER} {problem}") from error
        return [folder / TOKENIZER, *found]
    if not all(os.path.lexists(folder / name) for name in (VOCABULARY, MERGES)):
        raise BadTokenizer(f"{folder} must hold a tokenizer: {TOKENIZER}, or {VOCABULARY} and {MERGES}")
    vocabulary = read_object(folder / VOCABULARY, BadTokenizer)
    pairs = [line.split(" ") for line in read_text(folder / MERGES, BadTokenizer).splitlines()]
    made = {"".join(pair) for pair in pairs if len(pair) == 2}
    if lacking := [token for token in vocabulary if len(token) > 1 and token not in made and token[0] != "<"]:
        shown = listed(map(quote, lacking))
        raise BadTokenizer(f"{folder / MERGES} must make every token of {VOCABULARY}, but does not make {shown}")
    return [folder / VOCABULARY, folder / MERGES, *found]


def _check_serialised(path: Path) -> None:
    """Raises BadTokenizer, naming the file, if the tokenizers library cannot read it."""
    read_object(path, BadTokenizer)
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other kind
        raise BadTokenizer(
            f"{path} must be a file that tokenizers {tokenizers.__version__} reads, but is damaged or of a newer "
            f"release ({error})"
        ) from error


def add_latent_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Adds the latent tokens that a tokenizer lacks, after all its others, and returns the ids that they got."""
    missing = [token for token in LATENT_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    return tuple(tokenizer.convert_tokens_to_ids(missing))


def special_tokens(tokenizer: PreTrainedTokenizerFast, stop: Iterable[int] = ()) -> SpecialTokens:
    """Looks the ids of the special tokens up; `stop` ends answers, too, beside `<|im_end|>`.

    Raises BadTokenizer if the tokenizer lacks one, or does not write "assistant" as one token.
    """
    ids = {token: tokenizer.backend_tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    missing = [token for token, number in ids.items() if number is None]
    if missing:
        raise BadTokenizer(f"the tokenizer must be one of Qwen2.5 with latent tokens, but lacks {', '.join(missing)}")
    assistant = tokenizer.backend_tokenizer.encode("assistant", add_special_tokens=False).ids
    if len(assistant) != 1:
        raise BadTokenizer(f'the tokenizer must write "assistant" as one token, but writes {len(assistant)}')
    names = {token: token.strip("<|>") for token in SPECIAL_TOKENS[1:]}
    return SpecialTokens(
        pad=ids["<|endoftext|>"],
        assistant=assistant[0],
        stop=tuple(token for token in stop if token != ids["<|im_end|>"]),
        **{name: ids[token] for token, name in names.items()},
    )
