"""The losses that stages minimise. They are per row, so that a batch's mean does not depend on how it is split.

To add an objective, write a function as `text_loss` and name it in OBJECTIVES.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.method.layout import Batch
from ilvr_jax.method.positions import grid_places
from ilvr_jax.method.rollout import roll_out
from ilvr_jax.method.selection import Selection, cosine, select
from ilvr_jax.method.slots import fill_slots
from ilvr_jax.models.base import Model
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.models.sharding import divisor

ALIKE = 0.99  # the cosine from which two targets are the same
CHUNK_LOGITS = 2**26  # logits that exist at a time on a device: 256 MB in float32


class Metric(NamedTuple):
    """A figure of each row, and its weight in the mean over rows."""

    values: Float[Array, " rows"]
    weights: Float[Array, " rows"]


@flax.struct.dataclass
class Losses:
    """The losses of each row, and further figures by name."""

    loss: Float[Array, " rows"]
    cross_entropy: Float[Array, " rows"]
    metrics: dict[str, Metric]
    # For tests, studies and losses built on these; a compiled step does not compute arrays that it does not use.
    hidden: Float[Array, "rows columns channels"]
    selection: Selection | None = None


def cross_entropy(
    model: Model,
    decoder: PyTree,
    hidden: Float[Array, "rows columns channels"],
    targets: Int[Array, "rows columns"],
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Array, " rows"]:
    """Return each row's mean cross-entropy over the columns that carry loss (targets other than -100).

    Logits are computed for labelled columns, at most `chunk_logits` at a time per device (or those of one column), and
    again for the gradient: an array of columns times vocabulary never exists. With several devices, each has a part of
    the vocabulary for all tokens: no chunk gathers the head or its gradient.
    """
    rows, columns = targets.shape
    vocabulary, channels = model.config.vocab_size, model.config.hidden_size
    at_once = max(rows * vocabulary // divisor("rows"), rows * channels // divisor("few_rows"))
    width = min(columns, max(1, chunk_logits // at_once))
    # Labelled columns go first, so that the last chunks have none and are skipped.
    order = jnp.argsort(targets < 0, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -columns % width)))
    chunks = jnp.swapaxes(order.reshape(rows, -1, width), 0, 1)
    starts, counts = jnp.arange(0, columns, width), (targets >= 0).sum(1)
    most = counts.max()  # outside the loop: a reduction over all devices

    head = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    decoder = {**decoder, head: nn.with_logical_constraint(decoder[head], ("spread_vocabulary", None))}

    def losses(hidden: Array, targets: Array, labelled: Array) -> Array:
        logits = model.logits(decoder, nn.with_logical_constraint(hidden, ("few_rows", None, None)))
        logits = nn.with_logical_constraint(logits, ("few_rows", None, "spread_vocabulary"))
        is_target = jnp.arange(vocabulary) == targets[..., None]  # a lookup would gather all logits
        picked = jnp.sum(logits, axis=-1, where=is_target)
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * labelled, axis=1)

    @jax.checkpoint  # outside the condition, whose residuals would be stored
    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        place, start = chunk
        labelled = start + jnp.arange(width) < counts[:, None]
        columns = jnp.take_along_axis(hidden, place[..., None], axis=1)
        tokens = jnp.maximum(jnp.take_along_axis(targets, place, axis=1), 0)
        zeros = jnp.zeros_like(total)
        return total + jax.lax.cond(start < most, losses, lambda *_: zeros, columns, tokens, labelled), None

    total, _ = jax.lax.scan(add, jnp.zeros(rows, jnp.float32), (chunks, starts))
    return total / jnp.maximum(counts, 1)


def text_loss(
    model: Model, params: PyTree, teacher: None, batch: Batch, settings: LatentsConfig, key: PRNGKeyArray
) -> Losses:
    """Return the cross-entropy of the answer's tokens alone: the warm-up."""
    del teacher
    decoder, _, inputs = _embedded(model, params, batch)
    keys = dropout_keys(model, key, batch)
    hidden, _ = model.decode(decoder, inputs, batch.positions, batch.attention_mask(settings), dropout_keys=keys)
    return _losses(model, decoder, batch, hidden)


