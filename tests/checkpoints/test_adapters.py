"""Adapters of PEFT: merged as PEFT merges them, trained further, exported and opened again; others are refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from ilvr_jax import convert, generate
from ilvr_jax.checkpoints.adapters import read_adapter
from ilvr_jax.checkpoints.pretrained import open_pretrained
from ilvr_jax.checkpoints.weights import load_params
from ilvr_jax.config.schema import LORA_TARGETS, LoraConfig
from ilvr_jax.models.attention import causal_mask
from ilvr_jax.models.lora import decoder_params, merge_adapters
from ilvr_jax.models.qwen2_5_vl.config import model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.models.qwen2_5_vl.weights import flat_name, state_dict_from_params
from ilvr_jax.models.tensor_files import BadCheckpoint
from tests.published import VOCABULARY, save_published

NO_LORA = LoraConfig()
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints with separate and with tied embedding and head."""
    folder = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        save_published(folder / f"tied {tied}", dtype="float32", tied=tied)
    return {tied: folder / f"tied {tied}" for tied in (False, True)}


@pytest.fixture(scope="module")
def base(bases):
    return bases[False]


def open_base(folder):
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model


def save_adapter(base, folder, resized=0, **settings):
    """Save an adapter of PEFT with random matrices, and return PEFT's model opened from it."""
    model = open_base(base)
    if resized:
        model.resize_token_embeddings(resized)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **settings}))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            with torch.no_grad():
                parameter.add_(0.2 * torch.rand_like(parameter))
    adapted.save_pretrained(folder, save_embedding_layers=resized and "modules_to_save" not in settings)
    again = open_base(base)
    if resized:
        again.resize_token_embeddings(resized)
    return peft.PeftModel.from_pretrained(again, folder)


def ours(name, lora=NO_LORA):
    """Return the opened checkpoint, its shape, its parameters, and their tensors as published."""
    pretrained = open_pretrained(name)
    config = dataclasses.replace(model_config_from_hf(pretrained.hf_config), lora=lora)
    config = dataclasses.replace(config, vocab_size=max(config.vocab_size, len(pretrained.tokenizer)))
    params = load_params(pretrained, config, "float32", jax.random.key(0))
    merged = merge_adapters(params, lora) if lora.rank else params
    return pretrained, config, params, {one.name: one.make() for one in state_dict_from_params(merged, config)}


def logits(config, params, ids):
    model = Qwen2_5VL(config)
    decoder = decoder_params(params)
    positions = np.broadcast_to(np.arange(len(ids)), (1, 3, len(ids)))
    mask = causal_mask(np.ones((1, len(ids)), bool))
    return model.logits(decoder, model.decode(decoder, model.embed(decoder, np.array([ids])), positions, mask)[0])


def same_logits(theirs, config, params):
    """Assert that our model has the logits of PEFT's, with unmerged adapters, on tokens that both have."""
    ids = list(range(2, 40))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(logits(config, params, ids)[..., :200], expected[..., :200], atol=1e-4)


def same_tensors(theirs, ours, rows_apart=()):
    """Assert that PEFT's merged model has our tensors, except rows of latent tokens."""
    theirs = {flat_name(name): tensor.numpy() for name, tensor in theirs.state_dict().items()}
    assert ours.keys() - theirs.keys() == set()
    for name, tensor in ours.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and len(rows_apart):
            tensor, other = np.delete(tensor, rows_apart, 0), np.delete(theirs[name], rows_apart, 0)
        else:
            other = theirs[name]
        np.testing.assert_allclose(tensor, other, atol=1e-5, err_msg=name)


