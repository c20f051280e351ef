"""The shape of a model: what cannot be built is refused with a sentence that names the key."""

import dataclasses

import pytest

from ilvr_jax.latents.selection import LatentSettings
from tests.samples import CONFIG, VISION


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "floot32"}, "model.dtype is 'floot32'; accepted is one of float32, bfloat16, float16"),
        (
            {"num_key_value_heads": 3},
            "model.num_key_value_heads is 3; accepted is a divisor of num_attention_heads (4)",
        ),
        ({"num_attention_heads": 0}, "model.num_attention_heads is 0; accepted is a whole number from 1"),
        (
            {"num_attention_heads": 3},
            "model.num_attention_heads is 3; accepted is a number whose double divides hidden_size (32)",
        ),
        ({"hidden_size": "32"}, "model.hidden_size is '32'; accepted is a whole number from 1"),
        (
            {"mrope_section": (1, 2, 2)},
            "model.mrope_section is (1, 2, 2); accepted is three numbers with the sum 4, half of a head's channels",
        ),
    ],
)
def test_a_decoder_that_cannot_be_is_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(CONFIG, **changes)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"window_size": 20}, "window_size is 20; accepted is a multiple of 28, the pixels of a vision token"),
        ({"window_size": 0}, "window_size is 0; accepted is a whole number from 1"),
        ({"num_heads": 3}, "num_heads is 3; accepted is a number whose fourfold divides hidden_size (16)"),
        (
            {"fullatt_block_indexes": (2,)},
            "fullatt_block_indexes is (2,); accepted is a tuple of numbers from 0 to 1, below depth",
        ),
        ({"image_std": (1.0,)}, "image_std is (1.0,); accepted is a number for each of 3 channels"),
    ],
)
def test_a_vision_tower_that_cannot_be_is_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(VISION, **changes)
    assert str(error.value) == f"model.vision.{sentence}"


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("latent_size", 0, "at least 1"),
        ("candidates", 0, "at least 1"),
        ("coverage", 0.0, "more than 0 and at most 1"),
        ("coverage", 1.01, "more than 0 and at most 1"),
        ("temperature", 0.0, "more than 0"),
        ("tau", -0.1, "from 0 to 1"),
        ("ce_weight", -1.0, "at least 0"),
        ("sim_weight", float("nan"), "at least 0"),
        ("target_noise", float("inf"), "at least 0"),
    ],
)
def test_settings_of_the_method_out_of_range_are_refused(key, value, accepted):
    with pytest.raises(ValueError) as error:
        LatentSettings(**{key: value})
    assert str(error.value) == f"latents.{key} is {value!r}; accepted is a number {accepted}"
