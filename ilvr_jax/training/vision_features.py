"""Image features of a data set from the frozen vision tower, computed once per distinct image before a stage."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import jax
import numpy as np
from jaxtyping import PyTree
from rich.progress import track

from ilvr_jax.data.examples import ExampleSettings, read_image
from ilvr_jax.data.features import FeatureStore, image_key
from ilvr_jax.data.pipeline import Source, stream
from ilvr_jax.data.records import BadRecord, Text
from ilvr_jax.method.layout import Layout
from ilvr_jax.models.base import Model
from ilvr_jax.models.qwen2_5_vl.images import PatchedImage
from ilvr_jax.progress import Progress

VERSION = 1  # of the features and of their files
BATCH_TOKENS = 1024  # vision tokens encoded at a time, unless one image has more
FILE_BYTES = 2**28  # of features per file; a process that dies loses no more than these


def open_features(folder: Path, model: Model, vision: PyTree, settings: ExampleSettings) -> FeatureStore:
    """Return the store, inside `folder`, for the features that this vision tower computes with these settings."""
    origin = {
        "version": VERSION,
        "image_scale": settings.image_scale,
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
        "vision": dataclasses.asdict(model.config.vision),
        "dtype": model.config.dtype,
        "weights": weights_hash(vision),
    }
    name = hashlib.blake2b(json.dumps(origin).encode(), digest_size=16).hexdigest()
    return FeatureStore(folder / name, model.config.vision.out_hidden_size, model.config.dtype)


def weights_hash(params: PyTree) -> str:
    """Return a hash of every parameter's name, shape, dtype and value."""
    content = hashlib.blake2b(digest_size=16)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        content.update(f"{jax.tree_util.keystr(keys)} {leaf.shape} {leaf.dtype}".encode())
        content.update(np.ascontiguousarray(leaf).view(np.uint8))
    return content.hexdigest()


def complete_features(
    store: FeatureStore,
    model: Model,
    vision: PyTree,
    source: Source,
    settings: ExampleSettings,
    buckets: Sequence[Layout],
    workers: int,
    progress: Progress,
) -> int:
    """Add the features of the source's images that the store lacks, and return their number.

    Images that cannot be read, or are too large for every bucket, are skipped: training reports them. The vision tower
    is compiled once for each image size of `buckets`.
    """
    for name in store.repair():
        progress.log(f"features: {store.folder / name} was damaged; its images are encoded again")
    rooms = sorted({room for bucket in buckets for room in (bucket.image_tokens, bucket.helper_tokens) if room})
    encode, geometry = jax.jit(model.encode_images), model.geometry
    pending: dict[int, dict[str, PatchedImage]] = {room: {} for room in rooms}
    features: dict[str, np.ndarray] = {}
    added: set[str] = set()

    def flush(room: int) -> None:
        images, pending[room] = pending[room], {}
        rows = [[image] for image in images.values()]
        rows += [[]] * (batch_size(room) - len(rows))  # one shape, so one compilation
        encoded = np.asarray(encode(vision, geometry.stack(rows, 1, room, rows[0][0])))
        for (key, image), units in zip(images.items(), encoded[:, 0], strict=False):
            shape = image.height // 2, image.width // 2, -1
            features[key] = units[: image.vision_tokens].reshape(shape).copy()
        if sum(array.nbytes for array in features.values()) >= FILE_BYTES:
            store.add(features)
            features.clear()

    for key, image in new_images(store, source, settings, workers, progress):
        room = next((room for room in rooms if geometry.room(image) <= room), None)
        if room is None or key in added:
            continue
        added.add(key)
        pending[room][key] = image
        if len(pending[room]) == batch_size(room):
            flush(room)
    for room in rooms:
        if pending[room]:
            flush(room)
    if features:
        store.add(features)
    return len(added)


def batch_size(room: int) -> int:
    """Return the number of images of up to `room` vision tokens that are encoded at a time."""
    return max(1, BATCH_TOKENS // room)


def new_images(
    store: FeatureStore, source: Source, settings: ExampleSettings, workers: int, progress: Progress
) -> Iterator[tuple[str, PatchedImage]]:
    """Yield the images of the records that the store lacks, some more than once."""
    load = functools.partial(load_new_images, source=source, store=store, settings=settings)
    records = grain.MapDataset.range(len(source)).map(load)
    shown = {"description": "features", "total": len(source), "console": progress.console, "transient": True}
    for images in track(stream(records, workers), **shown, disable=not progress.console.is_terminal):
        yield from images


def load_new_images(
    number: int, source: Source, store: FeatureStore, settings: ExampleSettings
) -> list[tuple[str, PatchedImage]]:
    """Return the keys and patches of a record's images that the store lacks, skipping unreadable ones."""
    images = []
    try:
        record = source[number]
    except BadRecord:
        return images
    looks = [step.helper_image for step in record.steps if not isinstance(step, Text)]
    for image in (*record.images, *(looks if settings.helper_images in ("latent", "encode") else ())):
        key = image_key(image)
        if key and key not in store:
            try:
                images.append((key, read_image(image, settings)))
            except BadRecord:
                continue
    return images
