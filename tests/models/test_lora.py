"""LoRA adapters: nothing at the start, the same as merged weights, and the only thing that learns and moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilvr_jax.config.fields import BadConfig, read
from ilvr_jax.config.schema import LatentsConfig, LoraConfig, StageConfig
from ilvr_jax.method.layout import collate, merge_layouts, required_layout
from ilvr_jax.method.objectives import autonomy_loss, text_loss
from ilvr_jax.models.lora import decoder_params, merge_adapters, random_bits, split_adapters
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.training.optimizer import make_optimizer
from ilvr_jax.training.state import create_state
from ilvr_jax.training.step import make_train_step
from tests.samples import CONFIG, GEOMETRY, SPECIAL, random_sample

LORA = LoraConfig(rank=3, alpha=6.0)
MODEL, PLAIN = Qwen2_5VL(dataclasses.replace(CONFIG, lora=LORA)), Qwen2_5VL(CONFIG)
KEY = jax.random.key(3)
LATENTS = LatentsConfig(latent_size=2, tau=0.9)


def batch():
    rng = np.random.default_rng(0)
    rows = [random_sample(rng, texts, 2, ((2, 3),)) for texts in ((3, 4, 2), (5, 1), (2, 2, 2))]
    layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in rows])
    return collate(rows, layout, SPECIAL, GEOMETRY)


def moved(params):
    """Return parameters whose adapters have an effect."""
    adapters = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(KEY, leaf.shape), params["adapters"])
    return {**params, "adapters": adapters}


def test_fresh_adapters_add_nothing_and_leave_the_decoder_as_it_is():
    params, plain = MODEL.init(KEY), PLAIN.init(KEY)
    assert jax.tree.structure(params["decoder"]) == jax.tree.structure(plain["decoder"])
    with_adapters = text_loss(MODEL, params, None, batch(), LatentsConfig(), KEY)
    without = text_loss(
        PLAIN, {part: params[part] for part in ("vision", "decoder")}, None, batch(), LatentsConfig(), KEY
    )
    np.testing.assert_array_equal(with_adapters.loss, without.loss)
    joined = decoder_params(params)
    assert jax.tree.structure(split_adapters(joined)) == jax.tree.structure((params["decoder"], params["adapters"]))


@pytest.mark.parametrize("objective", [text_loss, autonomy_loss])
def test_merged_adapters_give_the_same_losses(objective):
    params = moved(MODEL.init(KEY))
    merged = merge_adapters(params, LORA)
    assert "adapters" not in merged
    ours = jax.jit(lambda params: objective(MODEL, params, None, batch(), LatentsConfig(), KEY).loss)(params)
    theirs = jax.jit(lambda params: objective(PLAIN, params, None, batch(), LatentsConfig(), KEY).loss)(merged)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    fresh = PLAIN.init(KEY)
    assert np.abs(theirs - objective(PLAIN, fresh, None, batch(), LatentsConfig(), KEY).loss).max() > 1e-3


def test_the_projections_of_the_selection_hold_the_adapters():
    params, hidden = moved(MODEL.init(KEY)), jax.random.normal(KEY, (2, 3, CONFIG.hidden_size))
    ours = MODEL.last_projections(decoder_params(params), hidden)
    theirs = PLAIN.last_projections(merge_adapters(params, LORA)["decoder"], hidden)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_adapters_alone_learn_and_the_teacher_follows_them():
    stage = StageConfig(
        "alignment",
        train=("adapters",),
        batch_size=3,
        steps=5,
        optimizer="adamw",
        learning_rate=1e-2,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
    )
    optimizer = make_optimizer(stage)
    params = MODEL.init(KEY)
    params["decoder"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["decoder"])
    before = jax.tree.map(np.asarray, params)
    state = create_state(params, optimizer, ("adapters",), with_teacher=True, key=jax.random.key(9))
    assert state.teacher.keys() == {"adapters"}
    step = make_train_step(MODEL, stage, LATENTS, optimizer)
    students = [before["adapters"]]
    for _ in range(4):
        state, metrics = step(state, batch())
        students.append(jax.tree.map(np.asarray, state.params["adapters"]))
    for part in ("vision", "decoder"):
        for one, other in zip(*map(jax.tree.leaves, (before[part], state.params[part])), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    tau = LATENTS.tau
    expected = students[0]
    for student in students[1:]:
        expected = jax.tree.map(lambda old, new: tau * old + (1 - tau) * new, expected, student)
    for one, other in zip(*map(jax.tree.leaves, (state.teacher["adapters"], expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(students[-1]["layers"]["q_proj_lora"]["b"])) > 1e-3


def test_dropout_is_drawn_anew_with_each_key_and_off_in_decoding():
    model = Qwen2_5VL(dataclasses.replace(CONFIG, lora=dataclasses.replace(LORA, dropout=0.5)))
    params = moved(model.init(KEY))

    def losses(seed):
        return np.asarray(autonomy_loss(model, params, None, batch(), LatentsConfig(), jax.random.key(seed)).loss)

    np.testing.assert_array_equal(losses(1), losses(1))
    assert np.abs(losses(1) - losses(2)).max() > 1e-4
    inputs, positions = jnp.ones((1, 2, CONFIG.hidden_size)), jnp.zeros((1, 3, 2), jnp.int32)
    mask = jnp.ones((1, 2, 2), bool)
    hidden, _ = model.decode(decoder_params(params), inputs, positions, mask)
    undropped, _ = MODEL.decode(decoder_params(params), inputs, positions, mask)
    np.testing.assert_array_equal(hidden, undropped)


def test_random_bits_are_even_and_alike_in_nothing():
    """Over keys that differ in little: every bit is as often set as not, and no two keys or channels agree."""
    keys = jax.vmap(lambda number: jax.random.fold_in(KEY, number))(jnp.arange(512))
    bits = np.asarray(random_bits(keys, 512))
    assert bits.dtype == np.uint32 and bits.shape == (512, 512)
    set_bits = (bits[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    np.testing.assert_allclose(set_bits.mean((0, 1)), 0.5, atol=0.005)  # 5 standard deviations
    signs = np.where(bits >= 2**31, 1.0, -1.0)
    limit = 6 * 512**-0.5
    for one in (signs, signs.T):
        agreement = one @ one.T / 512
        assert np.abs(agreement - np.eye(512)).max() < limit
        assert np.abs(one.mean(1)).max() < limit
    assert np.abs((signs[:, 1:] * signs[:, :-1]).mean()) < 0.01 > np.abs((signs[1:] * signs[:-1]).mean())


@pytest.mark.parametrize(
    ("key", "value"), [("rank", -1), ("alpha", 0.0), ("dropout", 1.0), ("targets", ("qkv",)), ("targets", ())]
)
def test_a_bad_value_is_named(key, value):
    with pytest.raises(BadConfig, match=f"`model.lora.{key}` must .*, got"):
        read(LoraConfig, {key: value}, "model.lora")
