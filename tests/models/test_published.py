"""Fields of a published config.json: read as in transformers, or an error that names them."""

import copy
import json
import random

import numpy as np
import pytest
import transformers
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from ilvr_jax.checkpoints.export import published_config
from ilvr_jax.checkpoints.pretrained import read_published
from ilvr_jax.config.experiments import parse
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.errors import InputError
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig, model_config, model_config_from_hf
from ilvr_jax.models.qwen2_5_vl.published import published_dtype
from ilvr_jax.models.qwen2_5_vl.rotary import rope_magnitude
from ilvr_jax.models.tensor_files import BadCheckpoint
from tests.published import TEXT, VISION
from tests.samples import tiny_config

FLAT = {"model_type": "qwen2_5_vl", **TEXT, "vision_config": VISION}
NESTED = {"model_type": "qwen2_5_vl", "text_config": TEXT, "vision_config": VISION}
# What the card of the published models tells people to add for long texts.
CARD = {"type": "yarn", "mrope_section": [16, 24, 24], "factor": 4, "original_max_position_embeddings": 32768}
LAYOUTS = ("flat", "nested", "rope_parameters")


def shape_of(config: dict, tmp_path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return model_config_from_hf(read_published(tmp_path))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "rope",
    [
        CARD,
        {**CARD, "type": "default", "rope_type": "yarn"},
        {**CARD, "factor": None},
        {**CARD, "factor": 0.5},
        {**CARD, "truncate": False, "beta_fast": 16, "beta_slow": 2.5},
        {**CARD, "beta_fast": 0, "beta_slow": None, "attention_factor": 1.7},
        {**CARD, "original_max_position_embeddings": 100, "beta_fast": 1},
        {**CARD, "mscale": 0.7, "mscale_all_dim": 1.3, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7},
        {**CARD, "type": "linear"},
        {**CARD, "rope_type": "default"},
        {"type": "mrope", "mrope_section": [16, 24, 24]},
        {},
        None,
    ],
)
def test_rotary_positions_are_those_of_transformers(rope, layout, tmp_path):
    text = {
        "hidden_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "rope_theta": 1e6,
        "max_position_embeddings": 128000,
        "rope_parameters" if layout == "rope_parameters" else "rope_scaling": rope,
    }
    vision = {**VISION, "out_hidden_size": 256}
    config = {**text, "vision_config": vision} if layout == "flat" else {"text_config": text, "vision_config": vision}
    theirs = transformers.Qwen2_5_VLConfig(**copy.deepcopy(config)).text_config
    expected = Qwen2_5_VLRotaryEmbedding(theirs)
    ours = shape_of({"model_type": "qwen2_5_vl", **config}, tmp_path)
    np.testing.assert_allclose(ours.rope_frequencies, expected.inv_freq.numpy(), rtol=3e-7)
    assert rope_magnitude(ours.rope_scaling) == expected.attention_scaling
    assert list(ours.mrope_section) == expected.mrope_section


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear"}, {"rope_type": "yarn", "beta_fast": 20.0}])
def test_scaled_positions_of_our_own_config_are_exported(scaling):
    config = tiny_config()
    config.model.rope_scaling = {"factor": 4.0, **scaling} if scaling else {}
    shape = model_config(parse(config).model, 300)
    assert shape.rope_scaling.rope_type == scaling.get("rope_type", "default")
    exported = json.loads(json.dumps(published_config(shape)))
    assert model_config_from_hf(exported).rope_scaling == shape.rope_scaling
    with pytest.raises(BadConfig, match="`model.rope_scaling.faktor` must be a key of the config; the nearest is"):
        config.model.rope_scaling = {"faktor": 4.0}
        parse(config)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 2**30),
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("layer_types", ["full_attention"]),
        ("partial_rotary_factor", 0.5),
        ("mrope_interleaved", True),
        ("per_layer_config", {"0": {"num_attention_heads": 2}}),
        ("head_dim", 16),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", -32),
        ("hidden_size", None),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**400),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", None),
        ("rope_theta", 1.0),
        ("tie_word_embeddings", "false"),
        ("rope_scaling.type", "dynamic"),
        ("rope_scaling.type", "longrope"),
        ("rope_scaling.type", ["yarn"]),
        ("rope_scaling.rope_type", None),
        ("rope_scaling.mrope_section", [2, 2]),
        ("rope_scaling.mrope_section", [-1, 1, 4]),
        ("rope_scaling.mrope_section", "1, 1, 2"),
        ("rope_scaling.mrope_interleaved", True),
        ("rope_scaling.partial_rotary_factor", 0.5),
    ],
)
def test_a_field_of_the_decoder_that_cannot_be_used_is_named(field, value, nested, tmp_path):
    config = copy.deepcopy(NESTED if nested else FLAT)
    text = config["text_config"] if nested else config
    text["max_window_layers"] = 2
    *sections, name = field.split(".")
    (text[sections[0]] if sections else text)[name] = value
    with pytest.raises(BadCheckpoint) as error:
        shape_of(config, tmp_path)
    sentence = str(error.value)
    assert str(tmp_path / "config.json") in sentence and len(sentence) < 400
    assert f"{field}`" in sentence or f"`{name}`" in sentence


