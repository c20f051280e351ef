"""The config.json of a published Qwen2.5-VL: each field that changes numbers is read, or must have one value.

All others are ignored, since transformers does not compute with them either: bookkeeping, and fields of other methods,
of videos and of generation. `attention_dropout` matters in training alone, where the run's own config decides.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from ilvr_jax.config.schema import RopeScaling
from ilvr_jax.errors import QUOTE_LENGTH, quote
from ilvr_jax.models.qwen2_5_vl.rotary import yarn_magnitude
from ilvr_jax.models.tensor_files import BadCheckpoint

# Limits on plausible sizes; published models have up to 29568 channels, 80 layers and windows of 112 pixels.
LARGEST, LARGEST_NUMBER, MOST_LAYERS = 2**31 - 1, 1e30, 256
WIDEST, MOST_PIXELS = 2**20, 2**14
MROPE_SECTION = (16, 24, 24)  # transformers' default
# The names that files give to dtypes, after "torch." or without it.
DTYPE_NAMES = {
    "float32": ("float32", "float", "fp32", "f32"),
    "bfloat16": ("bfloat16", "bf16"),
    "float16": ("float16", "half", "fp16", "f16"),
}

METHODS = {"awq": "AWQ", "gptq": "GPTQ"}  # of quantisation, as displayed


class Rule(NamedTuple):
    """The valid values of a field: a test, and a description of them."""

    holds: Callable[[Any], bool]
    words: str


def whole(least: int = 1, most: int = LARGEST) -> Rule:
    return Rule(lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}")


def number(above: float = 0.0, zero: bool = False) -> Rule:
    def holds(value: Any) -> bool:
        return type(value) in (int, float) and (above < value < LARGEST_NUMBER or zero and value == 0)

    return Rule(holds, f"a number {'from' if zero else 'above'} {above:g}")


def one_of(*choices: Any) -> Rule:
    def holds(value: Any) -> bool:
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)

    return Rule(holds, " or ".join(json.dumps(choice) for choice in choices))


def list_of(kind: type, words: str) -> Rule:
    return Rule(lambda value: isinstance(value, list) and all(type(item) is kind for item in value), words)


def nullable(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.words} or null")


FLAG = one_of(True, False)
SECTION = Rule(lambda value: isinstance(value, dict), "an object of fields")
ABSENT = Rule(lambda value: value is None, "null")
NO_SECTION = Rule(lambda value: not isinstance(value, dict), "a value for all layers, not a section for some of them")
SILU = one_of("silu", "swish")
# Fields whose other values make transformers, or other readers of these files, compute what is not implemented here.
ONE_VALUE = {
    "partial_rotary_factor": nullable(one_of(1)),
    "mrope_interleaved": nullable(one_of(False)),
    "per_layer_config": ABSENT,
}
ROOT = {
    "text_config": nullable(SECTION),
    "tie_word_embeddings": FLAG,
    "image_token_id": whole(least=0),
    "per_layer_config": ABSENT,
}
TEXT = {
    "vocab_size": whole(),
    "hidden_size": whole(most=WIDEST),
    "intermediate_size": whole(most=WIDEST),
    "num_hidden_layers": whole(most=MOST_LAYERS),
    "num_attention_heads": whole(most=WIDEST),
    "num_key_value_heads": nullable(whole()),
    "max_position_embeddings": whole(),
    "original_max_position_embeddings": whole(),
    "rms_norm_eps": number(),
    "rope_theta": nullable(number(above=1)),
    "rope_scaling": nullable(SECTION),
    "rope_parameters": nullable(SECTION),
    "hidden_act": SILU,
    "use_sliding_window": nullable(FLAG),
    "sliding_window": nullable(whole(least=0)),
    "max_window_layers": nullable(whole(least=0)),
    "layer_types": nullable(list_of(str, "a list of names")),
}
VISION = {
    "depth": whole(most=MOST_LAYERS),
    "hidden_size": whole(most=WIDEST),
    "intermediate_size": whole(most=WIDEST),
    "num_heads": whole(most=WIDEST),
    "out_hidden_size": whole(most=WIDEST),
    "window_size": whole(most=MOST_PIXELS),
    "patch_size": whole(most=MOST_PIXELS),
    "temporal_patch_size": whole(most=WIDEST),
    "spatial_merge_size": one_of(2),
    "in_channels": one_of(3),
    "hidden_act": SILU,
    "fullatt_block_indexes": list_of(int, "a list of whole numbers"),
}
VISION_ROPE = {
    "rope_type": one_of("axial", "default"),
    "type": one_of("axial", "default"),
    "rope_theta": one_of(10000),
}
YARN = {  # 0 counts as null, as in transformers
    "factor": nullable(number()),
    "original_max_position_embeddings": whole(),
    "beta_fast": nullable(number(zero=True)),
    "beta_slow": nullable(number(zero=True)),
    "attention_factor": nullable(number()),
    "mscale": nullable(number(zero=True)),
    "mscale_all_dim": nullable(number(zero=True)),
    "truncate": FLAG,
}
# The fields of each type of rotary positions beside theta and sections; "mrope" is an older name of "default".
ROPE = {"default": {}, "mrope": {}, "linear": {"factor": number()}, "yarn": YARN}


def read_fields(published: Mapping[str, Any]) -> Qwen2_5_VLConfig:
    """Return the fields of a config.json that are used here, in transformers' class, which fills in the absent ones.

    Raises BadCheckpoint, naming the field, for a value that cannot be used or is not implemented.
    """
    check_not_quantised(published)
    published_dtype(published)
    check(published, "", ROOT)
    check({"vision_config": published.get("vision_config")}, "", {"vision_config": SECTION})
    nested = published.get("text_config") is not None
    text, prefix = (published["text_config"], "text_config.") if nested else (published, "")
    check_text(text, prefix)
    if nested:
        check_rope_place(published, text)
    aliases = Qwen2_5_VLVisionConfig.attribute_map
    vision = {aliases.get(name, name): value for name, value in published["vision_config"].items()}
    check_vision(vision)

    used = {name: value for name, value in text.items() if name in TEXT}
    used |= {
        "bos_token_id": None,
        "eos_token_id": None,
    }  # without transformers' warning for small vocabularies
    if "rms_norm_eps" in used:
        used["rms_norm_eps"] = float(used["rms_norm_eps"])  # transformers rejects integers
    full = Qwen2_5_VLConfig(
        **copy.deepcopy({"text_config": used} if nested else used),
        vision_config={name: value for name, value in vision.items() if name in VISION},
        tie_word_embeddings=published.get("tie_word_embeddings", False)
        or bool(nested and text.get("tie_word_embeddings")),
    )
    full.text_config.standardize_rope_params()  # as transformers' model does as well
    check({"rope_theta": full.text_config.rope_parameters["rope_theta"]}, prefix, {"rope_theta": number(above=1)})
    for section, name, size in (
        (text, prefix, full.text_config.hidden_size // full.text_config.num_attention_heads),
        (vision, "vision_config.", full.vision_config.hidden_size // full.vision_config.num_heads),
    ):
        check(section, name, {"head_dim": nullable(one_of(size))})
    return full


def check(section: Mapping[str, Any], prefix: str, rules: Mapping[str, Rule]) -> None:
    """Raise BadCheckpoint, naming the field, if one that is present breaks its rule."""
    for name, rule in rules.items():
        if name in section and not rule.holds(section[name]):
            raise BadCheckpoint(f"`{prefix}{name}` must be {rule.words}, got {quote(section[name])}")


def check_text(text: Mapping[str, Any], prefix: str) -> None:
    """Raise BadCheckpoint if the decoder's fields cannot be used."""
    check(text, prefix, TEXT | ONE_VALUE | {"tie_word_embeddings": nullable(FLAG)})
    layers = text.get("num_hidden_layers", Qwen2_5_VLTextConfig.num_hidden_layers)
    if text.get("layer_types") is not None:
        full = ["full_attention"] * layers
        check(text, prefix, {"layer_types": Rule(full.__eq__, f"'full_attention' for each of {layers} layers")})
    elif text.get("use_sliding_window") and text.get("sliding_window", 0) is not None:
        first = text.get("max_window_layers", Qwen2_5_VLTextConfig.max_window_layers)
        if first is None or first < layers:
            raise BadCheckpoint(
                f"`{prefix}use_sliding_window` must be false, or `max_window_layers` at least the number of layers "
                f"({layers}), got {quote(first)}: attention in sliding windows is not implemented"
            )
    check_rope(text, prefix)


