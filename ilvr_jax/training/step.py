"""The train step: one update of a stage."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ilvr_jax.config.fields import choose
from ilvr_jax.config.schema import LatentsConfig, StageConfig
from ilvr_jax.method.layout import Batch
from ilvr_jax.method.objectives import OBJECTIVES, Losses, Metric
from ilvr_jax.models.base import Model
from ilvr_jax.models.sharding import divide
from ilvr_jax.training.state import TrainState


def loss_and_gradients(
    objective: Callable[..., Losses],
    train: tuple[str, ...],
    accumulation: int,
    model: Model,
    params: PyTree,
    teacher: PyTree | None,
    batch: Batch,
    latents: LatentsConfig,
    key: PRNGKeyArray,
) -> tuple[Losses, PyTree]:
    """Return the losses of `objective` by row, and the gradient of their mean for the parts named in `train`.

    The rows are processed in `accumulation` equal parts, one after another, with the same result.
    """
    frozen = {part: value for part, value in params.items() if part not in train}

    def part_loss(trained: PyTree, part: Batch):
        losses = objective(model, {**frozen, **trained}, teacher, part, latents, key)
        return losses.loss.mean(), losses.replace(hidden=None, selection=None)

    trained = {part: params[part] for part in train}
    gradient = jax.grad(part_loss, has_aux=True)
    if accumulation == 1:
        gradients, rows = gradient(trained, batch)
        return rows, gradients
    parts = jax.tree.map(lambda array: _in_parts(array, accumulation), batch)

    def add(total: PyTree, part: Batch):
        gradients, rows = gradient(trained, part)
        return jax.tree.map(jnp.add, total, gradients), rows

    total, rows = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), parts)
    rows = jax.tree.map(lambda array: array.T.reshape(-1), rows)
    return rows, jax.tree.map(lambda leaf: leaf / accumulation, total)


def _in_parts(array: Array, count: int) -> Array:
    """Return every count-th row as a part, so that each device has rows in every part."""
    return jnp.swapaxes(array.reshape(len(array) // count, count, *array.shape[1:]), 0, 1)


def accumulation_parts(batch_size: int, accumulation: int, devices: int) -> int:
    """Return the number of parts of a batch that leaves each device at most batch_size / accumulation rows at a time.

    Raises ValueError if the rows cannot be divided evenly.
    """
    if batch_size % accumulation:
        raise ValueError(f"accumulation must divide batch_size ({batch_size}), got {accumulation}")
    if batch_size % devices:
        raise ValueError(
            f"batch_size must be a multiple of {devices}, the devices that share its rows, got {batch_size}"
        )
    rows, limit = batch_size // devices, batch_size // accumulation
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= limit)


def offending_record(losses: Float[Array, " rows"], records: Int[Array, " rows"]) -> Int[Array, ""]:
    """Return the record of the first row whose loss is not finite, -1 if there is none."""
    failed = ~jnp.isfinite(losses)
    return jnp.where(failed.any(), records[jnp.argmax(failed)], -1)


def weighted_mean(metric: Metric) -> Float[Array, ""]:
    """Return the weighted mean of a metric over rows, 0 if all weights are 0."""
    return (metric.values * metric.weights).sum() / jnp.maximum(metric.weights.sum(), 1)


def make_train_step(
    model: Model,
    stage: StageConfig,
    latents: LatentsConfig,
    optimizer: optax.GradientTransformation,
    devices: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Return the stage's jitted step, which donates its state.

    If loss or gradient are not finite, parameters, optimizer and teacher stay unchanged, and the skip is counted; the
    metric `offending_record` is then the first record whose loss is not finite, -1 if all are.

    Rows are divided over `devices`. Raises ValueError for a batch size that `accumulation` or `devices` do not
    divide, and BadConfig for an unknown objective.
    """
    objective, train = choose(OBJECTIVES, stage.objective, "objective").loss, stage.train
    parts = accumulation_parts(stage.batch_size, stage.accumulation, devices)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        key = jax.random.fold_in(state.rng, state.step)
        rows, gradients = loss_and_gradients(
            objective, train, parts, model, state.params, state.teacher, batch, latents, key
        )
        trained = {part: state.params[part] for part in train}
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        student, teacher = optax.apply_updates(trained, updates), state.teacher
        if teacher is not None:
            teacher = optax.incremental_update(student, teacher, 1.0 - latents.tau)
        metrics = {"loss": rows.loss.mean(), "cross_entropy": rows.cross_entropy.mean()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        # A select per array, fused with the update that writes it: both operands are in memory anyway.
        student, opt_state, teacher = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (student, opt_state, teacher),
            (trained, state.opt_state, state.teacher),
        )
        params = {**state.params, **student}
        metrics["skipped"] = jnp.where(finite, state.skipped, state.skipped + 1)
        metrics["skipped_in_row"] = jnp.where(finite, 0, state.skipped_in_row + 1)
        metrics["offending_record"] = offending_record(rows.loss, batch.record)
        metrics |= {name: weighted_mean(metric) for name, metric in rows.metrics.items()}
        counts = metrics["skipped"], metrics["skipped_in_row"]
        return divide(TrainState(state.step + 1, params, opt_state, teacher, state.rng, *counts)), metrics

    return jax.jit(train_step, donate_argnums=0)
