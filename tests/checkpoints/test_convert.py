"""Conversion of checkpoints: bit for bit as transformers saves them, and one-sentence errors for anything else."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ilvr_jax import convert
from ilvr_jax.checkpoints.pretrained import keep_description, open_pretrained
from ilvr_jax.checkpoints.runs import build_run_model
from ilvr_jax.checkpoints.weights import load_params
from ilvr_jax.config.experiments import parse
from ilvr_jax.config.workdir import read_config, to_json
from ilvr_jax.data.examples import build_prompt
from ilvr_jax.data.records import Record
from ilvr_jax.data.sources import prompt_settings
from ilvr_jax.data.tokenizer import LATENT_TOKENS, load_tokenizer, special_tokens
from ilvr_jax.files import locked_folder
from ilvr_jax.models.attention import causal_mask
from ilvr_jax.models.qwen2_5_vl.config import model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.qwen2_5_vl.weights import nested_name
from ilvr_jax.models.tensor_files import BadCheckpoint, TensorToWrite, weight_files, write_tensors
from tests.published import VOCABULARY, read_all, save_published
from tests.samples import GEOMETRY, tiny_config, untrained_run


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shard", "tied", "dtype"), [("5GB", False, "bfloat16"), ("40KB", True, "float32")])
def test_a_round_trip_is_bit_identical(tmp_path, nested, shard, tied, dtype):
    save_published(tmp_path / "published", nested, shard, tied, dtype)
    theirs = read_all(tmp_path / "published")
    assert any(name.startswith("model.language_model.") for name in theirs) == nested
    assert (len(weight_files(tmp_path / "published")) > 1) == (shard == "40KB")
    assert convert.main(["from-hf", str(tmp_path / "published"), str(tmp_path / "ours")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    back = read_all(tmp_path / "back")
    assert back.keys() == theirs.keys()
    latent = open_pretrained(tmp_path / "published").added
    for name, tensor in theirs.items():
        assert back[name].dtype == tensor.dtype
        used = np.ones(len(tensor), bool)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            used[list(latent)] = False  # spare rows, which now are the latent tokens'
        np.testing.assert_array_equal(back[name][used].view(np.uint8), tensor[used].view(np.uint8), err_msg=name)


def test_latent_tokens_get_the_mean_of_the_rows_in_use(tmp_path):
    save_published(tmp_path / "published")
    pretrained = open_pretrained(tmp_path / "published")
    first = min(pretrained.added)
    assert pretrained.added == tuple(range(first, first + 3)) and first + 3 == len(pretrained.tokenizer) <= VOCABULARY
    config = model_config_from_hf(pretrained.hf_config)
    params = load_params(pretrained, config, "float32", jax.random.key(0))
    theirs = read_all(tmp_path / "published")
    for ours, name in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        expected = theirs[name][:first].astype(np.float32).mean(0)
        expected = expected.astype(theirs[name].dtype).astype(np.float32)  # the same in whatever dtype it is loaded
        for row in pretrained.added:
            np.testing.assert_allclose(params["decoder"][ours][row], expected, atol=1e-6)
        np.testing.assert_array_equal(params["decoder"][ours][:first], theirs[name][:first].astype(np.float32))


def test_rows_are_added_where_none_is_spare(tmp_path):
    model = save_published(tmp_path / "published", dtype="float32")
    rows = len(open_pretrained(tmp_path / "published").tokenizer) - 3
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "published")
    assert convert.main(["from-hf", str(tmp_path / "published"), str(tmp_path / "ours")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    tensors = read_all(tmp_path / "back")
    assert tensors["lm_head.weight"].shape == (rows + 3, 32)
    back = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert back.config.get_text_config().vocab_size == rows + 3
    # So are the checkpoints of the published ILVR and Mirage code: latent tokens, fields of their own, no spare row.
    again = open_pretrained(tmp_path / "back")
    assert again.added == () and len(again.tokenizer) == rows + 3 and "latent_token_id" in again.hf_config
    assert convert.main(["from-hf", str(tmp_path / "back"), str(tmp_path / "again")]) == 0


def their_logits(folder, ids):
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return theirs(input_ids=torch.tensor([ids])).logits.numpy()


def our_logits(folder, ids):
    pretrained = open_pretrained(folder)
    config = model_config_from_hf(pretrained.hf_config)
    model, params = Qwen2_5VL(config), load_params(pretrained, config, "float32", jax.random.key(0))
    inputs = model.embed(params["decoder"], np.array([ids]))
    positions = np.broadcast_to(np.arange(len(ids)), (1, 3, len(ids)))
    hidden, _ = model.decode(params["decoder"], inputs, positions, causal_mask(np.ones((1, len(ids)), bool)))
    return model.logits(params["decoder"], hidden)


YARN = {"type": "yarn", "mrope_section": [1, 1, 2], "factor": 4, "original_max_position_embeddings": 8}


@pytest.mark.parametrize("rope", [None, YARN], ids=["default", "yarn"])
def test_transformers_opens_what_is_written_with_the_same_logits(tmp_path, rope):
    save_published(tmp_path / "published", dtype="float32")
    if rope:
        config = json.loads((tmp_path / "published" / "config.json").read_text())
        config["text_config"] |= {"rope_scaling": rope, "rope_parameters": None}
        (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    assert convert.main(["from-hf", str(tmp_path / "published"), str(tmp_path / "ours")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    ids = tokenizer("up down<|latent_start|><|latent_pad|><|latent_end|>left" * 3)["input_ids"]
    assert len(tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))) == 3
    theirs = transformers.Qwen2_5_VLConfig.from_pretrained(tmp_path / "back")
    assert theirs.latent_token_id == tokenizer.convert_tokens_to_ids("<|latent_pad|>")
    assert theirs.text_config.rope_parameters["rope_type"] == ("yarn" if rope else "default")
    expected = their_logits(tmp_path / "back", ids)
    np.testing.assert_allclose(our_logits(tmp_path / "ours", ids), expected, atol=2e-4)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("nested", [False, True])
def test_a_head_of_its_own_is_used_whatever_the_config_ties(tmp_path, capsys, nested):
    published, embedding = tmp_path / "published", f"model.{'language_model.' * nested}embed_tokens.weight"
    save_published(published, nested, tied=True, dtype="float32")
    head = np.random.default_rng(0).standard_normal((VOCABULARY, 32)).astype(np.float32)
    change_tensors(published, lambda tensors: tensors.update({"lm_head.weight": head}))
    pretrained = open_pretrained(published)
    sentence = capsys.readouterr().err
    assert "config.json has `tie_word_embeddings` true, but lm_head.weight differs" in sentence
    ids, used = [3, 9, 2, 20, 4], min(pretrained.added)
    expected = their_logits(published, ids)[..., :used]
    np.testing.assert_allclose(our_logits(published, ids)[..., :used], expected, atol=2e-4)
    assert convert.main(["from-hf", str(published), str(tmp_path / "ours")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    np.testing.assert_array_equal(read_all(tmp_path / "back")["lm_head.weight"][:used], head[:used])
    capsys.readouterr()
    np.testing.assert_allclose(their_logits(tmp_path / "back", ids)[..., :used], expected, atol=2e-4)
    assert "tie" not in capsys.readouterr().err
    # A run that begins from it is built with the head, and when it is opened again, from what it keeps.
    config = tiny_config()
    config.model = {"init_from": str(published), "frozen_dtype": "float32"}
    keep_description(pretrained, tmp_path / "kept")
    for folder, description in ((published, pretrained.hf_config), (tmp_path / "kept", None)):
        model = build_run_model(parse(config), folder, pretrained.tokenizer, description)
        assert not model.config.tie_word_embeddings
    assert embedding in read_all(published)


def test_equal_or_single_tensors_are_tied_without_a_word(tmp_path, capsys):
    save_published(tmp_path / "published", tied=True, dtype="float32")
    ids = [3, 9, 2, 20, 4]
    used, expected = min(open_pretrained(tmp_path / "published").added), their_logits(tmp_path / "published", ids)

    def copy_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    for change in (copy_head, lambda tensors: tensors.pop("model.embed_tokens.weight")):
        change_tensors(tmp_path / "published", change)
        capsys.readouterr()
        assert model_config_from_hf(open_pretrained(tmp_path / "published").hf_config).tie_word_embeddings
        found = our_logits(tmp_path / "published", ids)[..., :used]
        assert not capsys.readouterr().err
        np.testing.assert_allclose(found, expected[..., :used], atol=2e-4)
        np.testing.assert_array_equal(their_logits(tmp_path / "published", ids), expected)


def test_a_head_that_is_not_there_is_named(tmp_path, capsys):
    save_published(tmp_path / "published")
    change_tensors(tmp_path / "published", lambda tensors: tensors.pop("lm_head.weight"))
    assert convert.main(["from-hf", str(tmp_path / "published"), str(tmp_path / "ours")]) == 2
    assert "lacks lm_head.weight" in capsys.readouterr().err


@pytest.mark.parametrize(("named", "dtype"), [("auto", "bfloat16"), (None, "bfloat16"), ("fp16", "float16")])
def test_a_dtype_of_any_name_or_none_is_kept_in_and_out(tmp_path, named, dtype):
    save_published(tmp_path / "published", dtype="bfloat16")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    for section in (config, config["text_config"], config["vision_config"]):
        section.pop("dtype", None)
    (tmp_path / "published" / "config.json").write_text(json.dumps({**config, "torch_dtype": named}))
    assert open_pretrained(tmp_path / "published").dtype == dtype
    assert convert.main(["from-hf", str(tmp_path / "published"), str(tmp_path / "ours")]) == 0
    assert open_pretrained(tmp_path / "ours").dtype == dtype
    assert convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert {str(tensor.dtype) for tensor in read_all(tmp_path / "back").values()} == {dtype}
    theirs = transformers.Qwen2_5_VLConfig.from_pretrained(tmp_path / "back")
    assert str(theirs.dtype) == f"torch.{dtype}"


def damaged(folder, how):
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = load_file(weights)
    if how == "missing":
        del tensors["model.norm.weight"]
    elif how == "extra":
        tensors["model.layers.7.norm.weight"] = np.zeros(3, ml_dtypes.bfloat16)
    elif how == "misshapen":
        tensors["visual.merger.mlp.0.bias"] = np.zeros(5, ml_dtypes.bfloat16)
    save_file(tensors, weights)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "empty":
        weights.unlink()
    elif how == "architecture":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "image token":
        (folder / "config.json").write_text(json.dumps({**config, "image_token_id": 0}))
    elif how == "index":
        weights.unlink()
        index = {"weight_map": {name: "model-00001-of-00002.safetensors" for name in tensors}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "tokenizer":
        for section in (config, config.get("text_config", {})):
            section |= {"vocab_size": 100} if "vocab_size" in section else {}
        (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_published(folder)
    return folder


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing", "must have the tensors of its config.json, but lacks model.norm.weight$"),
        ("extra", "has besides model.layers.7.norm.weight$"),
        ("misshapen", r"another shape in visual.merger.mlp.0.bias \(\[5\] in place of \[64\]\)"),
        ("truncated", "model.safetensors must be a whole safetensors file, but is truncated"),
        (
            "pickle",
            r"must hold model.safetensors, .* its weights are pickled \(pytorch_model.bin\), which can run any code",
        ),
        ("empty", r"must hold model.safetensors, or .* but holds no weights"),
        ("architecture", "must have the `model_type` 'qwen2_5_vl', got 'llama'"),
        ("image token", r"config.json: `image_token_id` must be the id of <\|image_pad\|>, got 0, that of"),
        ("no config", "has no config.json"),
        ("index", "must hold all files that .* names, but lacks model-00001-of-00002.safetensors"),
        ("tokenizer", r"must have an embedding row for each token, but has \d+ tokens and 100 rows"),
    ],
)
def test_what_is_no_checkpoint_is_refused(published, tmp_path, capsys, how, sentence):
    shutil.copytree(published, tmp_path / "damaged")
    damaged(tmp_path / "damaged", how)
    assert convert.main(["from-hf", str(tmp_path / "damaged"), str(tmp_path / "ours")]) == 2
    message = capsys.readouterr().err
    assert re.search(sentence, message), message
    assert message.count("\n") == 1
    assert not (tmp_path / "ours").exists()


def test_two_conversions_into_one_folder_are_refused(published, tmp_path, capsys):
    with locked_folder(tmp_path):
        assert convert.main(["from-hf", str(published), str(tmp_path)]) == 2
    assert f"{tmp_path} is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_name_that_cannot_be_fetched_says_how_to_give_a_folder(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(BadCheckpoint, match="without a network, give the folder"):
        open_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")


FILLED = """
import resource, sys
from ilvr_jax import convert
published, ours, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
assert convert.main(["from-hf", published, out]) == 1
assert convert.main(["to-hf", ours, out]) == 1
"""


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(published, tmp_path):
    assert convert.main(["from-hf", str(published), str(tmp_path / "ours")]) == 0
    arguments = [sys.executable, "-c", FILLED, str(published), str(tmp_path / "ours"), str(tmp_path / "out" / "new")]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    for line in lines:
        assert re.fullmatch(rf"no disk space to write {tmp_path}/out/new\S* \(.*\); free some and .*", line)
    assert not (tmp_path / "out" / "new").exists()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: Error writing x: [OS error 28: ENOSPC No space left on device]"),
        Exception("No space left on device (os error 28)"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
    ids=["orbax", "tokenizers", "system"],
)
@pytest.mark.parametrize("what", ["tokenizer", "params"])
def test_a_full_disk_is_recognised_in_the_words_of_each_writer(published, tmp_path, monkeypatch, capsys, error, what):
    def fill(*_, **__):
        raise error

    names = {
        "tokenizer": "transformers.PreTrainedTokenizerFast.save_pretrained",
        "params": "orbax.checkpoint.Checkpointer.save",
    }
    monkeypatch.setattr(names[what], fill)
    (tmp_path / "out").mkdir()
    assert convert.main(["from-hf", str(published), str(tmp_path / "out")]) == 1
    assert re.match("no disk space to write .*; free some and repeat the command\n$", capsys.readouterr().err)
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_is_too_small_is_found_out_before(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert convert.main(["from-hf", str(published), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"no disk space to write {tmp_path / 'out'} ")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_what_is_not_finished_is_removed(published, tmp_path, monkeypatch, error):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", stop)
    with contextlib.suppress(ZeroDivisionError):
        assert convert.main(["from-hf", str(published), str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("destination", "sentence"),
    [
        ("full", "full must be a new or empty folder, but is not empty"),
        ("file", "file must be a new or empty folder, but is a file"),
        ("fifo", "fifo must be a new or empty folder, but is a device, FIFO, socket or broken link"),
        ("broken", "broken must be a new or empty folder, but is a device, FIFO, socket or broken link"),
        ("/dev/null", "/dev/null must be a new or empty folder, but is a device, FIFO, socket or broken link"),
        ("file/new", "Not a directory"),
        ("n" * 300, "File name too long"),
        ("/proc/new", "cannot be read or written"),
    ],
)
def test_destinations_that_cannot_be_written_are_named(published, tmp_path, capsys, destination, sentence):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to("nothing")
    os.mkfifo(tmp_path / "fifo")
    assert convert.main(["from-hf", str(published), str(tmp_path / destination)]) == 2
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1 and len(message.strip()) < 400
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]


def test_large_checkpoints_are_cut_into_files_with_an_index(tmp_path):
    tensors = {f"t{number}": np.full((number + 1, 4), number, np.float32) for number in range(6)}
    to_write = [TensorToWrite(name, "float32", tensor.shape, tensor.copy) for name, tensor in tensors.items()]
    write_tensors(to_write, tmp_path, shard_bytes=100)
    assert len(weight_files(tmp_path)) > 2
    back = read_all(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
    with safe_open(next(iter(weight_files(tmp_path))), framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_names_of_both_schemes():
    assert nested_name("model.layers.0.mlp.up_proj.weight") == "model.language_model.layers.0.mlp.up_proj.weight"
    assert nested_name("visual.blocks.1.attn.qkv.bias") == "model.visual.blocks.1.attn.qkv.bias"
    assert nested_name("lm_head.weight") == "lm_head.weight"


JINJA = "{% for message in messages %}[{{ message['role'] }}: {{ message['content'] }}]{% endfor %}"
CONVERSATION = [{"role": "user", "content": "up"}]


def with_template(folder, place):
    """Write a chat template to where published checkpoints have one."""
    if place == "chat_template.jinja":
        (folder / place).write_text(JINJA)
    elif place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": JINJA}))
    else:
        config = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps({**config, "chat_template": JINJA}))


def rendered(folder) -> list[str | None]:
    """Return a conversation formatted by the tokenizer's and by the processor's template, None without one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    templates = [tokenizer.chat_template]
    templates.append(transformers.Qwen2_5_VLProcessor.get_processor_dict(str(folder))[0].get("chat_template"))
    return [
        tokenizer.apply_chat_template(CONVERSATION, chat_template=template, tokenize=False) if template else None
        for template in templates
    ]


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_chat_templates_survive_both_ways(published, tmp_path, place):
    shutil.copytree(published, tmp_path / "published")
    with_template(tmp_path / "published", place)
    for name in ("generation_config.json", "video_preprocessor_config.json"):
        (tmp_path / "published" / name).write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert convert.main(["from-hf", str(tmp_path / "published"), str(tmp_path / "ours")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    expected = rendered(tmp_path / "published")
    assert "[user: up]" in expected
    # A template of the tokenizer's config gets a file of its own, which the processor reads as well.
    assert rendered(tmp_path / "back") == ([expected[0]] * 2 if place == "tokenizer_config.json" else expected)
    assert (tmp_path / "back" / "video_preprocessor_config.json").is_file()


def test_a_run_from_nothing_goes_out_with_the_template_that_it_was_trained_on(tmp_path):
    workdir = untrained_run(tmp_path / "run")
    config = read_config(workdir)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, system="Be brief."))
    (workdir / "config.json").write_text(to_json(config))
    assert convert.main(["to-hf", str(workdir), str(tmp_path / "out")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    own = load_tokenizer(workdir / "tokenizer")
    ours = build_prompt(
        Record("up", (), (), name="x"),
        own,
        special_tokens(own),
        dataclasses.replace(prompt_settings(config, GEOMETRY), question=None),
    )
    assert theirs == ours.tokens.tolist()