def check_rope(text: Mapping[str, Any], prefix: str) -> None:
    """Raise BadCheckpoint if the type or a field of the decoder's rotary positions cannot be used."""
    section, rope = rope_fields(text)
    prefix = f"{prefix}{section}."
    key = "rope_type" if "rope_type" in rope else "type"
    check(rope, prefix, {key: one_of(*ROPE)} | dict.fromkeys((name for name in rope if name != key), NO_SECTION))
    kind = rope.get(key, "default")
    general = {"rope_theta": number(above=1), "mrope_section": list_of(int, "a list of whole numbers")}
    check(rope, prefix, {**general, **ONE_VALUE, **ROPE[kind]})
    if "factor" in ROPE[kind] and "factor" not in rope:
        raise BadCheckpoint(f"`{prefix}factor` must be given with {key} {kind!r}, but is absent")


def rope_fields(section: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the fields of the decoder's section of rotary positions, chosen as in transformers."""
    name = "rope_scaling" if section.get("rope_scaling") else "rope_parameters"
    return name, section.get(name) or {}


def check_rope_place(published: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raise BadCheckpoint if positions are scaled outside `text_config` alone, where transformers ignores it."""
    name, rope = rope_fields(published)
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    _, theirs = rope_fields(text)
    if kind not in (None, "default", "mrope") and kind != theirs.get("rope_type", theirs.get("type")):
        raise BadCheckpoint(
            f"`{name}` must be in `text_config`, where transformers reads it, got {quote(kind)} outside it"
        )


def check_vision(vision: Mapping[str, Any]) -> None:
    """Raise BadCheckpoint if the vision tower's fields cannot be used."""
    prefix = "vision_config."
    ropes = ("rope_parameters", "rope_scaling")
    check(
        vision,
        prefix,
        VISION
        | {name: nullable(SECTION) for name in ropes}
        | {"rope_theta": VISION_ROPE["rope_theta"], "per_layer_config": ABSENT},
    )
    for name in ropes:
        check(vision.get(name) or {}, f"{prefix}{name}.", VISION_ROPE)


def rope_scaling(text: Qwen2_5_VLTextConfig) -> RopeScaling:
    """Return the scaling of a checkpoint's rotary positions, with absent fields computed as in transformers."""
    rope = text.rope_parameters
    if rope["rope_type"] == "linear":
        return RopeScaling("linear", rope["factor"])
    if rope["rope_type"] != "yarn":
        return RopeScaling()
    length = rope["original_max_position_embeddings"]
    factor = rope["factor"] or text.max_position_embeddings / length
    magnitude = rope.get("attention_factor")
    if magnitude is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        magnitude = yarn_magnitude(factor, rope["mscale"]) / yarn_magnitude(factor, rope["mscale_all_dim"])
    turns = {name: rope[name] for name in ("beta_fast", "beta_slow") if rope.get(name)}
    return RopeScaling("yarn", factor, length, truncate=rope.get("truncate", True), attention_factor=magnitude, **turns)


def described_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """Return a scaling's fields for a config.json: its type and those that the type reads."""
    names = {"rope_type", *ROPE[scaling.rope_type]}
    return {name: value for name, value in dataclasses.asdict(scaling).items() if name in names}


def published_dtype(published: Mapping[str, Any]) -> str | None:
    """Return the dtype that a config.json names, None if it leaves it to the weights ("auto", null or absent).

    Raises BadCheckpoint, naming the field, for a dtype that weights cannot have here.
    """
    text = published.get("text_config")
    dtype = None
    for section, prefix in ((published, ""), (text if isinstance(text, dict) else {}, "text_config.")):
        for key in ("dtype", "torch_dtype"):
            value = section.get(key)
            name = value.lower().removeprefix("torch.") if isinstance(value, str) else value
            matches = [ours for ours, names in DTYPE_NAMES.items() if name in names]
            if not matches and name not in (None, "auto"):
                raise BadCheckpoint(f"`{prefix}{key}` must be one of {', '.join(DTYPE_NAMES)}, got {quote(value)}")
            dtype = dtype or next(iter(matches), None)
    return dtype


def check_not_quantised(published: Mapping[str, Any]) -> None:
    """Raise BadCheckpoint, naming the method, if a config.json describes quantised weights."""
    inner = [(f"{name}.", published.get(name)) for name in ("text_config", "vision_config")]
    for prefix, section in (("", published), *inner):
        for key in ("quantization_config", "compression_config"):
            if isinstance(section, Mapping) and (settings := section.get(key)) is not None:
                raise BadCheckpoint(
                    f"the weights must not be quantised, but `{prefix}{key}` is that of {quantisation(settings)}; "
                    "give the checkpoint that they were made from"
                )


def quantisation(settings: Any) -> str:
    """Return the method of a `quantization_config`, with its bits if it names them, for a message."""
    if not isinstance(settings, dict):
        return quote(settings)
    bits = settings.get("bits") or next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), None)
    method = settings.get("quant_method") or ("bitsandbytes" if bits else "an unknown method")
    method = METHODS.get(method, method) if isinstance(method, str) else quote(method)
    return f"{method[:QUOTE_LENGTH]} with {quote(bits)} bits" if bits else method[:QUOTE_LENGTH]
