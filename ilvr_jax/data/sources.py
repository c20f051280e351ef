"""The records that a config names, and its settings of samples, prompts and buckets."""

import dataclasses
import itertools
from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from ilvr_jax.config.experiments import config_errors, resolve_path
from ilvr_jax.config.fields import BadConfig, choose
from ilvr_jax.config.schema import DataConfig, RunConfig
from ilvr_jax.data.examples import ExampleSettings
from ilvr_jax.data.formats import FORMATS
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.held_out import hold_out
from ilvr_jax.data.pipeline import Source
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.data.tokenizer import load_tokenizer, record_texts, train_tokenizer
from ilvr_jax.method.layout import Layout, padded_tokens
from ilvr_jax.models.base import ImageGeometry

TOKENIZER_RECORDS = 2000  # records whose texts the tokenizer is trained on


def open_source(data: DataConfig, seed: int) -> Source:
    """Return the records of a config; `seed` is for generated ones.

    Raises BadConfig for an unknown source, and BadRecord for a file that cannot be read.
    """
    opener = choose({"frozen_lake": None, **FORMATS}, data.source, "data.source")
    if opener is None:
        with config_errors("data"):
            exclude = tuple(str(resolve_path(path)) for path in data.frozen_lake.exclude)
            return FrozenLakeSource(dataclasses.replace(data.frozen_lake, exclude=exclude), seed, data.records)
    if not data.path:
        raise BadConfig(f"`data.path` must be a file of the format {data.source}, got none")
    root = resolve_path(data.root) if data.root else None
    return opener(resolve_path(data.path), root, data.on_bad_record, follow_links=data.follow_links)


def open_parts(config: RunConfig) -> tuple[Source, Source | None]:
    """Return the records that a run trains on, and those that `eval.fraction` holds out of them, None without any.

    Raises as `open_source` does, and BadConfig for records that cannot be divided.
    """
    source, fraction = open_source(config.data, config.seed), config.eval.fraction
    if not fraction:
        return source, None
    if config.data.source == "frozen_lake":
        raise BadConfig(
            f"`eval.fraction` must be 0 with data.source frozen_lake, whose maps recur, got {fraction}; set eval.data"
        )
    if len(source) < 2:
        raise BadConfig(f"`eval.fraction` must be 0 for a single record, got {fraction}")
    return hold_out(source, fraction)


def make_tokenizer(config: RunConfig, source: Source) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the config names, or one trained on the records' texts.

    A bad record raises BadRecord, or with `data.on_bad_record="skip"` is skipped here too.
    """
    with config_errors("tokenizer"):
        if config.tokenizer:
            return load_tokenizer(resolve_path(config.tokenizer))

    def records() -> Iterator[Record]:
        for index in range(min(len(source), TOKENIZER_RECORDS)):
            try:
                yield source[index]
            except BadRecord:
                if config.data.on_bad_record == "error":
                    raise

    return train_tokenizer(itertools.chain([config.data.system, config.eval.question], record_texts(records())))


def example_settings(config: RunConfig, geometry: ImageGeometry, helper_images: str) -> ExampleSettings:
    """Return the settings of samples for a stage's `helper_images`."""
    # Generated images are drawn in the size they are used in.
    scale = 1.0 if config.data.source == "frozen_lake" else config.data.image_scale
    prompts = prompt_settings(config, geometry)
    return dataclasses.replace(prompts, image_scale=scale, question=None, helper_images=helper_images)


def prompt_settings(config: RunConfig, geometry: ImageGeometry) -> ExampleSettings:
    """Return the settings of prompts in an evaluation."""
    return ExampleSettings(
        image_scale=config.data.image_scale,
        min_pixels=config.data.min_pixels or None,
        max_pixels=config.data.max_pixels or None,
        question=config.eval.question or None,
        latent_size=config.latents.latent_size,
        slot_positions=config.latents.slot_positions,
        system=config.data.system,
        position_ids=geometry.position_ids,
    )


def config_buckets(config: RunConfig, helper_images: str) -> dict[str, Layout]:
    """Return the config's buckets by name for a stage's `helper_images`, the cheapest first.

    A sample goes to the first bucket that holds it.
    """
    size = config.latents.latent_size
    buckets = {name: Layout(latent_size=size, **vars(bucket)) for name, bucket in config.data.buckets.items()}
    buckets = dict(sorted(buckets.items(), key=lambda item: (padded_tokens(item[1]), item[0])))
    if helper_images != "latent":
        return {name: dataclasses.replace(bucket, helper_tokens=0) for name, bucket in buckets.items()}
    return buckets
