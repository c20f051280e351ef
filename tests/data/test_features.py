"""Features of images that are computed once: the same numbers, and no vision tower in the step."""

import dataclasses
import functools
import io
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from ilvr_jax.config.schema import LatentsConfig
from ilvr_jax.data.examples import ExampleSettings, read_image
from ilvr_jax.data.features import FeatureStore, image_key
from ilvr_jax.data.mirage import MirageSource
from ilvr_jax.data.pipeline import load_sample
from ilvr_jax.data.records import Look, Record
from ilvr_jax.method.layout import Layout, collate, merge_layouts, required_layout
from ilvr_jax.models.qwen2_5_vl.images import EncodedImage, FeatureBatch
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.progress import Progress
from ilvr_jax.training.step import OBJECTIVES, loss_and_gradients
from ilvr_jax.training.vision_features import complete_features, open_features
from tests.samples import CONFIG, GEOMETRY, SPECIAL, random_sample

MODEL = Qwen2_5VL(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
SETTINGS = ExampleSettings(latent_size=3, max_pixels=8 * 784)
BUCKETS = [Layout(64, 1, 0, 8, 3, image_tokens=8, helper_tokens=16), Layout(64, images=1, image_tokens=8)]
FILES = Path(__file__).parent / "mirage"


@functools.cache
def encoder():
    return jax.jit(MODEL.encode_images)


def encode(image) -> EncodedImage:
    """Return the features that the tower makes of an image by itself."""
    features = encoder()(PARAMS["vision"], GEOMETRY.stack([[image]], 1, 16, image))[0, 0]
    shape = image.height // 2, image.width // 2, -1
    return EncodedImage(np.asarray(features[: image.vision_tokens]).reshape(shape))


def samples():
    rng = np.random.default_rng(4)
    shapes = [((5, 3, 4), ((2, 3),)), ((2, 4), ((1, 1), (2, 2))), ((9,), ((3, 1),)), ((1, 0, 2), ())]
    return [random_sample(rng, texts, images=images, record=n) for n, (texts, images) in enumerate(shapes)]


def losses(name, batch):
    """Return a batch's losses and gradients, and the program that computed them."""
    teacher, settings = {"decoder": PARAMS["decoder"]}, LatentsConfig(latent_size=3, candidates=5)
    program = jax.jit(
        lambda params, batch: loss_and_gradients(
            OBJECTIVES[name].loss, ("decoder",), 2, MODEL, params, teacher, batch, settings, jax.random.key(0)
        )
    )
    return program(PARAMS, batch), program.lower(PARAMS, batch).compile().as_text()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_features_in_place_of_pixels_give_the_same_losses_without_a_vision_layer(name):
    patched, encoded = samples(), []
    for sample in patched:
        images = {kind: tuple(map(encode, getattr(sample, kind))) for kind in ("images", "helper_images")}
        encoded.append(dataclasses.replace(sample, **images))
    layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in patched])
    assert layout == merge_layouts([required_layout(sample, GEOMETRY) for sample in encoded])
    (pixels, pixels_program), (features, features_program) = (
        losses(name, collate(rows, layout, SPECIAL, GEOMETRY)) for rows in (patched, encoded)
    )
    assert "VisionTower" in pixels_program and "VisionTower" not in features_program
    for one, other in zip(jax.tree.leaves(pixels), jax.tree.leaves(features), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_batch_without_images_has_the_kind_that_is_asked_for():
    sample = random_sample(np.random.default_rng(0), (3,), images=())
    batch = collate(
        [sample], Layout(32, image_tokens=4), SPECIAL, GEOMETRY, EncodedImage(np.zeros((0, 0, 32), np.float32))
    )
    assert isinstance(batch.images, FeatureBatch) and batch.images.features.shape == (1, 1, 4, 32)
    assert not batch.images.unit_valid.any() and not batch.helper_images.features.size


@pytest.fixture
def source(tmp_path):
    shutil.copytree(FILES, tmp_path / "data")
    return MirageSource(tmp_path / "data" / "sample.jsonl")


@pytest.fixture
def complete(source, tmp_path):
    """Return a function that completes a store, and returns it with the number of images that it lacked."""

    def run(vision=PARAMS["vision"], settings=SETTINGS, buckets=BUCKETS, model=MODEL, workers=0):
        store = open_features(tmp_path / "features", model, vision, settings)
        with Progress(tmp_path / "log", Console(file=io.StringIO())) as progress:
            return store, complete_features(store, model, vision, source, settings, buckets, workers, progress)

    return run


def images_of(record: Record) -> list:
    return [*record.images, *(step.helper_image for step in record.steps if isinstance(step, Look))]


def distinct_images(source) -> set[str]:
    return {image_key(image) for record in source for image in images_of(record)}


@pytest.mark.parametrize("workers", [0, 1])
def test_each_distinct_image_is_encoded_once_as_the_tower_does_alone(source, complete, workers):
    store, count = complete(workers=workers)
    assert count == len(distinct_images(source)) == 6
    for record in source:
        for image in images_of(record):
            expected = encode(read_image(image, SETTINGS))
            assert store.get(image).features.shape == expected.features.shape
            np.testing.assert_allclose(store.get(image).features, expected.features, atol=1e-5)
    again, count = complete(workers=workers)
    assert count == 0 and again.folder == store.folder


def test_other_weights_settings_and_contents_are_computed_anew(source, complete):
    store, _ = complete()
    moved = jax.tree.map(lambda leaf: leaf + 1e-3, PARAMS["vision"])
    half = Qwen2_5VL(dataclasses.replace(CONFIG, dtype="bfloat16"))
    for change in (
        {"vision": moved},
        {"settings": dataclasses.replace(SETTINGS, max_pixels=4 * 784)},
        {"model": half},
    ):
        other, count = complete(**change)
        assert count == 6 and other.folder != store.folder
    assert complete(model=half)[0].get(source[0].images[0]).features.dtype == "bfloat16"
    shutil.copyfile(source[0].images[0], source[1].images[0])
    assert complete()[1] == 0  # known under another name
    shutil.copyfile(FILES.parent / "vsp_planning" / "images" / "level3_000.png", source[1].images[0])
    assert complete()[1] == 1


def test_stage_2_needs_the_users_images_alone(source, complete):
    settings = dataclasses.replace(SETTINGS, helper_images="slots")
    assert complete(settings=settings)[1] == len({image_key(record.images[0]) for record in source}) == 3
    assert complete()[1] == 3


def test_half_a_store_is_completed(source, complete, monkeypatch):
    monkeypatch.setattr("ilvr_jax.training.vision_features.FILE_BYTES", 1)
    monkeypatch.setattr("ilvr_jax.training.vision_features.BATCH_TOKENS", 4)
    add, added = FeatureStore.add, []

    def add_or_die(store, features):
        if len(added) == 3:
            (store.folder / "tmp.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        added.append(features)
        add(store, features)

    monkeypatch.setattr(FeatureStore, "add", add_or_die)
    with pytest.raises(KeyboardInterrupt):
        complete()
    monkeypatch.setattr(FeatureStore, "add", add)
    store, count = complete()
    assert count == 3 and len(list(store.folder.iterdir())) == 6
    cut = sorted(store.folder.iterdir())[2]
    cut.write_bytes(cut.read_bytes()[:-1])
    assert complete()[1] == 1
    assert all(store.get(image) for record in source for image in images_of(record))


def test_images_too_large_and_unreadable_stay_out(source, complete, tmp_path):
    small = [Layout(64, 1, 0, 8, 3, image_tokens=4, helper_tokens=4)]
    settings = dataclasses.replace(SETTINGS, max_pixels=None)
    assert complete(settings=settings, buckets=small)[1] == 0
    source[0].images[0].write_bytes(b"no image")
    store, count = complete()
    assert count == 5
    loaded = load(source, 0, store)
    assert "must be a whole PNG, JPEG" in loaded.problem and "begins with b'no image'" in loaded.problem


def load(source, number, store):
    def to_sample(record, number):
        images = [read_image(image, dataclasses.replace(SETTINGS, features=store)) for image in record.images]
        sample = random_sample(np.random.default_rng(0), (3,), images=[(1, 1)] * len(images))
        return dataclasses.replace(sample, images=tuple(images))

    return load_sample(number, source, to_sample, BUCKETS, GEOMETRY, store.no_image)


def test_an_image_that_changes_while_training_is_named(source, complete):
    store, _ = complete()
    assert isinstance(load(source, 1, store).sample.images[0], EncodedImage)
    shutil.copyfile(FILES.parent / "vsp_planning" / "images" / "level3_000.png", source[1].images[0])
    problem = load(source, 1, store).problem
    assert (
        problem.startswith("sample.jsonl line 2: an image must have the features")
        and "run the command again" in problem
    )
