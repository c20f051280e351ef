"""Damage to the files beside the weights: each is read as it should be, or an error names the file."""

import json
import os
import random
import shutil

import pytest
from tokenizers import Tokenizer

from ilvr_jax.checkpoints.pretrained import open_pretrained
from ilvr_jax.data.tokenizer import read_tokenizer
from ilvr_jax.models.tensor_files import BadCheckpoint
from tests.published import save_published

FILES = {
    "config.json": None,  # as it is saved
    "tokenizer.json": None,
    "tokenizer_config.json": None,
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
    "added_tokens.json": {"<|im_end|>": 2},
    "chat_template.json": {"chat_template": "{{ messages }}"},
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": {"eos_token_id": [2, 0], "do_sample": False},
    "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136},
    "processor_config.json": {"image_processor": {"image_processor_type": "Qwen2VLImageProcessor"}},
    "video_preprocessor_config.json": {"fps": 2},
}
ROUNDS = 15  # of each file
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11421896\n"


def save(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_published(folder)
    for name, content in FILES.items():
        if content is not None:
            save(folder / name, content)
    return folder


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / "checkpoint")


def problem(folder) -> str | None:
    """Return the error for a checkpoint, None if it is opened."""
    try:
        open_pretrained(folder)
        return None
    except BadCheckpoint as error:
        assert len(str(error)) < 400 and str(error).isprintable()
        return str(error)


def test_a_whole_checkpoint_is_opened(folder):
    assert problem(folder) is None


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(folder, name):
    path = folder / name
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "pointer": POINTER,
        "binary": b"\xff\xfe" + whole,
        "list": b"[]",
        "number": b"3",
        "null": b"null",
        "text": b'"x"',
        "deep": b"[" * 10**5,
        "page": b"<!DOCTYPE html>\n<html>404</html>",
    }
    if name.endswith(".jinja"):  # any other text is a template
        contents = {kind: contents[kind] for kind in ("pointer", "binary")}
    for kind, content in contents.items():
        path.write_bytes(content)
        message = problem(folder)
        assert message and str(path) in message, (kind, message)
        assert ("git lfs pull" in message) == (kind == "pointer")
    for make in (
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("nothing"),
        lambda: path.symlink_to("/dev/zero"),
    ):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make()
        message = problem(folder)
        assert message and str(path) in message, message


def mutated(rng: random.Random, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 3, 30)))
        content[start:end] = rng.choice(
            (b"", rng.randbytes(3), b"null", b"[]", b"{}", b'"x"', b"-1", b"1e999", b",", content[start:end] * 2)
        )
    return bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_are_opened_or_named(folder, name):
    rng = random.Random(name)
    whole = (folder / name).read_bytes()
    messages = []
    for _ in range(ROUNDS):
        (folder / name).write_bytes(mutated(rng, whole))
        if message := problem(folder):
            assert name in message or str(folder) in message, message
            messages.append(message)
    assert name.endswith("jinja") or messages


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("tokenizer.json", {"model": {"type": "Transformer", "vocab": {}}}, "damaged or of a newer release"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Newer"}}, "damaged or of a newer release"),
        ("tokenizer.json", {"added_tokens": 3}, "tokenizer.json"),
        ("tokenizer_config.json", {"tokenizer_class": 3}, "tokenizer_config.json"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "tokenizer_config.json"),
        ("preprocessor_config.json", {"image_mean": "x"}, "image_mean"),
        ("preprocessor_config.json", {"image_mean": [0.5, "x", 0.5]}, "image_mean"),
        ("preprocessor_config.json", {"size": "large"}, "preprocessor_config.json"),
        ("preprocessor_config.json", {"max_pixels": "12845056"}, "two whole numbers in ascending order"),
        ("preprocessor_config.json", {"max_pixels": 0}, "two whole numbers in ascending order"),
        ("processor_config.json", {"image_processor": [1]}, "processor_config.json must hold an object"),
    ],
)
def test_objects_with_other_contents_are_named(folder, name, change, sentence):
    if name == "preprocessor_config.json":
        (folder / "processor_config.json").unlink()
    path = folder / name
    save(path, {**json.loads(path.read_text()), **change})
    message = problem(folder)
    assert message and sentence in message and name in message, message


def split(folder):
    """Replace a tokenizer's tokenizer.json by its older files."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    save(folder / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer.json").unlink()


@pytest.fixture
def qwen(published_processor, tmp_path):
    folder = tmp_path / "qwen"
    folder.mkdir()
    for path in published_processor.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


def test_a_tokenizer_in_parts_is_that_of_tokenizer_json(qwen):
    text = "Die Größe e\u0301 漢字🙂  of 123 maps\n\n<|im_start|>user <|image_pad|>"
    whole = Tokenizer.from_file(str(qwen / "tokenizer.json")).encode(text).ids
    split(qwen)
    assert read_tokenizer(qwen).backend_tokenizer.encode(text).ids == whole


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_damaged_part_of_a_tokenizer_is_named(folder, name):
    split(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    assert problem(folder) is None
    whole = (folder / name).read_bytes()
    for content in (
        b"",
        whole[: len(whole) // 2],
        whole[: whole.index(b"\n", 40) + 1] if b"\n" in whole else b"[]",
        POINTER,
    ):
        (folder / name).write_bytes(content)
        assert str(folder / name) in (problem(folder) or "")
    (folder / name).unlink()
    assert "must hold a tokenizer: tokenizer.json, or vocab.json and merges.txt" in problem(folder)


def test_parts_beside_a_whole_tokenizer_are_not_read(folder):
    (folder / "vocab.json").write_bytes(POINTER)
    os.mkfifo(folder / "merges.txt")
    assert problem(folder) is None
