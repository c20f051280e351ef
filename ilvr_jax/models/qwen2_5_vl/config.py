"""The shape of a Qwen2.5-VL model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ilvr_jax.config.schema import CLIP_MEAN, CLIP_STD, LoraConfig, ModelSettings, RopeScaling
from ilvr_jax.errors import InputError, quote
from ilvr_jax.models.qwen2_5_vl.images import WindowGeometry
from ilvr_jax.models.qwen2_5_vl.published import MROPE_SECTION, read_fields, rope_scaling
from ilvr_jax.models.qwen2_5_vl.rotary import decoder_frequencies


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower; names as in a published `vision_config`. Raises InputError, naming the key, for a bad value."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    window_size: int  # pixels a side
    fullatt_block_indexes: tuple[int, ...]
    patch_size: int = 14
    temporal_patch_size: int = 2
    in_channels: int = 3
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    # Deviation of fresh patch embedding weights; None is 1/sqrt(inputs). Unit scale, with inputs scaled down by the
    # root of their number (through image_std), suits the size of Adam's steps.
    patch_init_std: float | None = None

    def __post_init__(self):
        unit = 2 * self.patch_size
        if self.window_size % unit:
            must_be = f"a multiple of {unit}, the pixels of a vision token"
            raise _bad("model.vision.window_size", self.window_size, must_be)
        if self.hidden_size % (4 * self.num_heads):  # pairs of channels, half for rows, half for columns
            must_be = f"a number whose fourfold divides hidden_size ({self.hidden_size})"
            raise _bad("model.vision.num_heads", self.num_heads, must_be)
        if not all(block < self.depth for block in self.fullatt_block_indexes):
            must_be = f"a tuple of numbers from 0 to {self.depth - 1}, below depth"
            raise _bad("model.vision.fullatt_block_indexes", self.fullatt_block_indexes, must_be)
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.in_channels:
                must_be = f"a number for each of {self.in_channels} channels"
                raise _bad(f"model.vision.{name}", getattr(self, name), must_be)

    @property
    def window_units(self) -> int:
        """Merge units along a side of an attention window."""
        return self.window_size // self.patch_size // 2

    @property
    def geometry(self) -> WindowGeometry:
        return WindowGeometry(self.window_units)

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder and its vision tower; names as in a published `config.json`.

    Raises InputError, naming the key, for a bad value.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    vision: VisionConfig
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    dtype: str = "float32"  # of activations, one of schema.DTYPES; parameters are float32
    remat_policy: str = "none"  # one of schema.REMAT_POLICIES
    attention: str = "auto"  # over whole sequences, one of schema.KERNELS
    lora: LoraConfig = LoraConfig()
    rope_scaling: RopeScaling = RopeScaling()
    slot_input: str = "hidden"  # the rule that fills slots, one of method.slots.SLOT_INPUTS

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_attention_heads):  # a head's channels are rotated in pairs
            must_be = f"a number whose double divides hidden_size ({self.hidden_size})"
            raise _bad("model.num_attention_heads", self.num_attention_heads, must_be)
        if self.num_attention_heads % self.num_key_value_heads:
            must_be = f"a divisor of num_attention_heads ({self.num_attention_heads})"
            raise _bad("model.num_key_value_heads", self.num_key_value_heads, must_be)
        sections, half = self.mrope_section, self.head_dim // 2
        if [type(size) for size in sections] != [int] * 3 or min(sections) < 0 or sum(sections) != half:
            raise _bad("model.mrope_section", sections, f"three numbers with the sum {half}, half of a head's channels")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_frequencies(self) -> Float[np.ndarray, " half"]:
        return decoder_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)


def _bad(key: str, value: object, must_be: str) -> InputError:
    return InputError(f"`{key}` must be {must_be}, got {quote(value)}")


def model_config(settings: ModelSettings, vocab_size: int, published: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the model's shape from the `model` section of a config and the tokenizer's size.

    With `init_from` the shape is that of `published`, its config.json. Raises InputError, naming the key, if a model of
    that shape cannot be built.
    """
    overrides = {name: getattr(settings, name) for name in ("dtype", "remat_policy", "attention", "lora", "slot_input")}
    if published is not None:
        config = model_config_from_hf(published, **overrides)
        return dataclasses.replace(config, vocab_size=max(config.vocab_size, vocab_size))
    shape = settings.shape()
    vision = VisionConfig(out_hidden_size=settings.hidden_size, **vars(shape.pop("vision")))
    return ModelConfig(vocab_size=vocab_size, vision=vision, **shape, **overrides)


def model_config_from_hf(published: Mapping[str, Any], **overrides) -> ModelConfig:
    """Return the model's shape from the contents of a published `config.json`.

    Raises BadCheckpoint or InputError, naming the field, if a model of that shape cannot be built.
    """
    full = read_fields(published)
    text, vision = full.text_config, full.vision_config
    if vision.out_hidden_size != text.hidden_size:
        raise _bad("vision_config.out_hidden_size", vision.out_hidden_size, f"hidden_size ({text.hidden_size})")
    return ModelConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        rope_theta=text.rope_parameters["rope_theta"],
        rope_scaling=rope_scaling(text),
        mrope_section=tuple(text.rope_parameters.get("mrope_section", MROPE_SECTION)),
        rms_norm_eps=text.rms_norm_eps,
        tie_word_embeddings=full.tie_word_embeddings,
        vision=VisionConfig(
            depth=vision.depth,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_heads=vision.num_heads,
            out_hidden_size=vision.out_hidden_size,
            window_size=vision.window_size,
            # transformers ignores numbers of layers that do not exist
            fullatt_block_indexes=tuple(block for block in vision.fullatt_block_indexes if 0 <= block < vision.depth),
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            in_channels=vision.in_channels,
        ),
        **overrides,
    )
