"""The train state, which a run carries from step to step."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from ilvr_jax.config.schema import StageConfig
from ilvr_jax.method.objectives import OBJECTIVES
from ilvr_jax.models.sharding import placed_like, places


@flax.struct.dataclass
class TrainState:
    """The state that a checkpoint holds. The optimizer covers the trained parts of `params` alone."""

    step: Int[Array, ""]
    params: PyTree  # {"vision": ..., "decoder": ...}, and "adapters" with LoRA; float32 where trained
    opt_state: PyTree
    # Moving averages, float32, of the trained parts; other parts are shared with the student. None without teacher.
    teacher: PyTree | None
    rng: PRNGKeyArray
    skipped: Int[Array, ""]  # updates skipped in this stage, since loss or gradient were not finite
    skipped_in_row: Int[Array, ""]  # consecutive skips up to this step


def create_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    train: tuple[str, ...],
    with_teacher: bool,
    key: PRNGKeyArray,
) -> TrainState:
    """Return the state at the start of a stage: a fresh optimizer, and a teacher that equals the student."""
    trained, teacher = {name: params[name] for name in train}, None
    if with_teacher:  # a copy, since the step donates the buffers of its state
        teacher = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained)
    return TrainState(jnp.int32(0), params, optimizer.init(trained), teacher, key, jnp.int32(0), jnp.int32(0))


def init_train_state(
    params: PyTree, optimizer: optax.GradientTransformation, stage: StageConfig, key: PRNGKeyArray, mesh: Mesh
) -> TrainState:
    """Return the state at the start of a stage of the config, created sharded; donates `params`."""
    abstract = abstract_train_state(params, optimizer, stage, mesh)
    return jax.jit(_creator(optimizer, stage, key), donate_argnums=0, out_shardings=places(abstract))(params)


def abstract_train_state(
    params: PyTree, optimizer: optax.GradientTransformation, stage: StageConfig, mesh: Mesh
) -> TrainState:
    """Return shapes, dtypes and shardings of a stage's state; `params` may be abstract themselves."""
    return placed_like(jax.eval_shape(_creator(optimizer, stage, jax.random.key(0)), params), mesh)


def _creator(
    optimizer: optax.GradientTransformation, stage: StageConfig, key: PRNGKeyArray
) -> Callable[[PyTree], TrainState]:
    with_teacher = OBJECTIVES[stage.objective].teacher
    return functools.partial(create_state, optimizer=optimizer, train=stage.train, with_teacher=with_teacher, key=key)
