"""The train step gives the same numbers rematerialised, accumulated, and with rows alone or together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ilvr_jax.config.fields import BadConfig, read
from ilvr_jax.config.schema import StageConfig
from ilvr_jax.method.layout import collate, merge_layouts, required_layout
from ilvr_jax.method.objectives import OBJECTIVES
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.training.optimizer import decayed, learning_rate_schedule, make_optimizer
from ilvr_jax.training.state import create_state
from ilvr_jax.training.step import loss_and_gradients, make_train_step
from tests.samples import CONFIG, GEOMETRY, POISON, SPECIAL, poison_objective
from tests.steps import LATENTS, assert_same, gradients, lay_out, samples, stage


def test_slots_without_helper_images_are_accumulated():
    """Stage 2 carries no helper images: their arrays are empty."""
    rows = [dataclasses.replace(sample, helper_images=()) for sample in samples()]
    layout = dataclasses.replace(merge_layouts([required_layout(row, GEOMETRY) for row in rows]), helper_tokens=0)
    batch = collate(rows, layout, SPECIAL, GEOMETRY)
    assert batch.helper_images.pixels.size == 0
    assert_same(gradients("autonomy", batch), gradients("autonomy", batch, accumulation=2))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rematerialisation_accumulation_and_batching_change_nothing(name):
    whole = gradients(name, lay_out(samples()))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole[1])) > 1e-2
    for policy in ("full", "dots_saveable"):
        assert_same(whole, gradients(name, lay_out(samples()), remat_policy=policy))
    assert_same(whole, gradients(name, lay_out(samples()), accumulation=4))
    alone = [gradients(name, lay_out([sample])) for sample in samples()]
    assert_same(whole, jax.tree.map(lambda *parts: sum(parts) / len(parts), *alone))


def test_the_teacher_is_the_closed_form_average_of_the_students():
    model, batch = Qwen2_5VL(CONFIG), lay_out(samples())
    optimizer = make_optimizer(stage())
    state = create_state(
        model.init(jax.random.key(0)), optimizer, ("decoder",), with_teacher=True, key=jax.random.key(5)
    )
    step = make_train_step(model, stage(), LATENTS, optimizer)
    students = [jax.tree.map(np.asarray, state.params["decoder"])]
    vision = jax.tree.map(np.asarray, state.params["vision"])
    for _ in range(5):
        state, _ = step(state, batch)
        students.append(jax.tree.map(np.asarray, state.params["decoder"]))
    tau, count = LATENTS.tau, len(students) - 1
    weights = [tau**count, *((1 - tau) * tau ** (count - number) for number in range(1, count + 1))]
    expected = jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *students)
    moved = 0.0
    for leaf, value, first in zip(*map(jax.tree.leaves, (state.teacher, expected, students[0])), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, value, atol=1e-6)
        moved = max(moved, np.abs(leaf - first).max())
    assert moved > 1e-2
    for leaf, first in zip(jax.tree.leaves(state.params["vision"]), jax.tree.leaves(vision), strict=True):
        np.testing.assert_array_equal(leaf, first)
    assert step._cache_size() == 1


def test_tau_one_freezes_the_teacher():
    model, batch = Qwen2_5VL(CONFIG), lay_out(samples())
    optimizer = make_optimizer(stage())
    state = create_state(
        model.init(jax.random.key(0)), optimizer, ("decoder",), with_teacher=True, key=jax.random.key(5)
    )
    first = jax.tree.map(np.asarray, state.teacher)
    step = make_train_step(model, stage(), dataclasses.replace(LATENTS, tau=1.0), optimizer)
    state, _ = step(state, batch)
    for leaf, value in zip(jax.tree.leaves(state.teacher), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(leaf, value)


def numbers(state):
    return [np.array(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state, state.teacher))]


@pytest.mark.parametrize("at_fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(at_fault, monkeypatch):
    """A poisoned batch leaves the state unchanged to the bit and names its record; the next good batch is a step."""
    good, model = lay_out(samples()), Qwen2_5VL(CONFIG)
    poisoned = good.replace(record=np.array([0, 1, POISON + 2, POISON + 3], np.int32))
    poison_objective(monkeypatch, "alignment")
    if at_fault == "gradient":
        compute = loss_and_gradients

        def overflowing(*arguments):
            rows, gradients = compute(*arguments)
            wrong = ~jnp.isfinite(rows.loss).all()
            rows = rows.replace(loss=jnp.nan_to_num(rows.loss))
            return rows, jax.tree.map(lambda leaf: jnp.where(wrong, jnp.inf, leaf), gradients)

        monkeypatch.setattr("ilvr_jax.training.step.loss_and_gradients", overflowing)
    optimizer = make_optimizer(stage())
    key = jax.random.key(5)  # its own, since the step donates it
    state = create_state(model.init(jax.random.key(0)), optimizer, ("decoder",), with_teacher=True, key=key)
    step = make_train_step(model, stage(), LATENTS, optimizer)
    state, values = step(state, good)
    assert (int(values["skipped"]), int(values["skipped_in_row"]), int(values["offending_record"])) == (0, 0, -1)
    before = numbers(state)
    for count in (1, 2):
        state, values = step(state, poisoned)
        for one, other in zip(numbers(state), before, strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.isfinite(values["loss"]) == (at_fault == "gradient")
        assert int(values["skipped"]) == int(values["skipped_in_row"]) == count
        assert int(values["offending_record"]) == (POISON + 2 if at_fault == "loss" else -1)
    state, values = step(state, good)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (4, 2, 0)
    assert sum(np.abs(one - other).max() for one, other in zip(numbers(state), before, strict=True)) > 1e-3
    assert step._cache_size() == 1


def test_gradient_clipping_is_by_global_norm():
    params = {"decoder": {"layer": {"kernel": jnp.zeros((3, 2))}}}
    large = jax.tree.map(lambda leaf: leaf + 100.0, params)
    how = stage(clip=0.5)
    clip = optax.clip_by_global_norm(0.5)
    clipped, _ = clip.update(large, clip.init(params))
    ours, theirs = make_optimizer(how), optax.adamw(1e-2, b2=0.99, weight_decay=0.0)
    mine, _ = ours.update(large, ours.init(params), params)
    reference, _ = theirs.update(clipped, theirs.init(params), params)
    np.testing.assert_allclose(mine["decoder"]["layer"]["kernel"], reference["decoder"]["layer"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_schedules_rise_then_decay(schedule, middle, last):
    rate = learning_rate_schedule(stage(schedule=schedule, learning_rate=1.0, warmup_steps=10, steps=110))
    np.testing.assert_allclose([rate(0), rate(9), rate(10)], [0.1, 1.0, 1.0], atol=1e-6)
    np.testing.assert_allclose([rate(60), rate(110)], [middle, last], atol=1e-6)


def test_weight_decay_spares_biases_and_norms():
    params = Qwen2_5VL(CONFIG).init(jax.random.key(0))
    mask = decayed(params)
    assert mask["decoder"]["layers"]["q_proj"] == {"kernel": True, "bias": False}
    assert mask["decoder"]["norm"] == {"weight": False} and mask["decoder"]["lm_head"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 3}, r"`stage1.accumulation` must be a divisor of batch_size \(4\), got 3"),
        ({"schedule": "cos"}, "`stage1.schedule` must be one of constant, linear, cosine, got 'cos'"),
        ({"optimizer": "sgd"}, "`stage1.optimizer` must be one of adamw, muon, got 'sgd'"),
        ({"clip": 0.0}, r"`stage1.clip` must be above 0, got 0\.0"),
        ({"learning_rate": float("nan")}, "`stage1.learning_rate` must be a finite number, got nan"),
        ({"warmup_steps": -1}, "`stage1.warmup_steps` must be at least 0, got -1"),
        ({"beta2": 1.0}, r"`stage1.beta2` must be above 0 and below 1, got 1\.0"),
        ({"weight_decay": -0.1}, r"`stage1.weight_decay` must be at least 0, got -0\.1"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(BadConfig, match=message):
        read(StageConfig, vars(stage()) | changes, "stage1")


def test_an_objective_that_does_not_exist_and_parts_that_do_not_divide_are_named():
    model, optimizer = Qwen2_5VL(CONFIG), make_optimizer(stage())
    with pytest.raises(BadConfig, match="must be one of text, alignment, guided, autonomy, got 'alignement'"):
        make_train_step(model, stage(objective="alignement"), LATENTS, optimizer)
    with pytest.raises(ValueError, match=r"accumulation must divide batch_size \(4\), got 3"):
        make_train_step(model, stage(accumulation=3), LATENTS, optimizer)
