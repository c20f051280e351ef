"""Optimizers and learning-rate schedules by name."""

import jax
import optax
from jaxtyping import PyTree
from optax import contrib

from ilvr_jax.config.schema import StageConfig


def learning_rate_schedule(stage: StageConfig) -> optax.Schedule:
    """Return the learning rate by step: a linear rise over `warmup_steps`, then the named decay to the stage's end."""
    peak, warmup = stage.learning_rate, stage.warmup_steps
    remaining = max(1, stage.steps - warmup)
    decays = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, remaining),
        "cosine": optax.cosine_decay_schedule(peak, remaining),
    }
    rise = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([rise, decays[stage.schedule]], [warmup]) if warmup else decays[stage.schedule]


def decayed(params: PyTree) -> PyTree:
    """Return whether weight decay applies, for each parameter: to matrices, not to biases and norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "weight"), params)


def muon_dimensions(params: PyTree) -> PyTree:
    """Return the axes over which Muon orthogonalises each parameter, None for those that Adam updates.

    Muon updates the matrices between hidden layers, whose leading axes are stacked layers; Adam updates embeddings, the
    output head, the patch embedding, biases and norms.
    """

    def dimensions(path, leaf) -> contrib.MuonDimensionNumbers | None:
        names = [key.key for key in path]
        if names[-1] != "kernel" or "patch_embed" in names:
            return None
        return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """Return gradient clipping by global norm followed by the stage's optimizer.

    "muon" updates hidden matrices with orthogonalised steps, whose root mean square is the learning rate, as that of
    Adam's first steps is, and all other parameters with Adam; weight decay then applies to the hidden matrices alone.
    """
    schedule = learning_rate_schedule(stage)
    if stage.optimizer == "adamw":
        optimizer = optax.adamw(schedule, b2=stage.beta2, weight_decay=stage.weight_decay, mask=decayed)
    else:
        optimizer = contrib.muon(
            schedule,
            weight_decay=stage.weight_decay,
            adam_b2=stage.beta2,
            consistent_rms=1.0,
            muon_weight_dimension_numbers=muon_dimensions,
        )
    return optax.chain(optax.clip_by_global_norm(stage.clip), optimizer)
