"""The small tokenizer: lossless, words and moves as single tokens, saved and loaded, special tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ilvr_jax.data.tokenizer import (
    SPECIAL_TOKENS,
    add_latent_tokens,
    load_tokenizer,
    read_tokenizer,
    record_texts,
    special_tokens,
    train_tokenizer,
)

TEXTS = ["Row 1: elf, ice, hole.\nRow 2: ice, goal, ice.\nMove right to row 1, column 2.\n\\boxed{RDLU}"] * 3
TOKENIZER = train_tokenizer(TEXTS)


def encode(text: str) -> list[int]:
    return TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids


def pieces(text: str) -> list[str]:
    return [TOKENIZER.decode([token]) for token in encode(text)]


@given(st.text() | st.text(alphabet="aBé 1\n\t{}漢🙂"))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text


def test_words_digits_moves_and_line_breaks_are_single_tokens():
    assert pieces("Row 1: ice, hole\n\n\\boxed{RRD}") == [
        *["Row", " 1", ":", " ice", ",", " hole", "\n", "\n", "\\", "boxed", "{", "R", "R", "D", "}"]
    ]
    assert pieces("12") == ["1", "2"]


def test_the_generators_text_takes_one_token_a_word():
    from ilvr_jax.config.schema import FrozenLakeConfig
    from ilvr_jax.data.frozen_lake.source import FrozenLakeSource

    source = FrozenLakeSource(FrozenLakeConfig(), seed=1, count=60)
    texts = list(record_texts(source[index] for index in range(40)))
    tokenizer = train_tokenizer(texts).backend_tokenizer
    for text in record_texts(source[index] for index in range(40, 60)):
        pre_tokens = len(tokenizer.pre_tokenizer.pre_tokenize_str(text))
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) <= pre_tokens * 1.05


def test_the_same_texts_give_the_same_tokenizer():
    assert train_tokenizer(iter(TEXTS)).backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_saving_and_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "<|im_start|>user\nRow 1\u00a0<|latent_start|><|latent_pad|><|latent_end|><|im_end|>  x"
    assert loaded.encode(text) == TOKENIZER.encode(text) == encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == "user\nRow 1\u00a0  x"
    assert (len(loaded), special_tokens(loaded)) == (len(TOKENIZER), special_tokens(TOKENIZER))
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_special_tokens_have_their_ids():
    special = special_tokens(TOKENIZER)
    written = "<|endoftext|><|im_start|>assistant<|vision_start|><|image_pad|><|vision_end|>"
    written += "<|latent_start|><|latent_pad|><|latent_end|><|im_end|>"
    assert encode(written) == [
        *[special.pad, special.im_start, special.assistant, special.vision_start, special.image_pad],
        *[special.vision_end, special.latent_start, special.latent_pad, special.latent_end, special.im_end],
    ]
    assert len(set(encode(written))) == 10


def test_missing_special_tokens_are_named(tmp_path):
    plain = TOKENIZER.backend_tokenizer.to_str().replace("<|latent_pad|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(plain)
    with pytest.raises(ValueError, match=r"special tokens and the latent tokens, but lacks <\|latent_pad\|>$"):
        special_tokens(PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")))
    with pytest.raises(ValueError, match=r"must hold a tokenizer: tokenizer.json, or vocab.json and merges.txt"):
        load_tokenizer(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match='must encode "assistant" as one token, got 9'):
        special_tokens(train_tokenizer(TEXTS, vocabulary=265))


def test_published_tokenizer_gets_the_latent_tokens(tmp_path, published_processor):
    tokenizer = read_tokenizer(published_processor)
    with pytest.raises(ValueError, match=r"lacks <\|latent_start\|>, <\|latent_pad\|>, <\|latent_end\|>"):
        special_tokens(tokenizer)
    assert add_latent_tokens(tokenizer) == (151665, 151666, 151667) and len(tokenizer) == 151668
    assert add_latent_tokens(tokenizer) == ()
    special = special_tokens(tokenizer)
    assert (special.im_start, special.im_end, special.image_pad) == (151644, 151645, 151655)
    text = "".join(SPECIAL_TOKENS) + "assistant"
    assert len(tokenizer.backend_tokenizer.encode(text).ids) == len(SPECIAL_TOKENS) + 1
    assert (special.latent_start, special.latent_pad, special.latent_end) == (151665, 151666, 151667)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert special_tokens(again) == special and again.chat_template == tokenizer.chat_template
    assert add_latent_tokens(again) == ()


def test_latent_tokens_keep_the_ids_that_they_have_and_follow_all_others():
    published = train_tokenizer(TEXTS).backend_tokenizer.to_str()
    assert add_latent_tokens(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(published))) == ()
    without_pad = published.replace("<|latent_pad|>", "<|other|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(without_pad))
    size, start = len(tokenizer), tokenizer.convert_tokens_to_ids("<|latent_start|>")
    assert add_latent_tokens(tokenizer) == (size,) and len(tokenizer) == size + 1
    assert tokenizer.encode("<|latent_start|><|latent_pad|>") == [start, size]
