"""The files and tensors of a folder that become a model: those that transformers loads, whatever else is there."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from ilvr_jax.checkpoints.pretrained import open_pretrained
from ilvr_jax.checkpoints.weights import load_params
from ilvr_jax.models.qwen2_5_vl.config import model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.qwen2_5_vl.weights import check_tensors, nested_name
from ilvr_jax.models.tensor_files import INDEX, WEIGHTS, BadCheckpoint, checkpoint_tensors
from tests.published import save_published

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "whole"
    save_published(folder, dtype="float32")
    save_published(folder.parent / "sharded", dtype="float32", shard="40KB")
    return folder


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / "checkpoint")


@pytest.fixture
def sharded(published, tmp_path):
    return shutil.copytree(published.parent / "sharded", tmp_path / "sharded")


def load(folder):
    pretrained = open_pretrained(folder)
    config = model_config_from_hf(pretrained.hf_config)
    return load_params(pretrained, config, "float32", jax.random.key(0))


@pytest.fixture(scope="module")
def model(published):
    """The shapes of the parameters, and their config."""
    config = model_config_from_hf(open_pretrained(published).hf_config)
    return jax.eval_shape(Qwen2_5VL(config).init, jax.random.key(0)), config


def final_norm(folder) -> float:
    """Return a weight that identifies a checkpoint."""
    return float(load(folder)["decoder"]["norm"]["weight"][0])


def theirs(folder) -> float:
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    return float(model.model.language_model.norm.weight.detach()[0])


@pytest.fixture
def check(model):
    """Return a function that opens a folder's weights, without reading them, and returns their names by ours."""
    return lambda folder: check_tensors(checkpoint_tensors(folder), *model)


@pytest.fixture
def refusal(check):
    """Return a function that returns the error for a folder's weights."""
    return lambda folder: sentence_of(check, folder)


def sentence_of(check, folder) -> str:
    with pytest.raises(BadCheckpoint) as error:
        check(folder)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    return str(error.value)


def rewrite(path, change):
    """Rewrite a file of tensors with `change`, which maps tensors by name to tensors by name."""
    save_file(change(load_file(path)), path)


def other_weights(folder, name):
    """Write the weights, with another norm, under another name."""
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, NORM: np.full_like(tensors[NORM], 9.0)}, folder / name)


@pytest.mark.parametrize(
    "names",
    [
        ("a.safetensors", "adapter_model.safetensors", "model_old.safetensors", "optimizer.safetensors"),
        ("consolidated.safetensors", "model-00001-of-00001.safetensors", "model.fp16.safetensors"),
    ],
)
def test_other_weights_beside_the_model_are_named_and_ignored(folder, capfd, names):
    for name in names:
        other_weights(folder, name)
    assert final_norm(folder) == theirs(folder) == 1.0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "ignored" in line]
    assert ", ".join(names) in line


def test_old_shards_and_their_index_beside_a_whole_file_are_ignored(folder, capfd):
    other_weights(folder, "model-00001-of-00001.safetensors")
    names = load_file(folder / WEIGHTS)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    assert final_norm(folder) == theirs(folder) == 1.0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "ignored" in line]
    assert "model-00001-of-00001.safetensors" in line and INDEX in line


def test_files_that_the_index_does_not_name_are_ignored(sharded, capfd):
    shard = next(iter(sharded.glob("model-*.safetensors")))
    shutil.copyfile(shard, sharded / "model-00001-of-00002.safetensors")
    shutil.copyfile(shard, sharded / "optimizer.pt")
    assert final_norm(sharded) == theirs(sharded) == 1.0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "ignored" in line]
    assert "model-00001-of-00002.safetensors, optimizer.pt" in line and INDEX not in line


def test_shards_may_be_links_as_in_the_hubs_cache(sharded, tmp_path, capfd):
    for path in list(sharded.glob("model-*.safetensors")):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        shutil.move(path, tmp_path / "blobs" / path.name)
        path.symlink_to(os.path.relpath(tmp_path / "blobs" / path.name, sharded))
    assert final_norm(sharded) == theirs(sharded) == 1.0
    assert "ignored" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["model_old.safetensors", "consolidated.safetensors", "model-00001-of-00002.safetensors"]
)
def test_weights_under_another_name_alone_are_refused(folder, name, refusal):
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(OSError):
        theirs(folder)
    assert f"must hold {WEIGHTS}, or {INDEX} and its files, but holds only {name}" in refusal(folder)


