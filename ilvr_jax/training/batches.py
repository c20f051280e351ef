"""What a run trains on: records, samples and batches as its config says."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from ilvr_jax.data.examples import ExampleSettings, build_example
from ilvr_jax.data.formats import FORMATS
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource, frozen_lake_settings
from ilvr_jax.data.pipeline import Share, Source, fingerprint, make_iterator, next_epoch
from ilvr_jax.data.records import BadRecord, Record
from ilvr_jax.data.tokenizer import load_tokenizer, record_texts, train_tokenizer
from ilvr_jax.distributed import is_main, open_exchange, wait_for_all
from ilvr_jax.method.layout import NO_IMAGE, Layout, padded_tokens
from ilvr_jax.models.sharding import local_rows
from ilvr_jax.training.configuration import BadConfig, blame, resolve_path
from ilvr_jax.training.run import Run
from ilvr_jax.training.vision_features import complete_features, open_features

TOKENIZER_RECORDS = 2000  # as many records' texts make the tokenizer


def open_source(config: ConfigDict) -> Source:
    """Returns the records that the config's data section names."""
    data = config.data
    if data.source in FORMATS:
        root = resolve_path(data.root) if data.root else None
        return FORMATS[data.source](resolve_path(data.path), root, data.on_bad_record, follow_links=data.follow_links)
    with blame("data"):
        settings = frozen_lake_settings(data.frozen_lake)
        exclude = tuple(str(resolve_path(path)) for path in settings.exclude)
        return FrozenLakeSource(dataclasses.replace(settings, exclude=exclude), config.seed, data.records)


def make_tokenizer(config: ConfigDict, source: Source) -> PreTrainedTokenizerFast:
    """Returns the tokenizer that the config names, or one made from the records' texts.

    A bad record raises BadRecord, or with `data.on_bad_record="skip"` is left out here too.
    """
    with blame("tokenizer"):
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


def example_settings(config: ConfigDict, helper_images: str) -> ExampleSettings:
    """Returns how records become samples for a stage's `helper_images`; raises ValueError for a bad value."""
    data = config.data
    return ExampleSettings(
        # What is generated is drawn at the size it is wanted in.
        image_scale=1.0 if data.source == "frozen_lake" else data.image_scale,
        min_pixels=data.min_pixels or None,
        max_pixels=data.max_pixels or None,
        latent_size=config.latents.latent_size,
        helper_images=helper_images,
        system=data.system,
    )


def config_buckets(config: ConfigDict, helper_images: str, window_units: int) -> dict[str, Layout]:
    """Returns the config's buckets by name for a stage's `helper_images`, the cheapest first.

    A sample goes to the first bucket that holds it, and a ConfigDict knows no order but the alphabet's.
    """
    size = config.latents.latent_size
    buckets = {name: Layout(latent_size=size, **bucket) for name, bucket in config.data.buckets.items()}
    buckets = dict(sorted(buckets.items(), key=lambda item: padded_tokens(item[1], window_units)))
    if helper_images != "latent":
        return {name: dataclasses.replace(bucket, helper_windows=0) for name, bucket in buckets.items()}
    return buckets


def open_iterator(run: Run, stage: str, seed: int, vision: PyTree) -> grain.DatasetIterator:
    """Returns the endless batches of a stage, with kept features of images if it has them; see `with_features`."""
    data, helper_images = run.config.data, run.config[stage].helper_images
    window_units = run.model.config.vision.window_units
    with blame("data"):
        settings = example_settings(run.config, helper_images)
        buckets = list(config_buckets(run.config, helper_images, window_units).values())
    if data.feature_cache and "vision" not in run.config[stage].train:
        settings = with_features(run, stage, settings, buckets, vision)
    with blame("data"):
        return make_iterator(
            run.source,
            functools.partial(build_example, tokenizer=run.tokenizer, special=run.special, settings=settings),
            buckets,
            run.config[stage].batch_size,
            seed,
            run.special,
            window_units,
            data.workers,
            data.on_bad_record,
            settings.features.no_image if settings.features else NO_IMAGE,
            open_share(run.mesh, run.config[stage].batch_size),
        )


def place_to_resume(run: Run, stage: str, step: int, place: dict[str, Any]) -> dict[str, Any]:
    """Returns where a stage resumes in its records: the place of its checkpoint, if it trained on the same ones.

    Raises BadConfig if its records have changed, unless `data.accept_change` is true: then a new epoch begins.
    """
    before, now = place.get("records"), fingerprint(run.source)
    if before == now:
        return place
    if before is None:
        run.progress.say(f"{stage}: its checkpoints are older than fingerprints of records; these are not compared")
        return place
    name = run.config.data.path or "data.frozen_lake"
    changed = f"{name} holds {now}, and {stage} was trained until step {step} on {before}"
    if not run.config.data.accept_change:
        raise BadConfig(
            f"{changed}; restore the records, start afresh with another --workdir, or train on with "
            "--config.data.accept_change=true"
        )
    run.progress.say(f"{changed}: accepted, a new epoch begins")
    return next_epoch(place, len(run.source))


def open_share(mesh: Mesh, batch_size: int) -> Share:
    """Returns what this process loads and which rows of a batch its devices work on."""
    return Share(local_rows(mesh, batch_size), jax.process_index(), jax.process_count(), open_exchange())


def with_features(
    run: Run, stage: str, settings: ExampleSettings, buckets: Sequence[Layout], vision: PyTree
) -> ExampleSettings:
    """Returns settings with a store of the features of all images of the records, computed now where it lacks them."""
    if jax.process_count() > 1:  # one of them encodes, with weights of its own
        vision = multihost_utils.process_allgather(vision, tiled=True)
    store = open_features(Path(run.config.data.feature_cache).expanduser(), run.model, vision, settings)
    workers = run.config.data.workers
    if is_main():
        count = complete_features(store, run.model, vision, run.source, settings, buckets, workers, run.progress)
        run.progress.say(f"{stage}: encoded {count} images; their features are in {store.folder}")
    wait_for_all("features are there")
    return dataclasses.replace(settings, features=store)
