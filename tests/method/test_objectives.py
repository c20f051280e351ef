"""Losses and selection: raggedness is harmless, gradients reach the right parameters, settings have their effect."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.method.layout import collate, merge_layouts, required_layout, sample_columns
from ilvr_jax.method.objectives import (
    OBJECTIVES,
    alignment_loss,
    autonomy_loss,
    contrast,
    cross_entropy,
    slot_noise,
)
from ilvr_jax.method.selection import SELECTORS, Selection, group_neighbours, pick_coverage
from ilvr_jax.method.slots import SLOT_INPUTS, SlotInput, fill_slots, init_params, with_slot_parameters
from ilvr_jax.models.attention import causal_mask
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from tests.samples import CONFIG, GEOMETRY, SPECIAL, random_sample, seen_until_look

MODEL = Qwen2_5VL(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
TEACHER = {"decoder": MODEL.init(jax.random.key(1))["decoder"]}
SETTINGS = LatentsConfig(latent_size=3, candidates=5, target_noise=0.01)
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


def in_grids(sample):
    """Return a sample with its slots at other places of grids than those before and after."""
    slots = np.flatnonzero(sample.tokens == SPECIAL.latent_pad)
    positions = sample.positions.copy()
    positions[1:, slots] += np.stack([np.arange(len(slots)) // 2, 3 * np.arange(len(slots)) % 4])
    return dataclasses.replace(sample, positions=positions)


def loss_and_gradient(name, batch, settings=SETTINGS, model=MODEL, params=PARAMS):
    def loss(params):
        result = OBJECTIVES[name].loss(model, params, TEACHER, batch, settings, KEY)
        return result.loss.sum(), result

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def figures(result, row):
    """Losses and metrics of a row."""
    return {"loss": result.loss[row], "cross_entropy": result.cross_entropy[row]} | {
        name: metric.values[row] for name, metric in result.metrics.items()
    }


VISIBILITIES = [SETTINGS, dataclasses.replace(SETTINGS, image_visibility="until_look", contrast_weight=0.7)]


@pytest.mark.parametrize(
    ("name", "visibility"),
    [("text", 1), ("alignment", 0), ("guided", 1), ("autonomy", 0)],
)
def test_a_ragged_batch_equals_its_samples_alone(name, visibility):
    samples, settings = unequal_samples(), VISIBILITIES[visibility]
    layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in samples])
    roomy = dataclasses.replace(
        layout, prefix=layout.prefix + 3, text=layout.text + 2, tail=layout.tail + 1, image_tokens=48, images=3
    )
    gradients, together = loss_and_gradient(name, collate(samples, roomy, SPECIAL, GEOMETRY), settings)
    summed = jax.tree.map(jnp.zeros_like, gradients)
    for row, sample in enumerate(samples):
        alone_layout = required_layout(sample, GEOMETRY)
        alone_gradients, alone = loss_and_gradient(name, collate([sample], alone_layout, SPECIAL, GEOMETRY), settings)
        summed = jax.tree.map(jnp.add, summed, alone_gradients)
        columns, alone_columns = sample_columns(sample, roomy), sample_columns(sample, alone_layout)
        expected = figures(alone, 0)
        for field, value in figures(together, row).items():
            np.testing.assert_allclose(value, expected[field], atol=1e-5)
        np.testing.assert_allclose(together.hidden[row][columns], alone.hidden[0][alone_columns], atol=1e-4)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        expected = np.asarray(_at(summed, path))
        np.testing.assert_allclose(leaf, expected, atol=1e-4 * max(1.0, np.abs(expected).max()), err_msg=str(path))


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def model_with(slot_input):
    """A model whose slots are filled by a rule, and its parameters; those of the rule are all far from zero."""
    model = Qwen2_5VL(dataclasses.replace(CONFIG, slot_input=slot_input))
    params = with_slot_parameters(model, PARAMS, jax.random.key(7))
    own = params["decoder"].get("slot_input", {})
    leaves, tree = jax.tree.flatten(own)
    moved = [leaf + 0.3 * jax.random.normal(jax.random.key(n), leaf.shape) for n, leaf in enumerate(leaves)]
    return model, {**params, "decoder": {**params["decoder"], "slot_input": jax.tree.unflatten(tree, moved)}}


def add_embedding(hidden_states, embeddings, parameters, places):
    """A rule that uses the embedding too, as a fork might."""
    return 0.5 * hidden_states + embeddings


@pytest.mark.parametrize(
    ("slot_input", "visibility"), [("hidden", 0), ("placed", 1), ("projected", 0), ("add_embedding", 1)]
)
def test_the_roll_out_equals_recomputing_every_prefix(slot_input, visibility, monkeypatch):
    """The published way: the whole sequence again for every slot."""
    settings = VISIBILITIES[visibility]
    monkeypatch.setitem(SLOT_INPUTS, "add_embedding", SlotInput(add_embedding))
    model, params = model_with(slot_input)
    samples = [in_grids(sample) for sample in unequal_samples()[:2]]
    layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in samples])
    batch = collate(samples, layout, SPECIAL, GEOMETRY)
    features = jax.jit(model.encode_images)(params["vision"], batch.images)
    mask = np.array(causal_mask(batch.valid))
    if settings.image_visibility == "until_look":
        for row, sample in enumerate(samples):
            columns = sample_columns(sample, layout)
            mask[row][np.ix_(columns, columns)] = seen_until_look(sample.tokens)
        assert (mask != causal_mask(batch.valid)).any((1, 2)).all()
    fill = SLOT_INPUTS[slot_input].fill

    def recomputed(decoder):
        embedded = model.embed(decoder, batch.tokens, batch.image_index, features)

        def fill_column(inputs, column):
            hidden, _ = model.decode(decoder, inputs, batch.positions, mask)
            positions = jnp.asarray(batch.positions)[..., column]
            places = positions[:, 1:] - positions[:, :1]
            filled = fill(hidden[:, column - 1], embedded[:, column], decoder["slot_input"], places)
            return inputs.at[:, column].set(filled), None

        columns = layout.slot_columns.reshape(-1)
        inputs, _ = jax.lax.scan(fill_column, embedded, columns)
        hidden, _ = model.decode(decoder, inputs, batch.positions, mask)
        return jnp.where(batch.valid[..., None], hidden, 0.0)

    def rolled_out(decoder):
        hidden = autonomy_loss(model, {**params, "decoder": decoder}, None, batch, settings, KEY).hidden
        return jnp.where(batch.valid[..., None], hidden, 0.0)

    weights = jax.random.normal(KEY, (*batch.tokens.shape, CONFIG.hidden_size))

    def hidden_and_gradient(function):
        def weighted(decoder):
            hidden = function(decoder)
            return (hidden * weights).sum(), hidden

        gradient, hidden = jax.jit(jax.grad(weighted, has_aux=True))(params["decoder"])
        return hidden, gradient

    (hidden, ours), (expected_hidden, theirs) = map(hidden_and_gradient, (rolled_out, recomputed))
    np.testing.assert_allclose(hidden, expected_hidden, atol=2e-5)
    for (path, leaf), expected in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(1.0, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(leaf, expected, atol=1e-4 * scale, err_msg=str(path))
    for leaf in jax.tree.leaves(ours["slot_input"]):
        assert jnp.abs(leaf).max() > 1e-3


@pytest.mark.parametrize(
    ("selection", "slot_input"),
    [
        *((selection, "hidden") for selection in SELECTORS),
        *(("coverage", slot_input) for slot_input in ("normed", "placed", "projected", "pause")),
    ],
)
def test_every_rule_treats_a_ragged_batch_as_its_samples_alone(selection, slot_input):
    model, params = model_with(slot_input)
    settings = dataclasses.replace(SETTINGS, selection=selection)
    samples = [in_grids(sample) for sample in unequal_samples()]
    layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in samples])
    loss = jax.jit(lambda *parts: alignment_loss(model, *parts, settings, KEY).loss)
    together = loss(params, TEACHER, collate(samples, layout, SPECIAL, GEOMETRY))
    for row, sample in enumerate(samples):
        alone = loss(params, TEACHER, collate([sample], required_layout(sample, GEOMETRY), SPECIAL, GEOMETRY))
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5)


def test_placed_slots_are_told_apart_by_the_row_and_the_column_of_their_place():
    """Codes of neighbours are nearly orthogonal, and a cell's is the sum of its row's and its column's."""
    model, params = model_with("placed")
    states = jnp.zeros((8, 8, 128))
    rows, columns = jnp.meshgrid(jnp.arange(8), jnp.arange(8), indexing="ij")
    codes = fill_slots(model, params["decoder"], states, states, jnp.stack([rows, columns], axis=-1))
    np.testing.assert_allclose(codes, codes[:, :1] + codes[:1] - codes[:1, :1], atol=1e-5)
    cosines = jnp.einsum("rcx,sdx->rcsd", codes, codes) / 64
    np.testing.assert_allclose(jnp.einsum("rcrc->rc", cosines), 1.0, atol=1e-5)
    others = cosines - jnp.einsum("rs,cd->rcsd", jnp.eye(8), jnp.eye(8))
    assert others.max() < 0.7 and jnp.abs(others).mean() < 0.2


