"""Stop tokens: those of transformers' `generate` with the same files, in both decoders and in exports."""

import json
import shutil

import pytest
import torch
import transformers

from ilvr_jax import convert
from ilvr_jax.checkpoints.pretrained import open_pretrained
from ilvr_jax.checkpoints.trained import load_model
from ilvr_jax.data.examples import build_prompt
from ilvr_jax.data.records import Record
from ilvr_jax.generate import Printer, main
from ilvr_jax.inference.engine import generate
from tests.decoding import make_request
from tests.published import VOCABULARY, save_published

NEW_TOKENS = 24
QUESTION = "up down left"
UNSET = object()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as `from-hf` and `to-hf` leave it: latent rows are the same for both sides."""
    folder = tmp_path_factory.mktemp("published")
    save_published(folder / "raw", dtype="float32")
    assert convert.main(["from-hf", str(folder / "raw"), str(folder / "converted")]) == 0
    assert convert.main(["to-hf", str(folder / "converted"), str(folder / "hf")]) == 0
    return folder / "hf"


def with_ids(published, folder, generation=UNSET, config=UNSET, tokenizer=None):
    """Return a copy of the checkpoint with these ids in its files, and without all others."""
    shutil.copytree(published, folder)
    (folder / "generation_config.json").unlink()
    if generation is not UNSET:
        text = json.dumps({"eos_token_id": generation, "pad_token_id": 0, "temperature": 1e-6, "do_sample": False})
        (folder / "generation_config.json").write_text(text)
    described = json.loads((folder / "config.json").read_text())
    described["text_config"]["eos_token_id"] = None if config is UNSET else config
    (folder / "config.json").write_text(json.dumps(described))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token", None)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"eos_token": tokenizer} if tokenizer else {}))
    )
    return folder


def answer_of(folder, **changes):
    """Return the model, the engine's answer and the prompt's tokens; `changes` are fields of a request."""
    trained = load_model(str(folder))
    prompt = build_prompt(Record(QUESTION, (), ()), trained.tokenizer, trained.special, trained.prompts)
    request = make_request(prompt, NEW_TOKENS, 4, **{"method": "text"} | changes)
    (answer,) = generate(trained.model, trained.params, [request], trained.special, trained.tokenizer)
    return trained, answer, prompt.tokens


def transformers_answer(folder, prompt, **settings):
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt.tolist()]), max_new_tokens=NEW_TOKENS, **settings)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("generation", "config", "length"),
    [([5, 316, 14], 162, 5), (UNSET, 170, 3)],  # the model writes these at places 4, 5 and 3
)
def test_answers_end_where_transformers_ends_them(published, tmp_path, capsys, generation, config, length):
    folder = with_ids(published, tmp_path / "model", generation, config)
    trained, answer, prompt = answer_of(folder)
    tokens = list(answer.tokens)
    assert tokens == transformers_answer(folder, prompt) and len(tokens) == length
    assert answer.stop_reason == "end"
    assert answer.text == trained.tokenizer.decode(tokens[:-1])
    Printer(trained).add(tokens)
    assert capsys.readouterr().out == trained.tokenizer.decode(tokens[:-1]).rstrip("\ufffd")


@pytest.mark.parametrize(
    ("ends", "sampling"),
    [
        ([5, 316, 14], {"min_new_tokens": 8}),
        ([300], {"repetition_penalty": 1.3}),
        ([5, 316, 14], {"repetition_penalty": 0.7, "min_new_tokens": 6}),
    ],
)
def test_penalties_and_least_lengths_are_those_of_transformers(published, tmp_path, ends, sampling):
    folder = with_ids(published, tmp_path / "model", ends, 162)
    _, plain, _ = answer_of(folder)
    _, answer, prompt = answer_of(folder, **sampling)
    assert list(answer.tokens) == transformers_answer(folder, prompt, **sampling)
    assert answer.tokens != plain.tokens and len(answer.tokens) >= sampling.get("min_new_tokens", 0)


def test_an_answer_ends_before_the_first_stop_string(published, tmp_path):
    folder = with_ids(published, tmp_path / "model")
    trained, plain, prompt = answer_of(folder)
    stop = plain.text[len(plain.text) // 2 :][:2]
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ids = model.generate(
        torch.tensor([prompt.tolist()]),
        max_new_tokens=NEW_TOKENS,
        stop_strings=[stop],
        tokenizer=trained.tokenizer,
        eos_token_id=None,
    )
    _, answer, _ = answer_of(folder, stop=("never", stop))
    assert answer.stop_reason == "stop" and list(answer.tokens) == ids[0, len(prompt) :].tolist()
    assert answer.text == answer.plain_text == plain.text[: plain.text.index(stop)]
    later = answer_of(folder, stop=(stop,), min_new_tokens=len(answer.tokens))[1]
    assert len(later.tokens) > len(answer.tokens)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (162, UNSET, (162,)),
        ([163, 14, 163], 162, (163, 14)),
        (UNSET, [317, 272], (317, 272)),
        (UNSET, 0, (0,)),
        (162, 151645, (162,)),
    ],
)
def test_ids_are_those_that_transformers_reads(published, tmp_path, generation, config, expected):
    folder = with_ids(published, tmp_path / "model", generation, config, "<|vision_end|>")
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).generation_config.eos_token_id
    assert set(theirs if isinstance(theirs, list) else [theirs]) == set(expected)
    assert open_pretrained(folder).stop == expected


@pytest.mark.parametrize(("generation", "config"), [(UNSET, UNSET), (None, UNSET), (UNSET, 151645), (151645, 151645)])
def test_the_tokenizers_end_is_taken_where_no_file_names_one(published, tmp_path, generation, config):
    """No one named 151645 for 320 tokens: transformers writes it where nothing was given."""
    pretrained = open_pretrained(with_ids(published, tmp_path / "model", generation, config, "<|vision_end|>"))
    assert pretrained.stop == (pretrained.tokenizer.convert_tokens_to_ids("<|vision_end|>"),)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids", [VOCABULARY, -1, "2", "<|im_end|>", True, 2.0, [], [2, None], [[2]], [2, 999999], {}])
def test_what_is_no_id_is_refused(published, tmp_path, capsys, file, ids):
    where = "generation" if file == "generation_config.json" else "config"
    folder = with_ids(published, tmp_path / "model", **{where: ids})
    assert main([str(folder), QUESTION]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and len(message) < 400
    assert f"`eos_token_id` in {folder / file} must be " in message and message.endswith("\n")
    assert ("below 320, the model's tokens" in message) == (ids in (VOCABULARY, [2, 999999]))


@pytest.mark.parametrize("content", ["[1]", "", "{", "null", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_file_is_named(published, tmp_path, capsys, content):
    folder = with_ids(published, tmp_path / "model", 2)
    (folder / "generation_config.json").write_text(content)
    assert main([str(folder), QUESTION]) == 2
    message = capsys.readouterr().err
    assert f"{folder / 'generation_config.json'} must" in message and message.count("\n") == 1


def test_a_converted_checkpoint_keeps_what_it_ends_with(published, tmp_path):
    source = with_ids(published, tmp_path / "model", [162, 14], 162)
    assert convert.main(["from-hf", str(source), str(tmp_path / "converted")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "converted"), str(tmp_path / "back")]) == 0
    generation, config = (
        json.loads((tmp_path / "back" / name).read_text()) for name in ("generation_config.json", "config.json")
    )
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["temperature"]) == ([162, 14], 0, 1e-6)
    assert config["text_config"]["eos_token_id"] == 162
