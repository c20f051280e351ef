"""Slots that hold the features of a record's true helper images, as stage 1 fills them."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ilvr_jax.checkpoints.trained import TrainedModel
from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.data.examples import ExampleSettings, build_example
from ilvr_jax.data.records import BadRecord, Look, Record
from ilvr_jax.evaluation.interventions import Slots
from ilvr_jax.method.layout import Batch, Sample, collate, merge_layouts, required_layout
from ilvr_jax.method.objectives import fill_with_targets
from ilvr_jax.method.selection import Selection, select
from ilvr_jax.models.base import Model
from ilvr_jax.models.lora import decoder_params


def has_looks(record: Record) -> bool:
    """Return whether a record's steps have looks."""
    return any(isinstance(step, Look) for step in record.steps)


def oracle_slots(
    trained: TrainedModel, records: Iterable[tuple[int, Record]], latent_size: int, prompts: ExampleSettings, seed: int
) -> dict[int, Slots]:
    """Return the slots of records with looks, by their number, for answers with `latent_size` slots per look.

    The model itself is the teacher, and the settings are the run's, or the defaults for a model of no run. Records of
    which no sample can be made, as their helper images cannot be read, have no slots.
    """
    latents = trained.config.latents if trained.config else LatentsConfig()
    latents = dataclasses.replace(latents, latent_size=latent_size)
    settings = dataclasses.replace(prompts, latent_size=latent_size, helper_images="latent")
    records = [(number, record) for number, record in records if has_looks(record)]

    def samples() -> Iterator[tuple[int, Sample]]:
        for number, record in records:
            with contextlib.suppress(BadRecord):
                yield number, build_example(record, trained.tokenizer, trained.special, settings, number)

    found, key = {}, jax.random.key(seed)
    for ((number, sample),), batch in answer_batches(trained, samples, rows=1):
        inputs = np.asarray(target_inputs(trained.model, trained.params, batch, latents, key))[0]
        found[number] = Slots(inputs[: len(sample.slot_starts)].reshape(-1, inputs.shape[-1]))
    return found


def answer_batches(
    trained: TrainedModel, samples: Callable[[], Iterable[tuple[int, Sample]]], rows: int
) -> Iterator[tuple[list[tuple[int, Sample]], Batch]]:
    """Yield numbered samples with their batch, up to `rows` at a time, all batches in one shape, which compiles once.

    The last batch repeats its last sample. `samples` is called twice: the images of all of them fill memory.
    """
    geometry = trained.model.geometry
    layouts = [required_layout(sample, geometry) for _, sample in samples()]
    if not layouts:
        return
    layout = merge_layouts(layouts)
    remaining = iter(samples())
    while numbered := list(itertools.islice(remaining, rows)):
        filled = [sample for _, sample in numbered]
        filled += filled[-1:] * (rows - len(filled))
        yield numbered, collate(filled, layout, trained.special, geometry)


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def target_inputs(
    model: Model, params: PyTree, batch: Batch, settings: LatentsConfig, key: PRNGKeyArray
) -> Float[Array, "rows segments slots channels"]:
    """Return the inputs that stage 1 gives to slots: the targets, or where there are none what `latent_pad` embeds."""
    decoder = decoder_params(params)
    _, selection = select_targets(model, params, batch, settings, key)
    pause = model.embed(decoder, batch.tokens[:, batch.layout.slot_columns])
    return fill_with_targets(model, decoder, pause, selection, batch)


def select_targets(
    model: Model, params: PyTree, batch: Batch, settings: LatentsConfig, key: PRNGKeyArray
) -> tuple[Float[Array, "rows images units channels"], Selection]:
    """Return the features of the user images, and the targets of slots with the model itself as the teacher."""
    features, helper_features = (
        model.encode_images(params["vision"], images) for images in (batch.images, batch.helper_images)
    )
    return features, select(model, decoder_params(params), batch, features, helper_features, settings, key)