SUPPORTED = {
    "list": {"target_modules": ATTENTION, "init_lora_weights": "gaussian", "fan_in_fan_out": True},
    "all-linear": {"target_modules": "all-linear", "bias": "none"},
    "vision": {"target_modules": ["qkv", "attn.proj", "merger.mlp.0", "patch_embed.proj"]},
    "regex, rslora and patterns": {
        "target_modules": r"model\.language_model.*\.(q_proj|k_proj|v_proj|up_proj)",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 7},
        "alpha_pattern": {"^model.language_model.layers.0.self_attn.v_proj": 3, "up_proj": 1.5},
    },
    "dora": {"target_modules": ["q_proj", "down_proj", "qkv"], "use_dora": True, "exclude_modules": r".*layers\.1\..*"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "merger", "norm"]},
    "tied, head and embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tied, embedding alone": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head's matrices": {"target_modules": ["q_proj", "lm_head"]},
    "more tokens": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "resized": 333},
    "tied, more tokens": {"target_modules": ["q_proj"], "resized": 333},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SUPPORTED)
def test_weights_are_those_that_peft_merges(bases, tmp_path, kind):
    theirs = save_adapter(bases[kind.startswith("tied")], tmp_path / "adapter", **SUPPORTED[kind])
    pretrained, config, _, tensors = ours(tmp_path / "adapter")
    assert config.tie_word_embeddings == (kind == "tied, more tokens")
    assert config.vocab_size == SUPPORTED[kind].get("resized", VOCABULARY)
    same_tensors(theirs.merge_and_unload(), tensors, pretrained.added)