def index_of(folder) -> dict:
    return json.loads((folder / INDEX).read_text())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "an object with `weight_map`, files by tensor names, got []"),
        ([{"weight_map": {}}], "an object with `weight_map`"),
        ({}, "an object with `weight_map`"),
        ({"weight_map": {}}, "an object with `weight_map`"),
        ({"weight_map": ["model-00001-of-00002.safetensors"]}, "an object with `weight_map`"),
        ({"weight_map": "x" * 10**5}, "an object with `weight_map`"),
        (3, "an object with `weight_map`"),
        ({"weight_map": {NORM: "../other/model.safetensors"}}, "in a file of its own folder, but names '../other"),
        ({"weight_map": {NORM: "/etc/passwd"}}, "in a file of its own folder, but names '/etc/passwd'"),
        ({"weight_map": {NORM: 3}}, f"must place '{NORM}' in a file of its own folder, but names 3"),
        ({"weight_map": {NORM: None}}, "but names None"),
        ({"weight_map": {NORM: ""}}, "but names ''"),
        ({"weight_map": {NORM: "."}}, "model.safetensors.index.json names, but lacks "),
        ({"weight_map": {NORM: "a\0b"}}, "model.safetensors.index.json names, but lacks "),
        ({"weight_map": {NORM: "\ud800.safetensors"}}, "model.safetensors.index.json names, but lacks "),
        ({"weight_map": {NORM: "m" * 10**5}}, "model.safetensors.index.json names, but lacks "),
        ({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(900)}}, "and 895 more"),
        ({"weight_map": {NORM: "config.json"}}, "config.json must be a whole safetensors file"),
    ],
)
def test_a_damaged_index_is_named(sharded, content, sentence, refusal):
    (sharded / INDEX).write_text(json.dumps(content))
    message = refusal(sharded)
    assert sentence in message and str(sharded) in message


@pytest.mark.parametrize(
    "text", ["", "{", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "\xff"]
)
def test_an_index_that_is_no_json_is_named(sharded, text, refusal):
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    message = refusal(sharded)
    assert f"{sharded / INDEX} must be JSON" in message and ("git lfs pull" in message) == text.startswith("version")


def test_a_shard_that_lacks_a_tensor_of_the_index_is_named(sharded, refusal):
    shard = sharded / index_of(sharded)["weight_map"][NORM]
    rewrite(shard, lambda tensors: {name: value for name, value in tensors.items() if name != NORM})
    assert f"{shard} must hold what {INDEX} places in it, but lacks {NORM}" in refusal(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded, refusal):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    rewrite(second, lambda tensors: {**tensors, name: load_file(first)[name]})
    message = refusal(sharded)
    assert "must be in one file" in message and name in message and first.name in message and second.name in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[: len(content) // 2], "is truncated"),
        (lambda content: content[:40], "is truncated"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (lambda content: b"PK\x03\x04" + content, "is truncated or of another format"),
        (lambda content: content.replace(b'"F32"', b'"F99"'), "in it has the dtype 'F99'"),
        (lambda content: content.replace(b'"F32"', b'"F32 ', 1), "is truncated or of another format"),
    ],
    ids=["empty", "half", "header", "pointer", "zip", "dtype", "json"],
)
@pytest.mark.parametrize("shards", [False, True])
def test_a_damaged_file_of_weights_is_named(folder, sharded, content, problem, shards, refusal):
    where = sharded if shards else folder
    path = sorted(where.glob("model*.safetensors"))[0]
    path.write_bytes(content(path.read_bytes()))
    message = refusal(where)
    assert message.startswith(f"{path} must be a whole safetensors file, but ") and problem in message


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_what_is_no_regular_file_is_not_opened(folder, kind, refusal):
    path = folder / WEIGHTS
    path.unlink()
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nothing")}[kind]()
    assert f"{path} must be a regular file" in refusal(folder)


UP = "model.layers.0.mlp.up_proj."
FP8 = ml_dtypes.float8_e4m3fn


