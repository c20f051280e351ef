"""The momentum teacher's selection: which helper-image features are worth predicting (ILVR, section 3).

To add a rule, write a function as `pick_coverage` and name it in SELECTORS.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.method.layout import Batch
from ilvr_jax.method.tokens import Role
from ilvr_jax.models.base import Model

NORM_FLOOR = 1e-8  # as torch.cosine_similarity


@flax.struct.dataclass
class Selection:
    """The teacher's targets for each segment's slots, in order of score."""

    targets: Float[Array, "rows segments slots channels"]
    valid: Bool[Array, "rows segments slots"]  # slots that have a target
    candidates: Int[Array, "rows segments slots"]  # the index of each target among the candidates
    # For tests and studies alone, as oracles of the scores.
    cosines: Float[Array, "rows segments candidates"]
    user_query: Float[Array, "rows channels"]


def cosine(first: Float[Array, "*batch channels"], second: Float[Array, "*batch channels"]) -> Float[Array, "*batch"]:
    """Return the cosine along the last axis, in float32."""
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    norms = jnp.linalg.norm(first, axis=-1) * jnp.linalg.norm(second, axis=-1)
    return jnp.sum(first * second, axis=-1) / jnp.maximum(norms, NORM_FLOOR)


def masked_mean(
    values: Float[Array, "rows time channels"], mask: Bool[Array, "rows time"]
) -> Float[Array, "rows channels"]:
    """Return the float32 mean over the time steps where `mask` holds, zero if there are none."""
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("rt,rtc->rc", weights, values.astype(jnp.float32))
    return total / jnp.maximum(weights.sum(1), 1.0)[:, None]


def user_query(
    model: Model, decoder: PyTree, batch: Batch, hidden: Float[Array, "rows columns channels"]
) -> Float[Array, "rows channels"]:
    """Return u, the mean of the hidden states of the user's text and of the user's images.

    Vision tokens are weighted by the attention that prompt tokens give them under the last layer's projections. A row
    without images falls back on the mean embedding of its prompt's text.
    """
    prefix = slice(0, batch.layout.prefix)  # rows that have segments hold their whole prompt there
    hidden, roles = hidden[:, prefix], batch.roles[:, prefix]
    prompt, image = roles == Role.PROMPT, roles == Role.IMAGE
    query, key = model.last_projections(decoder, hidden)
    groups = query.shape[2] // key.shape[2]
    grouped = query.reshape(*query.shape[:2], key.shape[2], groups, -1)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(image[:, None, None, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    attention = jax.nn.softmax(scores, axis=-1).mean((1, 2))
    prompt_weights = prompt / jnp.maximum(prompt.sum(1, keepdims=True), 1)
    weights = jnp.einsum("bq,bqk->bk", prompt_weights, attention)
    from_images = jnp.einsum("bk,bkc->bc", weights, hidden.astype(jnp.float32))
    from_text = masked_mean(hidden, prompt)
    fallback = masked_mean(model.embed(decoder, batch.tokens[:, prefix]), prompt)
    return jnp.where(image.any(1)[:, None], (from_images + from_text) / 2, fallback)


def group_neighbours(
    features: Float[Array, "rows segments units channels"],
    valid: Bool[Array, "rows segments units"],
    candidates: int,
    grouping: str,
) -> tuple[Float[Array, "rows segments groups channels"], Bool[Array, "rows segments groups"]]:
    """Return at most `candidates` features per image, means of neighbours where there are more.

    "published" forms groups of units // candidates and drops the rest, as the published code does; "complete" spreads
    all units over the groups, as evenly as whole units allow.
    """
    units = valid.shape[-1]
    if units <= candidates:
        return features, valid
    index, count = jnp.arange(units), valid.sum(-1, keepdims=True)
    if grouping == "published":
        group = index // jnp.maximum(count // candidates, 1)
    else:
        group = index * candidates // jnp.maximum(count, 1)
    group = jnp.where(count > candidates, group, index)
    member = (group[..., None] == jnp.arange(candidates)) & valid[..., None]
    sizes = member.sum(-2)
    means = jnp.einsum("bsug,bsuc->bsgc", member.astype(jnp.float32), features.astype(jnp.float32))
    return means / jnp.maximum(sizes, 1)[..., None], sizes > 0


Scores = Float[Array, "rows candidates"]
Valid = Bool[Array, "rows candidates"]
Slots = Bool[Array, "rows slots"]
Keys = Key[Array, " rows"]
Picks = tuple[Int[Array, "rows slots"], Bool[Array, "rows slots"]]


def pick_coverage(cosines: Scores, valid: Valid, slots: Slots, settings: LatentsConfig, keys: Keys) -> Picks:
    """Pick the candidates of highest score that together cover the mass p, in descending order: the paper's rule."""
    chosen, keep = pick_top_k(cosines, valid, slots, settings, keys)
    scores = jnp.where(valid, cosines / settings.temperature, -jnp.inf)
    mass = jnp.where(valid, jax.nn.softmax(jnp.where(valid.any(-1, keepdims=True), scores, 0.0), axis=-1), 0.0)
    picked_mass = jnp.where(keep, jnp.take_along_axis(mass, chosen, axis=-1), 0.0)
    covered_before = jnp.cumsum(picked_mass, axis=-1) - picked_mass
    keep &= covered_before < settings.coverage
    return jnp.where(keep, chosen, 0), keep