def test_a_tied_head_with_matrices_of_its_own_leaves_the_embedding_as_it_is(bases, tmp_path):
    """PEFT's own merge would change both."""
    theirs = save_adapter(bases[True], tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    pretrained, _, _, tensors = ours(tmp_path / "adapter")
    head, kept = theirs.base_model.model.lm_head, np.delete(np.arange(VOCABULARY), pretrained.added)
    embedding = head.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"][kept], embedding[kept])
    expected = embedding + head.get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(tensors["lm_head.weight"][kept], expected[kept], atol=1e-6)


@pytest.fixture(scope="module")
def whole_decoder(base, tmp_path_factory):
    """An adapter of all linear layers of the decoder, like our own, and PEFT's model with it."""
    folder = tmp_path_factory.mktemp("whole")
    targets = rf".*language_model.*\.({'|'.join(LORA_TARGETS)})"
    return folder, save_adapter(base, folder, r=4, lora_alpha=8, target_modules=targets)


def rewritten(source, folder, change=None, rename=None, tensors=None):
    """Copy an adapter with changed fields, names or tensors."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | (change or {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {rename(name) if rename else name: tensor for name, tensor in weights.items()}
    if tensors:
        tensors(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


SPELLINGS = {
    "older transformers": lambda name: name.replace("model.model.language_model.", "model.model."),
    "without a head": lambda name: name.replace("model.model.language_model.", "model.language_model."),
    "text model alone": lambda name: name.replace("base_model.model.model.language_model.", "base_model.model."),
    "named adapter": lambda name: name.replace(".weight", ".default.weight"),
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_are_read_in_all_their_spellings(whole_decoder, tmp_path, spelling):
    plain = read_adapter(whole_decoder[0])
    other = read_adapter(rewritten(whole_decoder[0], tmp_path / "adapter", rename=SPELLINGS[spelling]))
    assert other.layers.keys() == plain.layers.keys() and len(plain.layers) == 3 * 7
    assert other.continues(LoraConfig(4, 8.0), 3) and not other.replaced


def test_an_adapter_is_trained_further_where_the_settings_fit(whole_decoder, capsys):
    folder, theirs = whole_decoder
    *_, merged = ours(folder)
    for lora in (LoraConfig(4, 8.0), LoraConfig(4, 32.0), LoraConfig(3, 8.0), LoraConfig(4, 8.0, targets=("q_proj",))):
        _, config, params, tensors = ours(folder, lora)
        second = [leaf for keys, leaf in jax.tree.leaves_with_path(params["adapters"]) if keys[-1].key == "b"]
        continued = any(np.abs(leaf).max() > 0 for leaf in second)
        assert continued == (lora.rank == 4 and lora.targets == LORA_TARGETS)
        assert ("trains fresh ones on top of it" in capsys.readouterr().err) != continued
        for name, tensor in tensors.items():
            np.testing.assert_allclose(tensor, merged[name], atol=1e-6)
        if lora.alpha == 32:
            same_logits(theirs, config, params)


def change_tensors(how):
    def change(weights):
        first, second = sorted(weights)[:2]
        if how == "missing matrix":
            del weights[second]
        elif how == "missing layer":
            del weights[first], weights[second]
        elif how == "empty":
            weights.clear()
        elif how == "rank":
            weights[first] = weights[first][:3]
        elif how == "inputs":
            weights[first] = weights[first][:, :-1].copy()
        elif how == "outputs":
            weights[second] = weights[second][:-1].copy()
        elif how == "integers":
            weights[first] = weights[first].astype(np.int32)
        elif how == "twice":
            weights[first.replace(".weight", ".default.weight")] = weights[first]
        elif how == "bias":
            weights[first.replace(".lora_A.weight", ".bias")] = np.zeros(3, np.float32)
        elif how == "embedding":
            weights["base_model.model.model.language_model.embed_tokens.lora_embedding_A"] = np.zeros(
                (4, 320), np.float32
            )
        elif how == "layer of another model":
            for matrix, shape in (("A", (4, 32)), ("B", (32, 4))):
                name = f"base_model.model.model.language_model.layers.9.mlp.up_proj.lora_{matrix}.weight"
                weights[name] = np.zeros(shape, np.float32)

    return change


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing matrix", r"must hold all matrices of '.*down_proj', but lacks its lora_B"),
        (
            "missing layer",
            r"must hold matrices for all `target_modules`, but lacks those of model.*0.mlp.down",
        ),
        ("empty", "must hold LoRA matrices, but has no tensors"),
        ("rank", r"must have the rank 4 of adapter_config.json, got shape \[3, 48\]"),
        ("inputs", r"must have shape \[4, 48\], as in its base, got \[4, 47\]"),
        ("outputs", r"must have shape \[32, 4\], as in its base, got \[31, 4\]"),
        ("integers", r"must hold tensors of .*, but '.*' is of I32"),
        ("twice", "must hold a tensor once, but has"),
        ("bias", r"must hold only LoRA matrices and `modules_to_save`, but also has .*down_proj.bias"),
        ("embedding", "also has .*lora_embedding_A"),
        ("layer of another model", "must be for layers of its base, but has model.layers.9.mlp.up_proj.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(whole_decoder, tmp_path, how, sentence):
    folder = rewritten(whole_decoder[0], tmp_path / "adapter", tensors=change_tensors(how))
    with pytest.raises(BadCheckpoint, match=sentence) as error:
        ours(folder)
    assert str(folder / "adapter_model.safetensors") in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", 1),
        ("lora_bias", True),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["mlp"]),
        ("alora_invocation_tokens", [1]),
        ("a_field_of_the_future", 2),
        ("r", 0),
        ("r", "4"),
        ("r", None),
        ("lora_alpha", "8"),
        ("lora_alpha", -1),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", ["q_proj"]),
        ("target_modules", "("),
        ("target_modules", 3),
        ("target_modules", [3]),
        ("exclude_modules", {"a": 1}),
        ("layers_to_transform", "two"),
        ("layers_to_transform", [0, None]),
        ("modules_to_save", "lm_head"),
        ("use_dora", "yes"),
        ("use_rslora", 3),
        ("base_model_name_or_path", None),
        ("base_model_name_or_path", ""),
        ("base_model_name_or_path", "/nowhere/at all"),
        ("base_model_name_or_path", ["a"]),
        ("base_model_name_or_path", "x" * 10000),
    ],
)
def test_fields_that_are_not_implemented_are_named(whole_decoder, tmp_path, key, value):
    folder = rewritten(whole_decoder[0], tmp_path / "adapter", {key: value})
    with pytest.raises(BadCheckpoint, match=f"`{key}` in .*adapter_config.json must ") as error:
        open_pretrained(folder)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("adapter_config.json", b"", "must be JSON"),
        ("adapter_config.json", b"[1]", "must hold a JSON object"),
        ("adapter_config.json", b"version https://git-lfs.github.com/spec/v1", "large-file storage"),
        ("adapter_config.json", None, "must be a JSON file"),
        ("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1", "large-file storage"),
        ("adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{", "must be a whole safetensors file"),
        ("adapter_model.safetensors", None, "must be a safetensors file, but cannot be read"),
    ],
)
def test_damaged_files_are_named(whole_decoder, tmp_path, capsys, file, content, sentence):
    shutil.copytree(whole_decoder[0], tmp_path / "adapter")
    path = tmp_path / "adapter" / file
    path.unlink() if content is None else path.write_bytes(content)
    assert generate.main([str(tmp_path / "adapter"), "up"]) == 2
    message = capsys.readouterr().err
    assert str(path) in message and sentence in message and message.count("\n") == 1


def test_pickled_adapters_are_refused(whole_decoder, tmp_path):
    shutil.copytree(whole_decoder[0], tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(BadCheckpoint, match="pickled weights"):
        open_pretrained(tmp_path / "adapter")


def test_a_base_is_found_beside_the_adapter_or_where_it_is_given(base, whole_decoder, tmp_path, monkeypatch):
    beside = rewritten(whole_decoder[0], tmp_path / "adapter", {"base_model_name_or_path": "../model"})
    with pytest.raises(BadCheckpoint, match=r"ADAPTER@BASE.*which does not exist"):
        open_pretrained(beside)
    assert open_pretrained(f"{beside}@{base}").folder == base
    shutil.copytree(base, tmp_path / "model")
    assert open_pretrained(beside).folder.resolve() == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").rename(tmp_path / "other")
    assert open_pretrained("adapter@other").folder == Path("other")
    with pytest.raises(BadCheckpoint, match=r"to be put on .*other, but has none"):
        open_pretrained(f"{base}@other")
    with pytest.raises(BadCheckpoint, match="an adapter itself"):
        open_pretrained(f"{beside}@{beside}")
    assert open_pretrained(base).adapter is None


def test_a_hub_name_is_fetched_with_what_is_needed(base, whole_decoder, tmp_path, monkeypatch):
    adapter = rewritten(whole_decoder[0], tmp_path / "adapter", {"base_model_name_or_path": "org/base"})
    fetched = []

    def fetch(name, allow_patterns, **_):
        fetched.append((name, allow_patterns))
        return {"org/base": base, "me/adapter": adapter}[name]

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert open_pretrained("me/adapter").folder == base
    assert ("me/adapter", ["adapter_model.safetensors"]) in fetched
    assert ("org/base", ["adapter_model.safetensors"]) not in fetched
    pinned = rewritten(adapter, tmp_path / "pinned", {"revision": "v2"})
    with pytest.raises(BadCheckpoint, match="`revision` in .* must be null or 'main', got 'v2'"):
        open_pretrained(pinned)


def test_commands_take_an_adapter(whole_decoder, tmp_path, capsys):
    folder, theirs = whole_decoder
    assert convert.main(["to-hf", str(folder), str(tmp_path / "merged")]) == 0
    merged = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([list(range(2, 40))])
    with torch.no_grad():
        exported, original = (model(input_ids=ids).logits[..., :200] for model in (merged, theirs))  # no latent tokens
    np.testing.assert_allclose(exported, original, atol=1e-4)
    flags = ["up down", "--max-new-tokens=6", "--json"]
    tokens = []
    for name in (folder, tmp_path / "merged"):
        capsys.readouterr()
        assert generate.main([str(name), *flags, "--method=text"]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens[0] == tokens[1]
    assert convert.main(["to-hf", str(folder), str(tmp_path / "other"), "--adapter"]) == 2
    assert "which is not a run" in capsys.readouterr().err