@pytest.mark.parametrize("name", ["tie_word_embeddings", "image_token_id", "text_config"])
@pytest.mark.parametrize("value", ["true", -1.5, [3]])
def test_a_field_of_the_whole_that_cannot_be_used_is_named(name, value, tmp_path):
    with pytest.raises(BadCheckpoint, match=f"config.json: `{name}` must be .*, got "):
        shape_of({**FLAT, name: value}, tmp_path)


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"])
@pytest.mark.parametrize("value", ["4", True, -1.0, float("inf"), [4], {}])
def test_a_field_of_yarn_that_cannot_be_used_is_named(key, value, tmp_path):
    rope = {**CARD, "mrope_section": [1, 1, 2], key: value}
    with pytest.raises(BadCheckpoint, match=rf"config.json: `rope_scaling.{key}` must be .*, got "):
        shape_of({**FLAT, "rope_scaling": rope}, tmp_path)


def test_yarn_needs_its_factor(tmp_path):
    with pytest.raises(BadCheckpoint, match="`rope_scaling.factor` must be given with type 'yarn', but is absent"):
        shape_of({**FLAT, "rope_scaling": {"type": "yarn", "mrope_section": [1, 1, 2]}}, tmp_path)


@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("types", [["full_attention"], ["full_attention", "sliding_attention"]])
def test_positions_by_kinds_of_layers_are_named(types, section, tmp_path):
    rope = {kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]} for kind in types}
    text = {name: value for name, value in TEXT.items() if name != "rope_scaling"} | {section: rope}
    flat = {**FLAT, "rope_scaling": None, **text}
    for prefix, config in (("", flat), ("text_config.", {**NESTED, "text_config": text})):
        with pytest.raises(BadCheckpoint, match=rf"`{prefix}{section}\.full_attention` must be a value for all layers"):
            shape_of(config, tmp_path)


def test_scaled_positions_beside_the_text_config_are_not_ignored(tmp_path):
    with pytest.raises(BadCheckpoint, match="`rope_scaling` must be in `text_config`"):
        shape_of({**NESTED, "rope_scaling": CARD}, tmp_path)
    scaling = {**CARD, "mrope_section": [1, 1, 2]}
    both = {**NESTED, "text_config": {**TEXT, "rope_scaling": scaling}, "rope_scaling": scaling}
    assert shape_of(both, tmp_path).rope_scaling.factor == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "quick_gelu"),
        ("spatial_merge_size", 3),
        ("spatial_merge_size", True),
        ("in_channels", 1),
        ("depth", "2"),
        ("patch_size", [14, 14]),
        ("window_size", 50),
        ("window_size", 28 * 2**20),
        ("num_heads", 3),
        ("num_attention_heads", 0),
        ("out_hidden_size", 64),
        ("fullatt_block_indexes", 1),
        ("fullatt_block_indexes", None),
        ("rope_theta", 5000.0),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_parameters", {"rope_type": "axial", "rope_theta": 3.0}),
        ("head_dim", 4),
    ],
)
def test_a_field_of_the_vision_tower_that_cannot_be_used_is_named(field, value, tmp_path):
    with pytest.raises(BadCheckpoint) as error:
        shape_of({**FLAT, "vision_config": {**VISION, field: value}}, tmp_path)
    field = {"num_attention_heads": "num_heads"}.get(field, field)
    assert f"config.json: `vision_config.{field}" in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("config", [{}, {"vision_config": None}, {"vision_config": 3}, {"vision_config": []}])
def test_a_checkpoint_without_a_vision_tower_is_refused_in_a_short_sentence(config, tmp_path):
    fields = {name: value for name, value in FLAT.items() if name != "vision_config"}
    with pytest.raises(BadCheckpoint, match="`vision_config` must be an object of fields, got ") as error:
        shape_of({**fields, **config}, tmp_path)
    assert len(str(error.value)) < 100 + len(str(tmp_path))