def pick_top_k(cosines: Scores, valid: Valid, slots: Slots, settings: LatentsConfig, keys: Keys) -> Picks:
    """Pick the candidates of highest score, one for each slot, in descending order."""
    del settings, keys
    missing = max(0, slots.shape[-1] - cosines.shape[-1])
    scores = jnp.pad(jnp.where(valid, cosines, -jnp.inf), ((0, 0), (0, missing)), constant_values=-jnp.inf)
    best, order = jax.lax.top_k(scores, slots.shape[-1])
    keep = slots & jnp.isfinite(best)
    return jnp.where(keep, order, 0), keep


def pick_random(cosines: Scores, valid: Valid, slots: Slots, settings: LatentsConfig, keys: Keys) -> Picks:
    """Pick candidates uniformly at random: a control."""

    def draw(key: PRNGKeyArray) -> Array:  # a key per candidate, so that padding changes no draw
        candidate_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(cosines.shape[-1]))
        return jax.vmap(jax.random.uniform)(candidate_keys)

    return pick_top_k(jax.vmap(draw)(keys), valid, slots, settings, keys)


def pick_dense(cosines: Scores, valid: Valid, slots: Slots, settings: LatentsConfig, keys: Keys) -> Picks:
    """Pick all candidates in raster order: the whole image, pooled to one for each slot."""
    in_order = -jnp.arange(cosines.shape[-1], dtype=jnp.float32)
    return pick_top_k(jnp.broadcast_to(in_order, cosines.shape), valid, slots, settings, keys)


class Selector(NamedTuple):
    """A rule that selects targets.

    `pick(cosines, valid, slots, settings, keys)` returns the index of each slot's candidate, and whether it has one;
    `keys` depend on the record and the segment. `pooled`: the candidates are the image pooled to one for each slot.
    """

    pick: Callable[[Scores, Valid, Slots, LatentsConfig, Keys], Picks]
    pooled: bool = False


SELECTORS = {
    "coverage": Selector(pick_coverage),
    "dense": Selector(pick_dense, pooled=True),
    "top_k": Selector(pick_top_k),
    "random": Selector(pick_random),
}


def select(
    model: Model,
    decoder: PyTree,
    batch: Batch,
    features: Float[Array, "rows images units channels"],
    helper_features: Float[Array, "rows segments units channels"],
    settings: LatentsConfig,
    key: PRNGKeyArray,
) -> Selection:
    """Return the teacher's targets for every segment of a batch.

    The teacher's decoder runs once over whole samples whose slots hold the embedding of `latent_pad`. Selection then
    goes segment by segment, since each query includes the mean of the targets before. `decoder` is the teacher's, and
    the features are from its vision tower. `key` is for random rules.
    """
    inputs = model.embed(decoder, batch.tokens, batch.image_index, features)
    hidden, _ = model.decode(decoder, inputs, batch.positions, batch.attention_mask(settings))
    user = user_query(model, decoder, batch, hidden)
    selector = SELECTORS[settings.selection]
    count, grouping = settings.candidates, settings.grouping
    if selector.pooled:
        count, grouping = settings.latent_size, "complete"
    candidates, candidate_valid = group_neighbours(helper_features, batch.helper_images.unit_valid, count, grouping)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.record)
    segment_of_column = batch.layout.column_segment

    def next_segment(previous, segment):
        previous_mean, has_previous = previous
        text = (batch.roles == Role.ANSWER) & (segment_of_column == segment["number"])
        parts = jnp.stack([user, masked_mean(hidden, text), previous_mean], axis=1)
        present = jnp.stack([jnp.ones_like(has_previous), text.any(1), has_previous], axis=1)
        query = masked_mean(parts, present)
        cosines = cosine(query[:, None], segment["candidates"])
        segment_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, segment["number"])
        chosen, keep = selector.pick(cosines, segment["candidate_valid"], segment["slots"], settings, segment_keys)
        targets = jnp.take_along_axis(segment["candidates"], chosen[..., None], axis=1).astype(jnp.float32)
        following = masked_mean(targets, keep), keep.any(1)
        return following, (jnp.where(keep[..., None], targets, 0.0), keep, chosen, cosines)

    segments = {
        "number": jnp.arange(batch.layout.segments),
        "candidates": jnp.swapaxes(candidates, 0, 1),
        "candidate_valid": jnp.swapaxes(candidate_valid, 0, 1),
        "slots": jnp.swapaxes(batch.valid[:, batch.layout.slot_columns], 0, 1),
    }
    start = jnp.zeros_like(user), jnp.zeros(len(user), bool)
    _, picked = jax.lax.scan(next_segment, start, segments)
    targets, valid, chosen, cosines = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), picked)
    return Selection(targets, valid, chosen, cosines, user)