def quantised(parts):
    """Return the change that replaces a layer's weights by the parts of a quantised layer."""

    def change(tensors):
        del tensors[f"{UP}weight"]
        return {**tensors, **{UP + name: np.zeros((4, 4), dtype) for name, dtype in parts.items()}}

    return change


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"qweight": np.int32, "qzeros": np.int32, "scales": np.float16}, "those of AWQ"),
        ({"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32}, "those of GPTQ"),
        ({"weight": FP8, "weight_scale_inv": np.float32}, "those of fp8"),
        ({"weight": FP8, "weight_scale": np.float32, "input_scale": np.float32}, "those of fp8"),
        (
            {"weight": np.uint8, "weight.absmax": np.float32, "weight.quant_state.bitsandbytes__nf4": np.uint8},
            "those of bitsandbytes",
        ),
        ({"weight": np.int8, "SCB": np.float32}, "those of bitsandbytes"),
        ({"weight_packed": np.int32, "weight_scale": np.float16}, "those of compressed-tensors"),
        ({"weight": FP8}, rf"other than F64, F32, F16, BF16 in {UP}weight (F8_E4M3)"),
        ({"weight": np.int8}, f"{UP}weight (I8)"),
        ({"weight": np.uint8}, f"{UP}weight (U8)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_quantised_weights_are_called_so(folder, parts, sentence, prefix, refusal):
    change = quantised(parts)
    # The library's writer for numpy does not support fp8, that for torch does.
    tensors = {prefix + name: value for name, value in change(load_file(folder / WEIGHTS)).items()}
    import torch
    from safetensors.torch import save_file as save_torch_file

    def as_torch(value):
        return (
            torch.tensor(value.view(np.uint8)).view(torch.float8_e4m3fn) if value.dtype == FP8 else torch.tensor(value)
        )

    save_torch_file({name: as_torch(value) for name, value in tensors.items()}, folder / WEIGHTS)
    assert sentence in refusal(folder)


def test_tensors_of_eight_bytes_are_read_as_well(folder):
    rewrite(folder / WEIGHTS, lambda tensors: {name: value.astype(np.float64) for name, value in tensors.items()})
    assert final_norm(folder) == theirs(folder) == 1.0


def renamed(rename):
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "base_model.model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "base_model.model.module.",
        "module.base_model.model.",
        "_orig_mod.base_model.model._orig_mod.",
        "_forward_module.",
        "pretrained_model.",
        "actor.module.",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_prefixes_of_training_are_stripped(folder, check, prefix, nested, capfd):
    whole = check(folder)
    if nested:
        rewrite(folder / WEIGHTS, renamed(nested_name))
    rewrite(folder / WEIGHTS, renamed(lambda name: prefix + name))
    names = {name: prefix + (nested_name(name) if nested else name) for name in whole}
    assert check(folder) == names and open_pretrained(folder).nested == nested
    assert "ignored" not in capfd.readouterr().err


def test_weights_under_prefixes_are_the_same(folder):
    whole = load(folder)
    rewrite(folder / WEIGHTS, renamed(lambda name: f"module.base_model.model.{nested_name(name)}"))
    jax.tree.map(np.testing.assert_array_equal, load(folder), whole)


def test_a_checkpoint_of_the_model_without_its_head_is_read_as_transformers_does(folder):
    """`Qwen2_5_VLModel.save_pretrained` writes no `model.` in front; the head is then tied, or missing."""
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder / WEIGHTS, lambda tensors: {n: tensor for n, tensor in tensors.items() if n != "lm_head.weight"})
    whole = load(folder)
    rewrite(folder / WEIGHTS, renamed(lambda name: nested_name(name).removeprefix("model.")))
    jax.tree.map(np.testing.assert_array_equal, load(folder), whole)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="float32")
    weight = theirs.model.language_model.layers[1].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(weight.T, whole["decoder"]["layers"]["mlp"]["up_proj"]["kernel"][1])


def test_a_prefix_that_is_not_known_is_in_the_sentence(folder, refusal):
    rewrite(folder / WEIGHTS, renamed(lambda name: f"policy.net.{name}"))
    message = refusal(folder)
    assert "lacks" in message and "has besides policy.net." in message and len(message) < 400


def test_compiled_modules_inside_the_model_are_found(folder, check):
    whole = check(folder)
    rewrite(folder / WEIGHTS, renamed(lambda name: name.replace("layers.1.", "layers.1._orig_mod.")))
    assert check(folder).keys() == whole.keys()


def test_a_tensor_under_two_names_is_refused(folder, refusal):
    rewrite(folder / WEIGHTS, lambda tensors: {**tensors, f"module.{NORM}": tensors[NORM]})
    assert f"must hold a tensor once, but has '{NORM}' and 'module.{NORM}'" in refusal(folder)


def test_weights_with_adapters_inside_are_refused(folder, refusal):
    def adapted(tensors):
        tensors[f"{UP}base_layer.weight"] = tensors.pop(f"{UP}weight")
        return {**tensors, f"{UP}lora_A.default.weight": np.zeros((2, 32), np.float32)}

    rewrite(folder / WEIGHTS, adapted)
    assert "has LoRA adapters beside them" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.language_model.rotary_emb.inv_freq",
        "visual.rotary_pos_emb.inv_freq",
        "lvr_head.0.weight",
        "model.lvr_head.weight",
        "latent_head.weight",
        "value_head.summary.bias",
        "v_head.weight",
        "score.weight",
        "model.latent_projector.2.bias",
    ],
)
def test_harmless_tensors_are_named_and_ignored(folder, check, capfd, name):
    rewrite(folder / WEIGHTS, lambda tensors: {**tensors, name: np.zeros(3, np.float32)})
    check(folder)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "ignored" in line]
    assert name.replace("language_model.", "") in line


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.1.mlp.up_proj.bias",
        "model.layers.0.post_feedforward_layernorm.weight",
        "model.layers.7.mlp.up_proj.weight",
        "model.layers.0.lvr_head.weight",
        "model.norm.bias",
        "model.embed_positions.weight",
        "visual.pos_embed.weight",
        "visual.merger.ln_q.bias",
        "visual.blocks.0.attn.q_norm.weight",
        "lm_head.bias",
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_tensors_of_another_architecture_are_refused_by_name(folder, name, prefix, refusal):
    rewrite(folder / WEIGHTS, lambda tensors: renamed(prefix.__add__)({**tensors, name: np.zeros(3, np.float32)}))
    assert refusal(folder).endswith(f"but has besides {name}")


