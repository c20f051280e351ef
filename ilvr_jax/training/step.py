"""One optimizer step of a stage."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from ml_collections import ConfigDict

from ilvr_jax.latents.layout import Batch
from ilvr_jax.latents.objectives import Objective, alignment_objective, autonomy_objective, text_objective
from ilvr_jax.latents.selection import LatentSettings
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.models.qwen2_5_vl import Qwen2_5VL
from ilvr_jax.training.state import TrainState

OBJECTIVES = ("text", "alignment", "autonomy")


def objective(
    name: str,
    model: Qwen2_5VL,
    params: PyTree,
    teacher: PyTree | None,
    batch: Batch,
    latents: LatentSettings,
    key: PRNGKeyArray,
) -> Objective:
    """Returns the losses of the stage whose objective is `name`."""
    if name == "text":
        return text_objective(model, params, batch, key)
    if name == "alignment":
        return alignment_objective(model, params, decoder_params({**params, **teacher}), batch, latents, key)[0]
    if name == "autonomy":
        return autonomy_objective(model, params, batch, key)
    raise ValueError(f"objective is {name!r}; accepted are {', '.join(OBJECTIVES)}")


def loss_and_gradients(
    name: str,
    train: tuple[str, ...],
    accumulation: int,
    model: Qwen2_5VL,
    params: PyTree,
    teacher: PyTree | None,
    batch: Batch,
    latents: LatentSettings,
    key: PRNGKeyArray,
) -> tuple[dict[str, Float[Array, " rows"]], PyTree]:
    """Returns per-row losses and the gradient of their mean for the parts of `params` named in `train`.

    The rows are worked on in `accumulation` equal parts, one after another, which changes nothing else.
    """
    frozen = {part: value for part, value in params.items() if part not in train}

    def part_loss(trained: PyTree, part: Batch):
        result = objective(name, model, {**frozen, **trained}, teacher, part, latents, key)
        rows = {"loss": result.loss, "cross_entropy": result.cross_entropy}
        return result.loss.mean(), {**rows, "similarity": result.similarity, "filled_slots": result.filled_slots}

    trained = {part: params[part] for part in train}
    gradient = jax.grad(part_loss, has_aux=True)
    if accumulation == 1:
        gradients, rows = gradient(trained, batch)
        return rows, gradients
    parts = jax.tree.map(lambda array: array.reshape(accumulation, len(array) // accumulation, *array.shape[1:]), batch)

    def add(total: PyTree, part: Batch):
        gradients, rows = gradient(trained, part)
        return jax.tree.map(jnp.add, total, gradients), rows

    total, rows = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), parts)
    rows = jax.tree.map(lambda array: array.reshape(-1), rows)
    return rows, jax.tree.map(lambda leaf: leaf / accumulation, total)


def make_train_step(
    model: Qwen2_5VL, stage: ConfigDict, latents: ConfigDict, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Returns the stage's jitted step. It gives away the buffers of the state it is called with.

    Raises ValueError for an unknown objective or a batch size that `accumulation` does not divide.
    """
    settings, train = LatentSettings(**latents), tuple(stage.train)
    if stage.objective not in OBJECTIVES:
        raise ValueError(f"objective is {stage.objective!r}; accepted are {', '.join(OBJECTIVES)}")
    if stage.batch_size % stage.accumulation:
        raise ValueError(f"accumulation ({stage.accumulation}) does not divide batch_size ({stage.batch_size})")

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        key = jax.random.fold_in(state.rng, state.step)
        rows, gradients = loss_and_gradients(
            stage.objective, train, stage.accumulation, model, state.params, state.teacher, batch, settings, key
        )
        trained = {part: state.params[part] for part in train}
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        params = {**state.params, **optax.apply_updates(trained, updates)}
        teacher = state.teacher
        if teacher is not None:
            teacher = optax.incremental_update({part: params[part] for part in train}, teacher, 1.0 - settings.tau)
        metrics = {name: rows[name].mean() for name in ("loss", "cross_entropy")}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        if stage.objective == "alignment":
            has_slots = rows["filled_slots"] > 0
            metrics["similarity"] = rows["similarity"].sum() / jnp.maximum(has_slots.sum(), 1)
            metrics["filled_slots"] = rows["filled_slots"].mean()
        return TrainState(state.step + 1, params, opt_state, teacher, state.rng), metrics

    return jax.jit(train_step, donate_argnums=0)
