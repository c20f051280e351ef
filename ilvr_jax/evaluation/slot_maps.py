"""Where the slots of own answers point: their cosines with vision features, and their attention to vision tokens."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.data.examples import read_image
from ilvr_jax.data.records import BadRecord, Look
from ilvr_jax.errors import InputError
from ilvr_jax.evaluation.oracle import answer_batches
from ilvr_jax.evaluation.slot_vectors import Question, complete_looks
from ilvr_jax.inference.requests import RequestOutput
from ilvr_jax.method.layout import Batch, Sample, build_sample
from ilvr_jax.method.positions import grid_places
from ilvr_jax.method.slots import fill_slots
from ilvr_jax.models.base import Model
from ilvr_jax.models.lora import decoder_params
from ilvr_jax.models.qwen2_5_vl.images import MERGE, EncodedImage, PatchedImage

LAST_LAYERS = 2  # of the decoder, over which attention is averaged; all of a decoder with fewer
SHORTEST = 1e-8  # length that vectors are divided by at least

Picture = PatchedImage | EncodedImage


@dataclasses.dataclass(frozen=True)
class SlotMaps:
    """Where the slots of the complete looks of an own answer point.

    Attributes:
        cosines: of each slot, without what its rule adds to any hidden state, with the features of the input images,
            one image after the other, each in reading order.
        attention: the shares of attention that the input images' vision tokens get from the place of each slot, the
            mean over heads and the last LAST_LAYERS layers.
        helper_cosines: as `cosines`, for each look with the features of its true helper image; None without one.
        grids: the rows and columns of the input images' vision tokens.
        helper_grids: those of each look's true helper image, or None.
    """

    cosines: Float[np.ndarray, "looks slots tokens"]
    attention: Float[np.ndarray, "looks slots tokens"]
    helper_cosines: tuple[Float[np.ndarray, "slots helper_tokens"] | None, ...]
    grids: tuple[tuple[int, int], ...]
    helper_grids: tuple[tuple[int, int] | None, ...]


def grid_of(image: Picture) -> tuple[int, int]:
    """Return the rows and columns of an image's vision tokens."""
    return image.height // MERGE, image.width // MERGE


def measure_maps(questions: Sequence[Question], outputs: Mapping[int, RequestOutput], rows: int) -> dict[int, SlotMaps]:
    """Return the maps of own answers with a complete look, by number of the question.

    The decoder runs once over each prompt and answer up to the end of its last complete look, with the slots that the
    answer had; all batches have one shape. An answer whose text holds the token of an image has no maps, since its
    positions would be those of an image.
    """
    if not questions:
        return {}
    evaluator = questions[0].evaluator
    trained, size = evaluator.trained, evaluator.decoding["latent_size"]
    visibility, found = evaluator.decoding.get("image_visibility", "all"), {}
    settings = LatentsConfig(latent_size=size, image_visibility=visibility)

    def samples() -> Iterator[tuple[int, Sample]]:
        for number, output in sorted(outputs.items()):
            sample = own_sample(questions[number], output, number)
            if sample is not None:
                yield number, sample

    for numbered, batch in answer_batches(trained, samples, min(rows, max(1, len(outputs)))):
        shape = (len(batch.tokens), *batch.layout.slot_columns.shape, trained.model.config.hidden_size)
        slots = np.zeros(shape, np.float32)
        for row, (number, sample) in enumerate(numbered):
            count = len(sample.slot_starts)
            slots[row, :count] = complete_looks(outputs[number], size)[:count]
        measured = jax.tree.map(np.asarray, measure_slots(trained.model, trained.params, batch, slots, settings))
        for row, (number, sample) in enumerate(numbered):
            found[number] = _maps_of(sample, MeasuredSlots(*(array[row] for array in measured)))
    return found


def own_sample(question: Question, output: RequestOutput, number: int) -> Sample | None:
    """Return a prompt and its own answer up to the end of the last complete look, None without such a look.

    The helper images are those of the record's steps, as many as the answer has complete looks or fewer.
    """
    evaluator = question.evaluator
    trained, size = evaluator.trained, evaluator.decoding["latent_size"]
    count = len(complete_looks(output, size))
    if not count:
        return None
    end = output.looks[count - 1].position + size + 2  # with both markers
    settings, rule = evaluator.prompts, evaluator.decoding.get("slot_positions", "text")
    try:
        prompt = evaluator.prompt(question.record, question.key.number)
        tokens = np.concatenate([prompt.tokens, np.array(output.tokens[:end], np.int32)])
        sample = build_sample(
            tokens, prompt.images, [], trained.special, size, number, settings.position_ids, slot_positions=rule
        )
    except (InputError, ValueError):  # a prompt that was asked, but whose image is gone, or a text with image tokens
        return None
    return dataclasses.replace(sample, helper_images=helper_images(question)[:count])


