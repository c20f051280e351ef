"""The shape of a model: what cannot be built is refused with a sentence that names the key."""

import dataclasses

import pytest

from ilvr_jax.config.fields import BadConfig, read
from ilvr_jax.config.schema import LatentsConfig, ModelSettings, RopeScaling, VisionSettings
from ilvr_jax.errors import InputError
from tests.samples import CONFIG, VISION


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"num_key_value_heads": 3},
            "`model.num_key_value_heads` must be a divisor of num_attention_heads (4), got 3",
        ),
        (
            {"num_attention_heads": 3},
            "`model.num_attention_heads` must be a number whose double divides hidden_size (32), got 3",
        ),
        (
            {"mrope_section": (1, 2, 2)},
            "`model.mrope_section` must be three numbers with the sum 4, half of a head's channels, got (1, 2, 2)",
        ),
    ],
)
def test_a_decoder_that_cannot_be_is_refused(changes, sentence):
    with pytest.raises(InputError) as error:
        dataclasses.replace(CONFIG, **changes)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"window_size": 20}, "`window_size` must be a multiple of 28, the pixels of a vision token, got 20"),
        ({"num_heads": 3}, "`num_heads` must be a number whose fourfold divides hidden_size (16), got 3"),
        (
            {"fullatt_block_indexes": (2,)},
            "`fullatt_block_indexes` must be a tuple of numbers from 0 to 1, below depth, got (2,)",
        ),
        ({"image_std": (1.0,)}, "`image_std` must be a number for each of 3 channels, got (1.0,)"),
    ],
)
def test_a_vision_tower_that_cannot_be_is_refused(changes, sentence):
    with pytest.raises(InputError) as error:
        dataclasses.replace(VISION, **changes)
    assert str(error.value) == f"`model.vision.{sentence[1:]}"


@pytest.mark.parametrize(
    ("schema", "key", "value", "wanted"),
    [
        (ModelSettings, "dtype", "floot32", "one of float32, bfloat16, float16"),
        (ModelSettings, "num_attention_heads", 0, "at least 1"),
        (ModelSettings, "hidden_size", "32", "an integer"),
        (ModelSettings, "rope_theta", 1.0, "above 1"),
        (VisionSettings, "window_size", 0, "at least 1"),
        (VisionSettings, "fullatt_block_indexes", (-1,), "at least 0"),
        (VisionSettings, "image_std", (1.0, 0.0, 1.0), "above 0"),
        (RopeScaling, "factor", float("inf"), "a finite number"),
        (RopeScaling, "truncate", 1, "true or false"),
    ],
)
def test_values_out_of_range_are_refused(schema, key, value, wanted):
    shape = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "window_size": 28}
    shape = shape | {"fullatt_block_indexes": ()} if schema is VisionSettings else {}
    with pytest.raises(BadConfig, match=f"^`section.{key}` must be {wanted}, got "):
        read(schema, shape | {key: value}, "section")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("latent_size", -1, "from 0 to "),
        ("candidates", 0, "at least 1"),
        ("coverage", 0.0, "above 0 and at most 1"),
        ("coverage", 1.01, "above 0 and at most 1"),
        ("temperature", 0.0, "above 0"),
        ("tau", -0.1, "from 0 to 1"),
        ("ce_weight", -1.0, "at least 0"),
        ("sim_weight", float("nan"), "a finite number"),
        ("target_noise", float("inf"), "a finite number"),
    ],
)
def test_settings_of_the_method_out_of_range_are_refused(key, value, wanted):
    with pytest.raises(BadConfig, match=f"^`latents.{key}` must be {wanted}.*, got {value!r}$"):
        read(LatentsConfig, {key: value}, "latents")
