"""The batches that a stage trains on."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree

from ilvr_jax.config.experiments import config_errors
from ilvr_jax.config.fields import BadConfig
from ilvr_jax.data.examples import ExampleSettings, build_example
from ilvr_jax.data.pipeline import ProcessShard, fingerprint, make_iterator, next_epoch
from ilvr_jax.data.sources import config_buckets, example_settings
from ilvr_jax.distributed import is_main, open_exchange, wait_for_all
from ilvr_jax.method.layout import NO_IMAGE, Layout
from ilvr_jax.models.sharding import local_rows
from ilvr_jax.training.run import Run
from ilvr_jax.training.vision_features import complete_features, open_features


def open_iterator(run: Run, stage: str, seed: int, vision: PyTree) -> grain.DatasetIterator:
    """Return the endless batches of a stage, with stored image features if it uses them; see `with_features`."""
    data, helper_images = run.config.data, run.config.stages[stage].helper_images
    geometry = run.model.geometry
    settings = example_settings(run.config, geometry, helper_images)
    buckets = list(config_buckets(run.config, helper_images).values())
    if data.feature_cache and "vision" not in run.config.stages[stage].train:
        settings = with_features(run, stage, settings, buckets, vision)
    with config_errors("data"):
        return make_iterator(
            run.source,
            functools.partial(build_example, tokenizer=run.tokenizer, special=run.special, settings=settings),
            buckets,
            run.config.stages[stage].batch_size,
            seed,
            run.special,
            geometry,
            data.workers,
            data.on_bad_record,
            settings.features.no_image if settings.features else NO_IMAGE,
            open_share(run.mesh, run.config.stages[stage].batch_size),
        )


def place_to_resume(run: Run, stage: str, step: int, place: dict[str, Any]) -> dict[str, Any]:
    """Return the place in its records where a stage resumes: that of its checkpoint, if the records are the same.

    Raises BadConfig if they have changed, unless `data.accept_change` is true: then a new epoch begins.
    """
    before, now = place.get("records"), fingerprint(run.source)
    if before == now:
        return place
    if before is None:
        run.progress.log(
            f"{stage}: its checkpoints have no fingerprint of the records, so a change of records is not detected"
        )
        return place
    name = run.config.data.path or "data.frozen_lake"
    changed = f"{name} holds {now}, and {stage} was trained until step {step} on {before}"
    if not run.config.data.accept_change:
        raise BadConfig(
            f"{changed}; restore the records, start afresh with another --workdir, or train on with "
            "--config.data.accept_change=true"
        )
    run.progress.log(f"{changed}: accepted by data.accept_change, a new epoch begins")
    return next_epoch(place, len(run.source))


def open_share(mesh: Mesh, batch_size: int) -> ProcessShard:
    """Return which records this process loads and which rows of a batch its devices work on."""
    return ProcessShard(local_rows(mesh, batch_size), jax.process_index(), jax.process_count(), open_exchange())


def with_features(
    run: Run, stage: str, settings: ExampleSettings, buckets: Sequence[Layout], vision: PyTree
) -> ExampleSettings:
    """Return settings with a store of the features of all the records' images, computing those that it lacks."""
    if jax.process_count() > 1:  # the main process encodes alone, so it needs all weights
        vision = multihost_utils.process_allgather(vision, tiled=True)
    store = open_features(Path(run.config.data.feature_cache).expanduser(), run.model, vision, settings)
    workers = run.config.data.workers
    if is_main():
        count = complete_features(store, run.model, vision, run.source, settings, buckets, workers, run.progress)
        run.progress.log(f"{stage}: encoded {count} images; their features are in {store.folder}")
    wait_for_all("features are stored")
    return dataclasses.replace(settings, features=store)
