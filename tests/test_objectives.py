"""Losses and selection: raggedness is harmless, gradients reach what they should, settings do what they say."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_jax.latents.layout import collate, merge_layouts, required_layout, sample_columns
from ilvr_jax.latents.objectives import (
    alignment_objective,
    autonomy_objective,
    cross_entropy,
    slot_noise,
    text_objective,
)
from ilvr_jax.latents.selection import LatentSettings, group_neighbours, pick
from ilvr_jax.models.attention import causal_mask
from ilvr_jax.models.qwen2_5_vl import Qwen2_5VL
from tests.samples import CONFIG, SPECIAL, WINDOW_UNITS, random_sample

MODEL = Qwen2_5VL(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
TEACHER = MODEL.init(jax.random.key(1))["decoder"]
SETTINGS = LatentSettings(latent_size=3, candidates=5, target_noise=0.01)
KEY = jax.random.key(2)


def unequal_samples():
    """Samples that differ in everything: images and their sizes, segments, slots, lengths of text."""
    rng = np.random.default_rng(3)
    return [
        random_sample(rng, texts=(5, 3, 4), images=((2, 3),), helpers=((1, 2), (4, 3)), record=0),
        random_sample(rng, texts=(2, 0, 6, 1), images=((3, 3), (1, 4)), helpers=((2, 2),) * 3, record=1),
        random_sample(rng, texts=(14,), images=((1, 1),), record=2),
        random_sample(rng, texts=(1, 9), images=(), helpers=((5, 1),), latent_size=2, record=3),
    ]


def losses(name, params, batch):
    if name == "text":
        return text_objective(MODEL, params, batch, KEY)
    if name == "autonomy":
        return autonomy_objective(MODEL, params, batch, KEY)
    return alignment_objective(MODEL, params, TEACHER, batch, SETTINGS, KEY)[0]


def loss_and_gradient(name, batch):
    def loss(params):
        result = losses(name, params, batch)
        return result.loss.sum(), result

    return jax.jit(jax.grad(loss, has_aux=True))(PARAMS)


@pytest.mark.parametrize("name", ["text", "alignment", "autonomy"])
def test_a_ragged_batch_equals_its_samples_alone(name):
    samples = unequal_samples()
    layout = merge_layouts([required_layout(sample, WINDOW_UNITS) for sample in samples])
    roomy = dataclasses.replace(
        layout, prefix=layout.prefix + 3, text=layout.text + 2, tail=layout.tail + 1, image_windows=12, images=3
    )
    gradients, together = loss_and_gradient(name, collate(samples, roomy, SPECIAL, WINDOW_UNITS))
    summed = jax.tree.map(jnp.zeros_like, gradients)
    for row, sample in enumerate(samples):
        alone_layout = required_layout(sample, WINDOW_UNITS)
        alone_gradients, alone = loss_and_gradient(name, collate([sample], alone_layout, SPECIAL, WINDOW_UNITS))
        summed = jax.tree.map(jnp.add, summed, alone_gradients)
        columns, alone_columns = sample_columns(sample, roomy), sample_columns(sample, alone_layout)
        for field in ("loss", "cross_entropy", "similarity", "filled_slots"):
            np.testing.assert_allclose(getattr(together, field)[row], getattr(alone, field)[0], atol=1e-5)
        np.testing.assert_allclose(together.hidden[row][columns], alone.hidden[0][alone_columns], atol=1e-4)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        expected = np.asarray(_at(summed, path))
        np.testing.assert_allclose(leaf, expected, atol=1e-4 * max(1.0, np.abs(expected).max()), err_msg=str(path))


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_the_roll_out_equals_recomputing_every_prefix():
    """The published way: the whole sequence again for every slot."""
    samples = unequal_samples()[:2]
    layout = merge_layouts([required_layout(sample, WINDOW_UNITS) for sample in samples])
    batch = collate(samples, layout, SPECIAL, WINDOW_UNITS)
    features = MODEL.encode_images(PARAMS["vision"], batch.images)

    def recomputed(decoder):
        inputs = MODEL.embed(decoder, batch.tokens, batch.image_index, features)
        for column in layout.slot_columns.reshape(-1):
            hidden, _ = MODEL.decode(decoder, inputs, batch.positions, causal_mask(batch.valid))
            inputs = inputs.at[:, column].set(hidden[:, column - 1])
        hidden, _ = MODEL.decode(decoder, inputs, batch.positions, causal_mask(batch.valid))
        return jnp.where(batch.valid[..., None], hidden, 0.0)

    def rolled_out(decoder):
        hidden = autonomy_objective(MODEL, {**PARAMS, "decoder": decoder}, batch, KEY).hidden
        return jnp.where(batch.valid[..., None], hidden, 0.0)

    weights = jax.random.normal(KEY, (*batch.tokens.shape, CONFIG.hidden_size))
    np.testing.assert_allclose(rolled_out(PARAMS["decoder"]), recomputed(PARAMS["decoder"]), atol=2e-5)
    ours = jax.jit(jax.grad(lambda decoder: (rolled_out(decoder) * weights).sum()))(PARAMS["decoder"])
    theirs = jax.jit(jax.grad(lambda decoder: (recomputed(decoder) * weights).sum()))(PARAMS["decoder"])
    for leaf, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(leaf, expected, atol=1e-4 * max(1.0, float(jnp.abs(expected).max())))


@pytest.mark.parametrize("name", ["alignment", "autonomy"])
def test_without_segments_every_stage_is_plain_cross_entropy(name):
    sample = unequal_samples()[2]
    batch = collate([sample], required_layout(sample, WINDOW_UNITS), SPECIAL, WINDOW_UNITS)
    gradients, result = loss_and_gradient(name, batch)
    expected_gradients, expected = loss_and_gradient("text", batch)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-6)
    assert float(result.filled_slots[0]) == 0
    for leaf, value in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(leaf, value, atol=1e-5)


def test_without_images_the_query_is_the_mean_embedding_of_the_prompt():
    sample = unequal_samples()[3]
    batch = collate([sample], required_layout(sample, WINDOW_UNITS), SPECIAL, WINDOW_UNITS)
    selection = alignment_objective(MODEL, PARAMS, TEACHER, batch, SETTINGS, KEY)[1]
    prompt = sample.tokens[: int(np.flatnonzero(sample.tokens == SPECIAL.assistant)[0]) - 1]
    expected = np.asarray(TEACHER["embed_tokens"])[prompt].mean(0)
    np.testing.assert_allclose(selection.user_query[0], expected, atol=1e-6)


def test_noise_does_not_depend_on_the_layout():
    wide = slot_noise(KEY, jnp.array([4, 9]), (2, 3, 5, 8))
    narrow = slot_noise(KEY, jnp.array([9]), (1, 2, 4, 8))
    np.testing.assert_array_equal(wide[1:, :2, :4], narrow)
    assert len(np.unique(np.asarray(wide))) == wide.size
    many = np.asarray(slot_noise(KEY, jnp.arange(50), (50, 4, 4, 32)))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_no_gradient_reaches_the_teacher():
    samples = unequal_samples()[:1]
    batch = collate(samples, required_layout(samples[0], WINDOW_UNITS), SPECIAL, WINDOW_UNITS)
    gradient = jax.grad(
        lambda teacher: alignment_objective(MODEL, PARAMS, teacher, batch, SETTINGS, KEY)[0].loss.sum()
    )(TEACHER)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_weights_of_the_two_losses_and_the_noise_of_the_targets():
    samples = unequal_samples()[:1]
    batch = collate(samples, required_layout(samples[0], WINDOW_UNITS), SPECIAL, WINDOW_UNITS)

    def result(**changes):
        changed = dataclasses.replace(SETTINGS, **changes)
        return alignment_objective(MODEL, PARAMS, TEACHER, batch, changed, KEY)[0]

    quiet, noisy = result(target_noise=0.0), result(target_noise=0.5)
    assert abs(float(quiet.similarity[0]) - float(noisy.similarity[0])) > 1e-3
    weighted = result(target_noise=0.0, ce_weight=2.0, sim_weight=3.0)
    expected = 2 * quiet.cross_entropy + 3 * (1 - quiet.similarity)
    np.testing.assert_allclose(weighted.loss, expected, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_grouping_takes_means_of_neighbours(count, candidates, seed):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((1, 1, 40, 3)).astype(np.float32)
    valid = np.arange(40)[None, None] < count
    for grouping in ("published", "complete"):
        means, group_valid = group_neighbours(jnp.asarray(features), jnp.asarray(valid), candidates, grouping)
        groups = np.asarray(means)[0, 0][np.asarray(group_valid)[0, 0]]
        real = features[0, 0, :count]
        if count <= candidates:
            np.testing.assert_allclose(groups, real, atol=1e-6)
        elif grouping == "published":
            size = count // candidates
            expected = real[: size * candidates].reshape(candidates, size, 3).mean(1)
            np.testing.assert_allclose(groups, expected, atol=1e-5)
        else:
            assert len(groups) == candidates
            parts = [real[np.arange(count) * candidates // count == group] for group in range(candidates)]
            np.testing.assert_allclose(groups, [part.mean(0) for part in parts], atol=1e-5)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=1, max_size=12, unique=True),
    st.floats(0.05, 1.0),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_picks_cover_the_mass_with_as_few_as_possible(cosines, coverage, temperature, slots, padding):
    how = LatentSettings(coverage=coverage, temperature=temperature)
    padded = jnp.array([[*cosines, *[2.0] * padding]], jnp.float32)
    valid = jnp.arange(padded.shape[1])[None] < len(cosines)
    chosen, keep = pick(padded, valid, jnp.ones((1, slots), bool), how)
    chosen = np.asarray(chosen[0])[np.asarray(keep[0])]
    mass = np.exp(np.array(cosines, np.float64) / temperature)
    mass /= mass.sum()
    order = np.argsort(-np.array(cosines, np.float32), kind="stable")
    np.testing.assert_array_equal(chosen, order[: len(chosen)])
    assert 1 <= len(chosen) <= min(slots, len(cosines))
    assert mass[chosen[:-1]].sum() < coverage + 1e-5
    if len(chosen) < min(slots, len(cosines)):
        assert mass[chosen].sum() >= coverage - 1e-5


def whole_cross_entropy(decoder, hidden, targets):
    """What `cross_entropy` computes in chunks, with all logits at once."""
    log_probabilities = jax.nn.log_softmax(MODEL.logits(decoder, hidden), axis=-1)
    picked = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    labelled = targets >= 0
    return -(picked * labelled).sum(1) / jnp.maximum(labelled.sum(1), 1)


@pytest.mark.parametrize("columns_a_chunk", [1, 4, 7, 50])
def test_cross_entropy_in_chunks_is_that_of_all_logits(columns_a_chunk):
    rows, columns = 3, 22
    rng = np.random.default_rng(columns_a_chunk)
    hidden = jnp.asarray(rng.normal(size=(rows, columns, CONFIG.hidden_size)), jnp.float32)
    targets = np.where(rng.random((rows, columns)) < 0.4, rng.integers(0, CONFIG.vocab_size, (rows, columns)), -100)
    targets[1] = -100  # a row without labels
    weights = jnp.array([1.0, 2.0, 3.0])

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda *inputs: (function(*inputs, targets) * weights).sum(), (0, 1)))

    def in_chunks(decoder, hidden, targets):
        return cross_entropy(MODEL, decoder, hidden, targets, columns_a_chunk * rows * CONFIG.vocab_size)

    ours, theirs = (loss(f)(PARAMS["decoder"], hidden) for f in (in_chunks, whole_cross_entropy))
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_logits_of_all_columns_never_exist():
    """No array of the compiled gradient is larger than a chunk's logits and the weights."""
    rows, columns, chunk = 2, 4096, 64
    hidden, targets = jnp.zeros((rows, columns, CONFIG.hidden_size)), jnp.zeros((rows, columns), jnp.int32)

    def loss(decoder, hidden):
        return cross_entropy(MODEL, decoder, hidden, targets, chunk * rows * CONFIG.vocab_size).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(PARAMS["decoder"], hidden).compile()
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    with_vocabulary = [size for size in (tuple(map(int, shape.split(","))) for shape in shapes) if 48 in size]
    assert max(map(np.prod, with_vocabulary)) <= chunk * rows * CONFIG.vocab_size
    assert CONFIG.vocab_size == 48