def alignment_loss(
    model: Model, params: PyTree, teacher: PyTree, batch: Batch, settings: LatentsConfig, key: PRNGKeyArray
) -> Losses:
    """Return stage 1's losses: slots hold the teacher's targets, and hidden states learn to predict them.

    `teacher` holds the parts of the parameters that differ from the student's (a vision tower of its own in tests
    alone).
    """
    decoder, features, inputs = _embedded(model, params, batch)
    selection = _select(model, params, teacher, batch, features, settings, key)
    slots = batch.layout.slot_columns
    inputs = inputs.at[:, slots].set(fill_with_targets(model, decoder, inputs[:, slots], selection, batch))
    keys = dropout_keys(model, key, batch)
    hidden, _ = model.decode(decoder, inputs, batch.positions, batch.attention_mask(settings), dropout_keys=keys)
    return _aligned_losses(model, decoder, batch, hidden, selection, settings, key)


def guided_loss(
    model: Model, params: PyTree, teacher: PyTree, batch: Batch, settings: LatentsConfig, key: PRNGKeyArray
) -> Losses:
    """Return stage 1's losses when slots hold what the student makes of them, as in stage 2: a stage between the two.

    Each hidden state learns to predict the true target after the student's own slots, errors included (DAgger, Ross et
    al., 2011). The slots' inputs are fixed: no gradient flows from one to another. With `own_share` below 1, records
    are drawn at random whose slots hold their targets, as in stage 1.
    """
    decoder, features, inputs = _embedded(model, params, batch)
    selection = _select(model, params, teacher, batch, features, settings, key)
    slots, keys = batch.layout.slot_columns, dropout_keys(model, key, batch)
    rolled_out = roll_out(model, settings, decoder, inputs, batch, keys)
    is_own = jax.vmap(lambda record: jax.random.bernoulli(jax.random.fold_in(key, record), settings.own_share))
    own = fill_slots(
        model, decoder, rolled_out[:, slots - 1], inputs[:, slots], grid_places(batch.positions[..., slots])
    )
    targets = fill_with_targets(model, decoder, inputs[:, slots], selection, batch)
    filled = jnp.where(is_own(batch.record)[:, None, None, None], own, targets)
    inputs = inputs.at[:, slots].set(jax.lax.stop_gradient(filled))
    hidden, _ = model.decode(decoder, inputs, batch.positions, batch.attention_mask(settings), dropout_keys=keys)
    return _aligned_losses(model, decoder, batch, hidden, selection, settings, key)


def fill_with_targets(
    model: Model,
    decoder: PyTree,
    embeddings: Float[Array, "rows segments slots channels"],
    selection: Selection,
    batch: Batch,
) -> Float[Array, "rows segments slots channels"]:
    """Return the inputs of slots that hold targets; those without a target hold the embedding of `latent_pad`."""
    places = grid_places(batch.positions[..., batch.layout.slot_columns])
    targets = fill_slots(model, decoder, selection.targets, embeddings, places)
    return jnp.where(selection.valid[..., None], targets, embeddings)


def _select(
    model: Model,
    params: PyTree,
    teacher: PyTree,
    batch: Batch,
    features: Array,
    settings: LatentsConfig,
    key: PRNGKeyArray,
) -> Selection:
    """Return the teacher's targets; `features` are the student's of the user images."""
    if "vision" in teacher:
        features = model.encode_images(teacher["vision"], batch.images)
    teacher = {**params, **teacher}
    helper_features = model.encode_images(teacher["vision"], batch.helper_images)
    selection = select(model, decoder_params(teacher), batch, features, helper_features, settings, key)
    return jax.lax.stop_gradient(selection)


def _aligned_losses(
    model: Model,
    decoder: PyTree,
    batch: Batch,
    hidden: Array,
    selection: Selection,
    settings: LatentsConfig,
    key: PRNGKeyArray,
) -> Losses:
    """Return the losses of stage 1: cross-entropy, and the distance of hidden states before slots to their targets."""
    slots = batch.layout.slot_columns
    targets = selection.targets + settings.target_noise * slot_noise(key, batch.record, selection.targets.shape)
    cosines = cosine(hidden[:, slots - 1], targets) * selection.valid
    count = selection.valid.sum((1, 2))
    similarity = cosines.sum((1, 2)) / jnp.maximum(count, 1)
    plain = _losses(model, decoder, batch, hidden)
    alignment = jnp.where(count > 0, 1.0 - similarity, 0.0)
    loss = settings.ce_weight * plain.cross_entropy + settings.sim_weight * alignment
    if settings.contrast_weight:
        loss += settings.contrast_weight * contrast(hidden[:, slots - 1], selection, settings.contrast_temperature)
    metrics = {
        "similarity": Metric(similarity, (count > 0).astype(jnp.float32)),  # mean cosine of hidden states and targets
        "filled_slots": Metric(count.astype(jnp.float32), jnp.ones_like(loss)),  # slots that had a target
    }
    return plain.replace(loss=loss, metrics=metrics, selection=selection)


