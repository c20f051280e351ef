"""What each stage minimises. Losses are per row, so a batch is the mean of its rows however it is cut."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ilvr_jax.latents.layout import Batch
from ilvr_jax.latents.rollout import roll_out
from ilvr_jax.latents.selection import LatentSettings, Selection, cosine, select
from ilvr_jax.models.qwen2_5_vl import Qwen2_5VL, causal_mask


@flax.struct.dataclass
class Objective:
    """Losses of each row and how they came about."""

    loss: Float[Array, " rows"]
    cross_entropy: Float[Array, " rows"]
    similarity: Float[Array, " rows"]  # mean cosine of hidden states and targets, 0 where there are no targets
    filled_slots: Float[Array, " rows"]  # slots that had a target
    hidden: Float[Array, "rows columns channels"]
    logits: Float[Array, "rows columns vocab"]


def cross_entropy(
    logits: Float[Array, "rows columns vocab"], targets: Int[Array, "rows columns"]
) -> Float[Array, " rows"]:
    """Returns each row's mean cross-entropy over the columns that carry loss (targets other than -100)."""
    labelled = targets >= 0
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * labelled, axis=1) / jnp.maximum(labelled.sum(1), 1)


def text_objective(model: Qwen2_5VL, params: PyTree, batch: Batch) -> Objective:
    """Supervised learning of the answer's tokens alone: the warm-up."""
    features = model.encode_images(params["vision"], batch.images)
    inputs = model.embed(params["decoder"], batch.tokens, batch.image_index, features)
    hidden, _ = model.decode(params["decoder"], inputs, batch.positions, causal_mask(batch.valid))
    return _objective(model, params, batch, hidden)


def alignment_objective(
    model: Qwen2_5VL,
    params: PyTree,
    teacher: PyTree,
    batch: Batch,
    settings: LatentSettings,
    key: PRNGKeyArray,
    teacher_vision: PyTree | None = None,
) -> tuple[Objective, Selection]:
    """Stage 1: the teacher's targets stand in the slots, and hidden states learn to predict them.

    `teacher` is its decoder; it shares the student's vision tower unless given its own.
    """
    features = model.encode_images(params["vision"], batch.images)
    shared = teacher_vision is None
    teacher_features = features if shared else model.encode_images(teacher_vision, batch.images)
    helper_features = model.encode_images(params["vision"] if shared else teacher_vision, batch.helper_images)
    selection = jax.lax.stop_gradient(select(model, teacher, batch, teacher_features, helper_features, settings))
    slots = batch.layout.slot_columns
    inputs = model.embed(params["decoder"], batch.tokens, batch.image_index, features)
    filled = jnp.where(selection.valid[..., None], selection.targets.astype(inputs.dtype), inputs[:, slots])
    inputs = inputs.at[:, slots].set(filled)
    hidden, _ = model.decode(params["decoder"], inputs, batch.positions, causal_mask(batch.valid))
    targets = selection.targets + settings.target_noise * slot_noise(key, batch.record, selection.targets.shape)
    cosines = cosine(hidden[:, slots - 1], targets) * selection.valid
    count = selection.valid.sum((1, 2))
    similarity = cosines.sum((1, 2)) / jnp.maximum(count, 1)
    plain = _objective(model, params, batch, hidden)
    alignment = jnp.where(count > 0, 1.0 - similarity, 0.0)
    loss = settings.ce_weight * plain.cross_entropy + settings.sim_weight * alignment
    return plain.replace(loss=loss, similarity=similarity, filled_slots=count.astype(jnp.float32)), selection


def slot_noise(
    key: PRNGKeyArray, record: Int[Array, " rows"], shape: tuple[int, int, int, int]
) -> Float[Array, "rows segments slots channels"]:
    """Returns normal noise that depends on the record, the segment and the slot alone, not on the batch around them."""
    _, segments, slots, channels = shape

    def noise(record: Array, segment: Array, slot: Array) -> Array:
        of_slot = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, record), segment), slot)
        return jax.random.normal(of_slot, (channels,))

    over_slots = jax.vmap(noise, (None, None, 0))
    over_segments = jax.vmap(over_slots, (None, 0, None))
    return jax.vmap(over_segments, (0, None, None))(record, jnp.arange(segments), jnp.arange(slots))


def autonomy_objective(model: Qwen2_5VL, params: PyTree, batch: Batch) -> Objective:
    """Stage 2: slots are filled by the student itself, cross-entropy alone, gradient through every slot."""
    features = model.encode_images(params["vision"], batch.images)
    inputs = model.embed(params["decoder"], batch.tokens, batch.image_index, features)
    hidden = roll_out(model, params["decoder"], inputs, batch)
    return _objective(model, params, batch, hidden)


def _objective(model: Qwen2_5VL, params: PyTree, batch: Batch, hidden: Array) -> Objective:
    logits = model.logits(params["decoder"], hidden)
    loss = cross_entropy(logits, batch.targets)
    zero = jnp.zeros_like(loss)
    return Objective(loss, loss, zero, zero, hidden, logits)
