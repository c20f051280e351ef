"""Small random models, samples and runs that several tests share."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ilvr_jax.checkpoints.manager import Checkpoints
from ilvr_jax.checkpoints.runs import stage_folder
from ilvr_jax.config.experiments import load_config, parse
from ilvr_jax.config.schema import FrozenLakeConfig
from ilvr_jax.config.workdir import to_json
from ilvr_jax.data.export import write_records
from ilvr_jax.data.frozen_lake.source import FrozenLakeSource
from ilvr_jax.data.tokenizer import record_texts, special_tokens, train_tokenizer
from ilvr_jax.method.layout import Sample, build_sample
from ilvr_jax.method.objectives import OBJECTIVES
from ilvr_jax.method.tokens import SpecialTokens
from ilvr_jax.models.qwen2_5_vl.config import ModelConfig, VisionConfig, model_config
from ilvr_jax.models.qwen2_5_vl.images import PatchedImage
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.training.state import TrainState
from tests.paths import REPOSITORY

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
GEOMETRY = VISION.geometry


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


def seen_until_look(tokens: np.ndarray) -> np.ndarray:
    """Returns which tokens each token attends to with `image_visibility="until_look"`, by the definition."""
    tokens = list(tokens)
    mask = np.tril(np.ones((len(tokens), len(tokens)), bool))
    image, look = tokens.index(SPECIAL.image_pad), tokens.index(SPECIAL.latent_start)
    inside = False
    for place, token in enumerate(tokens):
        inside = token == SPECIAL.latent_start or (inside and token != SPECIAL.latent_end)
        if place > look and not (inside and token != SPECIAL.latent_start):
            mask[place, image : look + 1] = False
    return mask


def prompt_of(sample: Sample) -> Sample:
    """Returns the sample's prompt alone, up to and including the assistant header."""
    end = int(np.flatnonzero(sample.tokens == SPECIAL.assistant)[0]) + 1
    return build_sample(sample.tokens[:end], sample.images, [], SPECIAL, sample.latent_size, sample.record)


POISON = 1_000_000  # the loss of records from this number on is no number


def poison_objective(monkeypatch, name: str) -> None:
    """Makes the loss of poisoned records, and its gradient, no number in the objective of that name."""
    plain = OBJECTIVES[name]

    def loss(model, params, teacher, batch, *others):
        result = plain.loss(model, params, teacher, batch, *others)
        return result.replace(loss=result.loss * jnp.where(batch.record >= POISON, jnp.nan, 1.0))

    monkeypatch.setitem(OBJECTIVES, name, dataclasses.replace(plain, loss=loss))


def tiny_config(eval_data: Path | None = None) -> ConfigDict:
    """Returns the config of plain maps with a model, batches and a bucket so small that a run takes seconds."""
    config = load_config(REPOSITORY / "configs" / "plain_maps.py")
    config.model.update(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    config.model.mrope_section = (1, 1, 2)
    config.model.vision.update(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, fullatt_block_indexes=(0,))
    exclude = (str(eval_data),) if eval_data else ()
    config.data.update(source="frozen_lake", image_scale=1.0, records=200, workers=0)
    config.data.frozen_lake = ConfigDict(dict(levels=(3,), max_moves=4, cell_pixels=28, exclude=exclude))
    bucket = dict(prefix=120, segments=2, text=30, tail=30, images=1, image_tokens=16, helper_tokens=16)
    config.data.buckets = ConfigDict(dict(small=bucket))
    for name in config.stages:
        config[name].update(steps=6, batch_size=4, accumulation=1)
    config.eval.update(data=str(eval_data or ""), max_new_tokens=8, batch_size=8)
    config.update(log_every=1, checkpoint_every=4, checkpoint_keep=2)
    return config


def export_maps(folder: Path, count: int = 4) -> Path:
    """Returns a file of maps with plans and pictures, as `python -m ilvr_jax.export_data` writes them."""
    maps = FrozenLakeSource(FrozenLakeConfig(levels=(3,), max_moves=4), seed=5, count=count)
    write_records([maps[index] for index in range(len(maps))], folder)
    return folder / "train.jsonl"


def untrained_run(folder: Path, seed: int = 0) -> Path:
    """Returns the workdir of a run on plain maps with a small model that has learnt nothing, saved after stage 1."""
    config = load_config(REPOSITORY / "configs" / "plain_maps.py")
    config.model.update(hidden_size=32, intermediate_size=32, num_hidden_layers=1, mrope_section=(2, 1, 1))
    config.model.vision.update(depth=1, fullatt_block_indexes=(0,))
    config.eval.max_new_tokens = 12
    folder.mkdir()
    config = parse(config)
    (folder / "config.json").write_text(to_json(config))
    records = FrozenLakeSource(FrozenLakeConfig(), seed=0, count=30)
    tokenizer = train_tokenizer(record_texts(records[number] for number in range(30)))
    tokenizer.save_pretrained(folder / "tokenizer")
    params = Qwen2_5VL(model_config(config.model, len(tokenizer))).init(jax.random.key(seed))
    start = special_tokens(tokenizer).latent_start  # so that it looks
    params["decoder"]["lm_head"] = params["decoder"]["lm_head"].at[start].multiply(8.0)
    zero = jnp.int32(0)
    state = TrainState(jnp.int32(5), params, (), None, jax.random.key(0), zero, zero)
    with Checkpoints(stage_folder(folder, "stage1"), keep=1) as checkpoints:
        checkpoints.save(5, state, NoData())
    return folder


SKETCH_SIDE = 4  # cells along a side of the sketches of a `sketch_run`


def sketch_run(folder: Path, **changes) -> Path:
    """Returns an untrained run whose looks are sketches of maps of 3 and 4 cells a side; `section__key` are changed."""
    run = untrained_run(folder)
    fields = json.loads((run / "config.json").read_text())
    lake = {"looks": "distances", "levels": [3, SKETCH_SIDE], "read_out": "none", "readings": 0.4}
    fields["data"]["frozen_lake"] |= lake
    fields["latents"] |= {"latent_size": SKETCH_SIDE**2, "selection": "dense", "image_visibility": "until_look"}
    for name, value in changes.items():
        section, key = name.split("__")
        fields[section][key] = value
    (run / "config.json").write_text(json.dumps(fields))
    return run


class NoData:
    """A place in the data for a checkpoint that needs none."""

    def get_state(self):
        return {}