def helper_images(question: Question) -> tuple[Picture, ...]:
    """Return the true helper images of a record's looks, none if one of them cannot be read."""
    looks = [step.helper_image for step in question.record.steps if isinstance(step, Look)]
    try:
        return tuple(read_image(image, question.evaluator.prompts) for image in looks)
    except BadRecord:
        return ()


class MeasuredSlots(NamedTuple):
    """The maps of a batch, or of a row; images have room for `units` vision tokens each."""

    cosines: Float[Array, "*rows looks slots images units"]
    attention: Float[Array, "*rows looks slots images units"]
    helper_cosines: Float[Array, "*rows looks slots units"]


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def measure_slots(
    model: Model,
    params: PyTree,
    batch: Batch,
    slots: Float[Array, "rows looks slots channels"],
    settings: LatentsConfig,
) -> MeasuredSlots:
    """Return the maps of a batch whose slots have these inputs; those of slots that a row lacks are meaningless."""
    decoder, columns = decoder_params(params), batch.layout.slot_columns
    features, helpers = (
        model.encode_images(params["vision"], images) for images in (batch.images, batch.helper_images)
    )
    inputs = model.embed(decoder, batch.tokens, batch.image_index, features)
    zeros = jnp.zeros_like(inputs[:, columns])
    added = fill_slots(model, decoder, zeros, zeros, grid_places(batch.positions[..., columns]))
    inputs = inputs.at[:, columns].set(slots.astype(inputs.dtype))
    weights = model.attention_weights(
        decoder, inputs, batch.positions, batch.attention_mask(settings), columns.reshape(-1), LAST_LAYERS
    ).mean((1, 2))
    weights = weights.reshape(len(weights), *columns.shape, -1)
    to_images = jax.vmap(functools.partial(_by_vision_token, units=features.shape[1] * features.shape[2]))
    units = _units(slots - added)
    return MeasuredSlots(
        cosines=jnp.einsum("rlkc,riuc->rlkiu", units, _units(features)),
        attention=to_images(weights, batch.image_index).reshape(*weights.shape[:3], *features.shape[1:3]),
        helper_cosines=jnp.einsum("rlkc,rluc->rlku", units, _units(helpers)),
    )


def _units(vectors: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """Return vectors of length 1 in float32; those of zeros stay zeros."""
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), SHORTEST)


def _by_vision_token(
    weights: Float[Array, "looks slots columns"], image_index: Int[Array, " columns"], units: int
) -> Float[Array, "looks slots units"]:
    """Return the weights of the columns that hold vision tokens, by number of the token."""
    places = jnp.where(image_index >= 0, image_index, units)  # the others are out of range
    return jnp.zeros((*weights.shape[:2], units)).at[..., places].add(weights, mode="drop")


def _maps_of(sample: Sample, measured: MeasuredSlots) -> SlotMaps:
    """Return the maps of a sample from those of its row, without padding."""
    count, size = len(sample.slot_starts), sample.latent_size
    tokens = [image.vision_tokens for image in sample.images]

    def of_images(maps: Float[np.ndarray, "looks slots images units"]) -> Float[np.ndarray, "looks slots tokens"]:
        parts = [maps[:count, :size, number, :room] for number, room in enumerate(tokens)]
        return np.concatenate([np.zeros((count, size, 0), np.float32), *parts], axis=-1)

    helpers = [
        measured.helper_cosines[look, :size, : image.vision_tokens] for look, image in enumerate(sample.helper_images)
    ]
    missing = (None,) * (count - len(helpers))
    return SlotMaps(
        cosines=of_images(measured.cosines),
        attention=of_images(measured.attention),
        helper_cosines=(*helpers, *missing),
        grids=tuple(map(grid_of, sample.images)),
        helper_grids=(*map(grid_of, sample.helper_images), *missing),
    )