def test_a_pause_carries_nothing_from_one_column_to_the_next():
    """Whatever the hidden states are, slots that hold a constant are filled alike."""
    model, params = model_with("pause")
    hidden, embedding = jax.random.normal(KEY, (2, 3, 4, CONFIG.hidden_size)), jnp.zeros((3, 4, CONFIG.hidden_size))
    one, other = (fill_slots(model, params["decoder"], states, embedding, None) for states in hidden)
    np.testing.assert_array_equal(one, other)
    assert len(np.unique(np.asarray(one).reshape(-1, CONFIG.hidden_size), axis=0)) == 1


def test_a_projection_starts_as_the_hidden_state_itself():
    model = Qwen2_5VL(dataclasses.replace(CONFIG, slot_input="projected"))
    decoder = init_params(model, KEY)["decoder"]
    hidden = jax.random.normal(KEY, (3, CONFIG.hidden_size))
    np.testing.assert_array_equal(fill_slots(model, decoder, hidden, jnp.zeros_like(hidden), None), hidden)


@pytest.mark.parametrize("selection", ["dense", "top_k", "random"])
def test_rules_for_targets(selection):
    rng = np.random.default_rng(1)
    cosines = jnp.asarray(rng.uniform(-1, 1, (400, 9)), jnp.float32)
    valid = jnp.arange(9)[None] < jnp.asarray(rng.integers(0, 10, 400))[:, None]
    slots, keys = jnp.arange(4)[None] < jnp.full((400, 1), 4), jax.random.split(KEY, 400)
    chosen, keep = SELECTORS[selection].pick(cosines, valid, slots, SETTINGS, keys)
    first = np.zeros(9)
    for row in range(400):
        count = int(valid[row].sum())
        picks = np.asarray(chosen[row])[np.asarray(keep[row])]
        assert len(picks) == len(set(picks)) == min(4, count) and (picks < count).all()
        if selection == "dense":
            np.testing.assert_array_equal(picks, np.arange(min(4, count)))
        elif selection == "top_k":
            np.testing.assert_array_equal(picks, np.argsort(-np.asarray(cosines[row, :count]), kind="stable")[:4])
        elif count == 9:
            first[picks[0]] += 1
    if selection == "random":  # each candidate is as likely: 40 rows have all nine, on average
        assert first.max() < first.sum() / 2 and (first > 0).sum() >= 6


