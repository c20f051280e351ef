"""Small random models and samples that several tests share."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ilvr_jax.latents.layout import Sample, build_sample
from ilvr_jax.latents.tokens import SpecialTokens
from ilvr_jax.models.config import ModelConfig, VisionConfig
from ilvr_jax.models.images import PatchedImage
from ilvr_jax.training.step import objective

SPECIAL = SpecialTokens(
    pad=0,
    im_start=1,
    im_end=2,
    assistant=3,
    vision_start=4,
    vision_end=5,
    image_pad=6,
    latent_start=7,
    latent_pad=8,
    latent_end=9,
)
FIRST_WORD, VOCABULARY = 10, 48
VISION = VisionConfig(
    depth=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    out_hidden_size=32,
    window_size=56,
    fullatt_block_indexes=(1,),
)
CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=10000.0,
    mrope_section=(1, 1, 2),
    vision=VISION,
)
WINDOW_UNITS = VISION.window_units


def random_image(rng: np.random.Generator, rows: int, columns: int) -> PatchedImage:
    """Returns a still image of so many vision tokens a side."""
    return PatchedImage(rng.integers(0, 256, (4 * rows * columns, 588), dtype=np.uint8), 2 * rows, 2 * columns)


def words(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(FIRST_WORD, VOCABULARY, count).tolist()


def random_sample(
    rng: np.random.Generator,
    texts: tuple[int, ...] = (5, 3, 4),
    latent_size: int = 3,
    images: tuple[tuple[int, int], ...] = ((2, 3),),
    helpers: tuple[tuple[int, int], ...] | None = None,
    record: int = 0,
) -> Sample:
    """Returns a sample of random words: `texts` counts those of each text, with latent segments in between."""
    tokens = [SPECIAL.im_start, *words(rng, 2)]
    for rows, columns in images:
        tokens += [SPECIAL.vision_start, *[SPECIAL.image_pad] * (rows * columns), SPECIAL.vision_end]
    tokens += [*words(rng, 3), SPECIAL.im_end, SPECIAL.im_start, SPECIAL.assistant]
    for number, count in enumerate(texts):
        if number:
            tokens += [SPECIAL.latent_start, *[SPECIAL.latent_pad] * latent_size, SPECIAL.latent_end]
        tokens += words(rng, count)
    tokens.append(SPECIAL.im_end)
    helpers = helpers if helpers is not None else ((2, 2),) * (len(texts) - 1)
    return build_sample(
        np.array(tokens),
        [random_image(rng, *grid) for grid in images],
        [random_image(rng, *grid) for grid in helpers],
        SPECIAL,
        latent_size,
        record,
    )


def prompt_of(sample: Sample) -> Sample:
    """Returns the sample's prompt alone, up to and including the assistant header."""
    end = int(np.flatnonzero(sample.tokens == SPECIAL.assistant)[0]) + 1
    return build_sample(sample.tokens[:end], sample.images, [], SPECIAL, sample.latent_size, sample.record)


POISON = 1_000_000  # the loss of records from this number on is no number


def poisoned_objective(name, model, params, teacher, batch, *others):
    """Stands in for the train step's objective: the loss of poisoned records and its gradient are no numbers."""
    result = objective(name, model, params, teacher, batch, *others)
    return dataclasses.replace(result, loss=result.loss * jnp.where(batch.record >= POISON, jnp.nan, 1.0))