def contrast(
    hidden_states: Float[Array, "rows segments slots channels"], selection: Selection, temperature: float
) -> Float[Array, " rows"]:
    """Return each row's mean negative log-probability that slots are told from those of its other targets.

    The probabilities of a slot are the softmax of its hidden state's cosines with all targets of the row, divided by
    the temperature (InfoNCE, van den Oord et al., 2018); targets equal to its own count as it. The distance to the
    target alone changes little from one target to another that is alike.
    """
    rows, valid = len(hidden_states), selection.valid.reshape(len(hidden_states), -1)
    states, targets = (_unit(array.reshape(rows, -1, array.shape[-1])) for array in (hidden_states, selection.targets))
    logits = jnp.einsum("rsc,rtc->rst", states, targets) / temperature
    alike = jnp.einsum("rsc,rtc->rst", targets, targets) > ALIKE
    itself = jnp.eye(valid.shape[1], dtype=bool)  # never empty, as a gradient would not be a number
    every = jax.nn.logsumexp(logits, axis=-1, where=valid[:, None] | itself)
    right = jax.nn.logsumexp(logits, axis=-1, where=valid[:, None] & alike | itself)
    return jnp.sum(every - right, axis=1, where=valid) / jnp.maximum(valid.sum(1), 1)


def _unit(vectors: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """Return vectors of length 1, in float32."""
    vectors = vectors.astype(jnp.float32)
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + 1e-12)


def slot_noise(
    key: PRNGKeyArray, record: Int[Array, " rows"], shape: tuple[int, int, int, int]
) -> Float[Array, "rows segments slots channels"]:
    """Return normal noise that depends on the record, the segment and the slot alone, not on the batch."""
    _, segments, slots, channels = shape

    def noise(record: Array, segment: Array, slot: Array) -> Array:
        slot_key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, record), segment), slot)
        return jax.random.normal(slot_key, (channels,))

    over_slots = jax.vmap(noise, (None, None, 0))
    over_segments = jax.vmap(over_slots, (None, 0, None))
    return jax.vmap(over_segments, (0, None, None))(record, jnp.arange(segments), jnp.arange(slots))


def autonomy_loss(
    model: Model, params: PyTree, teacher: None, batch: Batch, settings: LatentsConfig, key: PRNGKeyArray
) -> Losses:
    """Return stage 2's losses: the student fills its slots, cross-entropy alone, with gradients through every slot."""
    del teacher
    decoder, _, inputs = _embedded(model, params, batch)
    hidden = roll_out(model, settings, decoder, inputs, batch, dropout_keys(model, key, batch))
    return _losses(model, decoder, batch, hidden)


def dropout_keys(model: Model, key: PRNGKeyArray, batch: Batch) -> Key[Array, "rows columns"] | None:
    """Return a key per token that depends on its record and its place there alone; None without dropout."""
    if not model.config.lora.rank or not model.config.lora.dropout:
        return None
    place = jnp.cumsum(batch.valid, axis=1)
    record_keys = jax.vmap(lambda record: jax.random.fold_in(key, record))(batch.record)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(record_keys, place)


def _embedded(model: Model, params: PyTree, batch: Batch) -> tuple[PyTree, Array, Array]:
    """Return the student's decoder with its adapters, the features of the user images, and the decoder's inputs."""
    decoder, features = decoder_params(params), model.encode_images(params["vision"], batch.images)
    return decoder, features, model.embed(decoder, batch.tokens, batch.image_index, features)


def _losses(model: Model, decoder: PyTree, batch: Batch, hidden: Array) -> Losses:
    loss = cross_entropy(model, decoder, hidden, batch.targets)
    return Losses(loss, loss, {}, hidden)


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective that a stage minimises.

    `loss(model, params, teacher, batch, settings, key)` returns the losses of a batch's rows. `helper_images` are the
    valid values of the stage's `helper_images`. With `teacher`, the stage keeps a moving average of the parts that it
    trains, which `loss` gets (None without); the vision tower is frozen and shared with it.
    """

    loss: Callable[[Model, PyTree, PyTree | None, Batch, LatentsConfig, PRNGKeyArray], Losses]
    helper_images: tuple[str, ...]
    teacher: bool = False


OBJECTIVES = {
    "text": Objective(text_loss, helper_images=("omit", "encode")),
    "alignment": Objective(alignment_loss, helper_images=("latent",), teacher=True),
    "guided": Objective(guided_loss, helper_images=("latent",), teacher=True),
    "autonomy": Objective(autonomy_loss, helper_images=("latent", "slots")),
}
