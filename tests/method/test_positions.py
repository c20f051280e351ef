"""Rotary positions of slots: by hand, and against those of images in their place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_jax.method.layout import build_sample
from ilvr_jax.method.positions import answer_positions, sample_positions
from ilvr_jax.models.qwen2_5_vl.positions import mrope_positions
from tests.samples import SPECIAL, random_sample


def positions_of(sample, rule, size):
    grids = [(image.height // 2, image.width // 2) for image in sample.images]
    return sample_positions(sample.tokens, grids, sample.slot_starts, size, SPECIAL, rule, mrope_positions)


def test_positions_by_hand():
    look = [SPECIAL.latent_start, *[SPECIAL.latent_pad] * 4, SPECIAL.latent_end]
    tokens = np.array([SPECIAL.im_start, SPECIAL.assistant, 11, *look, 12, *look])
    sample = build_sample(tokens, (), (), SPECIAL, 4, slot_positions="turning_grid")
    expected = [
        [0, 1, 2, 3, 4, 4, 4, 4, 6, 7, 8, 9, 9, 9, 9, 11],
        [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 10, 10, 9, 9, 11],
        [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 10, 9, 10, 9, 11],
    ]
    np.testing.assert_array_equal(sample.positions, expected)
    np.testing.assert_array_equal(answer_positions(tokens, 4, SPECIAL, "grid"), expected[0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from([1, 4, 9]),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=2),
)
def test_a_grid_has_the_positions_of_images_and_turning_reverses_every_second(seed, texts, size, images):
    sample = random_sample(np.random.default_rng(seed), tuple(texts), size, tuple(images))
    text, grid, turning = (positions_of(sample, rule, size) for rule in ("text", "grid", "turning_grid"))
    np.testing.assert_array_equal(text, sample.positions)
    as_images = np.where(sample.tokens == SPECIAL.latent_pad, SPECIAL.image_pad, sample.tokens)
    side = int(size**0.5)
    shown = mrope_positions(as_images, [*images, *[(side, side)] * (len(texts) - 1)], SPECIAL.image_pad)
    np.testing.assert_array_equal(grid, shown)
    for number, start in enumerate(sample.slot_starts):
        look = slice(start, start + size)
        np.testing.assert_array_equal(turning[:, look], grid[:, look][:, :: -1 if number % 2 else 1])
    outside = sample.tokens != SPECIAL.latent_pad
    np.testing.assert_array_equal(turning[:, outside], grid[:, outside])


@pytest.mark.parametrize("rule", ["text", "grid"])
def test_images_without_their_tokens_are_an_error(rule):
    sample = random_sample(np.random.default_rng(0), (2, 1), 4)
    with pytest.raises(ValueError, match="image tokens must be as many as"):
        sample_positions(sample.tokens, [(9, 9)], sample.slot_starts, 4, SPECIAL, rule, mrope_positions)