def selected(batch, settings):
    """Return the teacher's selection for a batch."""
    select = jax.jit(lambda *parts: alignment_loss(MODEL, *parts, settings, KEY).selection)
    return select(PARAMS, TEACHER, batch)


def test_dense_targets_are_the_whole_image_pooled_in_raster_order():
    sample = unequal_samples()[0]
    batch = collate([sample], required_layout(sample, GEOMETRY), SPECIAL, GEOMETRY)
    selection = selected(batch, dataclasses.replace(SETTINGS, selection="dense"))
    features = jax.jit(MODEL.encode_images)(PARAMS["vision"], batch.helper_images)
    features = np.asarray(features[0, 1])[:12]  # of 4 x 3 units
    np.testing.assert_allclose(selection.targets[0, 1], features.reshape(3, 4, -1).mean(1), atol=1e-5)


@pytest.mark.parametrize("name", ["alignment", "guided", "autonomy"])
def test_without_segments_every_stage_is_plain_cross_entropy(name):
    sample = unequal_samples()[2]
    batch = collate([sample], required_layout(sample, GEOMETRY), SPECIAL, GEOMETRY)
    gradients, result = loss_and_gradient(name, batch)
    expected_gradients, expected = loss_and_gradient("text", batch)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-6)
    if name == "alignment":
        assert float(result.metrics["filled_slots"].values[0]) == 0
    for leaf, value in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(leaf, value, atol=1e-5)


def test_some_records_of_a_guided_stage_hold_targets():
    """Each row has the loss of guidance or that of alignment, whichever the record draws."""
    sample = unequal_samples()[0]
    samples = [dataclasses.replace(sample, record=record) for record in range(12)]
    batch = collate(samples, required_layout(sample, GEOMETRY), SPECIAL, GEOMETRY)
    quiet = dataclasses.replace(SETTINGS, target_noise=0.0)

    def losses(name, share):
        settings = dataclasses.replace(quiet, own_share=share)
        return np.asarray(jax.jit(lambda: OBJECTIVES[name].loss(MODEL, PARAMS, TEACHER, batch, settings, KEY).loss)())

    own, targets, mixed = losses("guided", 1.0), losses("alignment", 1.0), losses("guided", 0.5)
    is_own = np.isclose(mixed, own, atol=1e-5)
    assert not np.isclose(own, targets, atol=1e-3).any() and 2 < is_own.sum() < 10
    np.testing.assert_allclose(mixed, np.where(is_own, own, targets), atol=1e-5)


