"""The slot-aligned layout: nothing lost, nothing out of order, slots where they belong."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_jax.method.layout import Layout, build_sample, collate, fits, merge_layouts, required_layout, sample_columns
from ilvr_jax.method.tokens import Role
from tests.samples import GEOMETRY, SPECIAL, random_image, random_sample

samples = st.builds(
    lambda seed, texts, size, images: random_sample(np.random.default_rng(seed), tuple(texts), size, tuple(images)),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(samples, min_size=1, max_size=4))
def test_a_merged_layout_holds_every_sample_whole(batch_samples):
    layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in batch_samples])
    batch = collate(batch_samples, layout, SPECIAL, GEOMETRY)
    assert batch.tokens.shape == (len(batch_samples), layout.columns)
    for row, sample in enumerate(batch_samples):
        assert fits(sample, layout, GEOMETRY)
        columns = sample_columns(sample, layout)
        assert (np.diff(columns) > 0).all()
        np.testing.assert_array_equal(batch.tokens[row, batch.valid[row]], sample.tokens)
        np.testing.assert_array_equal(batch.positions[row][:, columns], sample.positions)
        for segment, start in enumerate(sample.slot_starts):
            size = sample.latent_size
            np.testing.assert_array_equal(columns[start : start + size], layout.slot_columns[segment, :size])
            # The hidden state that predicts the first slot stands in the column before it.
            assert columns[start - 1] == layout.slot_columns[segment, 0] - 1
        # The last token of a prompt or an answer stands in the last column.
        assert columns[-1] == layout.columns - 1
        features = batch.image_index[row][batch.roles[row] == Role.IMAGE]
        grid = batch.images.unit_valid[row].reshape(-1)
        np.testing.assert_array_equal(features, np.flatnonzero(grid))


@settings(max_examples=100, deadline=None)
@given(samples)
def test_targets_are_the_next_labelled_tokens(sample):
    layout = dataclasses.replace(required_layout(sample, GEOMETRY), tail=20)
    batch = collate([sample], layout, SPECIAL, GEOMETRY)
    columns = sample_columns(sample, layout)
    np.testing.assert_array_equal(batch.targets[0, columns[:-1]], sample.labels[1:])
    assert (batch.targets >= 0).sum() == (sample.labels >= 0).sum()
    labelled = sample.tokens[sample.labels >= 0]
    assert SPECIAL.latent_pad not in labelled
    assert (labelled == SPECIAL.latent_start).sum() == len(sample.slot_starts) == (labelled == SPECIAL.latent_end).sum()


@settings(max_examples=100, deadline=None)
@given(samples, st.data())
def test_fits_says_whether_collate_can(sample, data):
    need = required_layout(sample, GEOMETRY)
    field = data.draw(st.sampled_from(["prefix", "segments", "text", "tail", "latent_size", "images", "image_tokens"]))
    layout = dataclasses.replace(need, **{field: max(0, getattr(need, field) + data.draw(st.integers(-2, 2)))})
    if fits(sample, layout, GEOMETRY):
        batch = collate([sample], layout, SPECIAL, GEOMETRY)
        np.testing.assert_array_equal(batch.tokens[0, batch.valid[0]], sample.tokens)
    else:
        with pytest.raises(ValueError):
            collate([sample], layout, SPECIAL, GEOMETRY)


def test_columns_of_a_small_layout():
    layout = Layout(prefix=5, segments=2, text=3, tail=1, latent_size=2)
    assert layout.columns == 16
    np.testing.assert_array_equal(layout.slot_columns, [[5, 6], [10, 11]])
    np.testing.assert_array_equal(layout.column_segment, [0] * 7 + [1] * 5 + [2] * 4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 3, 7, 8, 9, 2], "must be 2 slots and an end marker"),
        ([1, 3, 7, 8, 8, 8, 9, 2], "must be 2 slots and an end marker"),
        ([1, 3, 8, 2], "must be in latent segments"),
        ([1, 2], "must hold an assistant header"),
    ],
)
def test_malformed_slots_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        build_sample(np.array(tokens), [], [], SPECIAL, 2)


def test_helper_images_are_one_a_segment_or_none():
    tokens = np.array([1, 3, 7, 8, 8, 9, 2])
    image = random_image(np.random.default_rng(0), 1, 1)
    assert build_sample(tokens, [], [], SPECIAL, 2).helper_images == ()
    assert build_sample(tokens, [], [image], SPECIAL, 2).helper_images == (image,)
    with pytest.raises(ValueError, match="1 latent segments must have a helper image each, got 2"):
        build_sample(tokens, [], [image, image], SPECIAL, 2)