HARMLESS = {
    "attention_dropout": 0.1,
    "initializer_range": 0.5,
    "attention_bias": True,
    "max_window_layers": 3,
    "use_sliding_window": True,
    "hidden_act": "swish",
    "quantization_config": None,
    "latent_token_id": 7,
    "bos_token_id": "none",
    "architectures": 3,
    "id2label": {"x": 1},
    "problem_type": "nonsense",
    "head_dim": 8,
    "rms_norm_eps": 1,
    "layer_types": ["full_attention"] * 3,
    "dtype": "auto",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_fields_that_change_no_number_are_harmless(name, tmp_path):
    nested = {**NESTED, "text_config": {**TEXT, name: HARMLESS[name]}}
    vision = {"tokens_per_second": 25, "in_chans": 1, "spatial_patch_size": 7, "fullatt_block_indexes": [1, 99]}
    for config in ({**FLAT, name: HARMLESS[name]}, nested):
        config["vision_config"] = {**VISION, **vision}
        assert shape_of(config, tmp_path).vision.fullatt_block_indexes == (1,)
    assert json.loads((tmp_path / "config.json").read_text()) == config == nested  # reading leaves it as it is


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bfloat16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("bf16", "bfloat16"),
        ("torch.float16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("auto", None),
        (None, None),
    ],
)
def test_a_dtype_by_any_of_its_names(value, expected):
    for key in ("dtype", "torch_dtype"):
        assert published_dtype({key: value}) == published_dtype({"text_config": {key: value}}) == expected
    assert published_dtype({}) is None


@pytest.mark.parametrize("value", ["float8_e4m3fn", "int8", "", "floot", 16, True, ["bfloat16"], {"": "bfloat16"}])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_weights_cannot_have_is_named(key, value, tmp_path):
    for prefix, config in (
        ("", {**FLAT, key: value}),
        ("text_config.", {**NESTED, "text_config": {**TEXT, key: value}}),
    ):
        with pytest.raises(
            BadCheckpoint, match=f"config.json: `{prefix}{key}` must be one of float32, bfloat16, float16"
        ):
            shape_of(config, tmp_path)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "AWQ with 4 bits"),
        ({"quant_method": "gptq", "bits": 8}, "GPTQ with 8 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes with 4 bits"),
        ({"load_in_8bit": True}, "bitsandbytes with 8 bits"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {str(n): {} for n in range(999)}},
            "compressed-tensors",
        ),
        ({"quant_method": ["x" * 999]}, "x"),
        ({}, "an unknown method"),
        ("int4", "'int4'"),
    ],
)
def test_quantised_weights_are_named_by_their_method(settings, name, tmp_path):
    inside = {"vision_config": {**FLAT["vision_config"], "quantization_config": settings}}
    for prefix, fields in (("", {"quantization_config": settings}), ("vision_config.", inside)):
        with pytest.raises(BadCheckpoint) as error:
            shape_of({**FLAT, **fields}, tmp_path)
        assert f"`{prefix}quantization_config` is that of" in str(error.value) and name in str(error.value)
        assert len(str(error.value)) < 400


VALUES = (
    None, True, False, 0, -1, 1, 3, 7, 2**31, 10**30, -(10**400), 0.0, 0.5, 1e308, float("nan"), float("inf"),
    "", "8", "x" * 5000, "\ud800", [], [None], [[[]]], [0] * 5000, {}, {"type": "yarn"}, {"rope_type": None},
)  # fmt: skip


def test_any_value_in_any_field_gives_a_shape_or_one_sentence():
    rng, refused = random.Random(0), 0
    for _ in range(1500):
        config = copy.deepcopy(rng.choice([FLAT, NESTED]))
        config |= {"tie_word_embeddings": True, "dtype": "bfloat16"}
        text = config.get("text_config", config)
        text["rope_scaling"] = rng.choice([TEXT["rope_scaling"], {**CARD, "mrope_section": [1, 1, 2]}]).copy()
        text |= {"use_sliding_window": rng.random() < 0.2, "layer_types": None, "hidden_act": "silu"}
        for _ in range(rng.choice([1, 1, 2])):
            section = rng.choice([config, text, config.get("vision_config"), text.get("rope_scaling")])
            if not isinstance(section, dict) or not section:
                continue
            name = rng.choice(list(section))
            if rng.random() < 0.15:
                del section[name]
            else:
                section[name] = rng.choice(VALUES)
        try:
            shape = model_config_from_hf(config)
            assert shape.rope_frequencies.shape == (shape.head_dim // 2,)
        except InputError as error:
            refused += 1
            assert len(str(error)) < 400 and "`" in str(error), error
    assert 500 < refused < 1400