def test_without_images_the_query_is_the_mean_embedding_of_the_prompt():
    sample = unequal_samples()[3]
    batch = collate([sample], required_layout(sample, GEOMETRY), SPECIAL, GEOMETRY)
    selection = selected(batch, SETTINGS)
    prompt = sample.tokens[: int(np.flatnonzero(sample.tokens == SPECIAL.assistant)[0]) - 1]
    expected = np.asarray(TEACHER["decoder"]["embed_tokens"])[prompt].mean(0)
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
    batch = collate(samples, required_layout(samples[0], GEOMETRY), SPECIAL, GEOMETRY)

    def loss(teacher):
        return alignment_loss(MODEL, PARAMS, teacher, batch, SETTINGS, KEY).loss.sum()

    gradient = jax.jit(jax.grad(loss))(TEACHER)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_weights_of_the_two_losses_and_the_noise_of_the_targets():
    samples = unequal_samples()[:1]
    batch = collate(samples, required_layout(samples[0], GEOMETRY), SPECIAL, GEOMETRY)

    @jax.jit
    def result(target_noise, ce_weight=SETTINGS.ce_weight, sim_weight=SETTINGS.sim_weight):
        changes = {"target_noise": target_noise, "ce_weight": ce_weight, "sim_weight": sim_weight}
        return alignment_loss(MODEL, PARAMS, TEACHER, batch, dataclasses.replace(SETTINGS, **changes), KEY)

    quiet, noisy = result(0.0), result(0.5)
    similarity = quiet.metrics["similarity"].values
    assert abs(float(similarity[0]) - float(noisy.metrics["similarity"].values[0])) > 1e-3
    weighted = result(0.0, 2.0, 3.0)
    expected = 2 * quiet.cross_entropy + 3 * (1 - similarity)
    np.testing.assert_allclose(weighted.loss, expected, rtol=1e-5)


def test_contrast_is_the_log_probability_of_the_target_among_those_of_the_answer():
    rng = np.random.default_rng(4)
    hidden, targets = rng.standard_normal((2, 2, 3, 2, 8)).astype(np.float32)
    targets[0, 2, 1] = 3 * targets[0, 0, 0]  # the same direction: the same target
    valid = np.array([[[True, True], [True, False], [False, True]], [[False, False]] * 3])
    selection = Selection(targets, valid, None, None, None)
    given, gradient = jax.value_and_grad(lambda hidden: contrast(hidden, selection, 0.2).sum())(jnp.asarray(hidden))
    losses = []
    for segment, slot in np.argwhere(valid[0]):
        state = hidden[0, segment, slot]
        exponentials = {
            tuple(place): np.exp(
                state @ targets[0, *place] / np.linalg.norm(state) / np.linalg.norm(targets[0, *place]) / 0.2
            )
            for place in np.argwhere(valid[0])
        }
        own = [(0, 0), (2, 1)] if (segment, slot) in ((0, 0), (2, 1)) else [(segment, slot)]
        losses.append(-np.log(sum(exponentials[place] for place in own) / sum(exponentials.values())))
    np.testing.assert_allclose(given, np.mean(losses), rtol=1e-4)
    assert np.isfinite(gradient).all() and not np.asarray(gradient[1]).any()


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


@jax.jit
def pick_jitted(cosines, valid, slots, coverage, temperature):
    return pick_coverage(cosines, valid, slots, LatentsConfig(coverage=coverage, temperature=temperature), None)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=1, max_size=12, unique=True),
    st.floats(0.05, 1.0),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_picks_cover_the_mass_with_as_few_as_possible(cosines, coverage, temperature, slots, padding):
    width = next(width for width in (4, 9, 15) if width >= len(cosines) + padding)  # few, since each is compiled
    padded = np.array([[*cosines, *[2.0] * (width - len(cosines))]], np.float32)
    valid = np.arange(width)[None] < len(cosines)
    chosen, keep = pick_jitted(padded, valid, np.ones((1, slots), bool), coverage, temperature)
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
    """Return the result of `cross_entropy`, computed with all logits at once."""
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
