"""Optimizers and learning-rate schedules by name."""

import jax
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict


def learning_rate_schedule(stage: ConfigDict) -> optax.Schedule:
    """Returns learning rate by step: `warmup_steps` of linear rise, then the named decay to the stage's end.

    Raises ValueError for a schedule other than "constant", "linear" or "cosine".
    """
    peak, warmup = stage.learning_rate, stage.warmup_steps
    remaining = max(1, stage.steps - warmup)
    decays = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, remaining),
        "cosine": optax.cosine_decay_schedule(peak, remaining),
    }
    if stage.schedule not in decays:
        raise ValueError(f"schedule is {stage.schedule!r}; accepted are {', '.join(decays)}")
    rise = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([rise, decays[stage.schedule]], [warmup]) if warmup else decays[stage.schedule]


def decayed(params: PyTree) -> PyTree:
    """Says which parameters weight decay applies to: matrices, not biases and norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "weight"), params)


def make_optimizer(stage: ConfigDict) -> optax.GradientTransformation:
    """Returns gradient clipping by global norm, then the stage's optimizer.

    Raises ValueError for an optimizer other than "adamw" or "muon".
    """
    schedule = learning_rate_schedule(stage)
    optimizers = {
        "adamw": lambda: optax.adamw(
            schedule, b1=0.9, b2=stage.beta2, eps=1e-8, weight_decay=stage.weight_decay, mask=decayed
        ),
    }
    if stage.optimizer not in optimizers:
        raise ValueError(f"optimizer is {stage.optimizer!r}; accepted are {', '.join(optimizers)}")
    return optax.chain(optax.clip_by_global_norm(stage.clip), optimizers[stage.optimizer]())