def test_at_most_five_tensors_are_named(folder, refusal):
    rewrite(folder / WEIGHTS, renamed(lambda name: name.replace("layers.", "blocks_of_layers.")))
    assert "and 34 more" in refusal(folder)
    rewrite(folder / WEIGHTS, renamed(lambda name: f"visual.{name}"))
    message = refusal(folder)
    assert "lacks" in message and "has besides" in message and message.count("more") == 2


@pytest.mark.parametrize("whole", [True, False])
def test_only_what_is_loaded_is_fetched_from_the_hub(monkeypatch, folder, sharded, tmp_path, whole):
    """A repository with shards, alone or beside a whole file; files are copied as the hub's client picks them."""
    from huggingface_hub.utils import filter_repo_objects

    (sharded / "run-500").mkdir()
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "optimizer.pt", "run-500/model.safetensors"):
        (sharded / name).write_bytes(b"")
    (sharded / "run-500" / "trainer_state.json").write_text("{}")
    if whole:
        shutil.copyfile(folder / WEIGHTS, sharded / WEIGHTS)
    cache = tmp_path / "cache"

    def download(name, **patterns):
        paths = [str(path.relative_to(sharded)) for path in sharded.rglob("*") if path.is_file()]
        for path in filter_repo_objects(paths, **patterns):
            (cache / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sharded / path, cache / path)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    open_pretrained(name, weights=False)
    assert not list(cache.glob("**/*.safetensors")) and (cache / "tokenizer.json").is_file()
    assert final_norm(name) == 1.0
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    assert sorted(path.name for path in cache.rglob("*.safetensors")) == ([WEIGHTS] if whole else shards)
    assert not (cache / "run-500").exists() and not (cache / "optimizer.pt").exists()


def test_a_config_that_names_other_weights_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(BadCheckpoint, match="must not have `transformers_weights`, got 'other.safetensors'"):
        open_pretrained(folder)
