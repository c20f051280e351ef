"""Samples, batches and gradients for tests of train steps."""

import dataclasses
import functools

import jax
import numpy as np

from ilvr_jax.config.schema import LatentsConfig, StageConfig
from ilvr_jax.method.layout import collate, merge_layouts, required_layout
from ilvr_jax.method.objectives import OBJECTIVES
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from ilvr_jax.training.step import loss_and_gradients
from tests.samples import CONFIG, GEOMETRY, SPECIAL, random_sample

LATENTS = LatentsConfig(latent_size=3, candidates=5, tau=0.9)
KEY = jax.random.key(5)


def samples():
    rng = np.random.default_rng(4)
    shapes = [((5, 3, 4), ((2, 3),)), ((2, 4), ((1, 1), (2, 2))), ((9,), ((3, 1),)), ((1, 0, 2), ((2, 2),))]
    return [random_sample(rng, texts, images=images, record=n) for n, (texts, images) in enumerate(shapes)]


def lay_out(rows):
    layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in samples()])
    return collate(rows, layout, SPECIAL, GEOMETRY)


@functools.cache
def program(name, accumulation, **changes):
    """Return what computes a batch's mean loss and its gradients, and the student and the teacher that it takes."""
    model = Qwen2_5VL(dataclasses.replace(CONFIG, **changes))
    params = model.init(jax.random.key(0))
    teacher = {"decoder": model.init(jax.random.key(1))["decoder"]}
    train = ("vision", "decoder")

    def compute(params, teacher, batch):
        objective = OBJECTIVES[name].loss
        rows, gradients = loss_and_gradients(
            objective, train, accumulation, model, params, teacher, batch, LATENTS, KEY
        )
        return rows.loss.mean(), gradients

    return jax.jit(compute), params, teacher


def gradients(name, batch, accumulation=1, **changes):
    compute, *parameters = program(name, accumulation, **changes)
    return compute(*parameters, batch)


def assert_same(first, second):
    np.testing.assert_allclose(first[0], second[0], atol=1e-4)
    for one, other in zip(jax.tree.leaves(first[1]), jax.tree.leaves(second[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def stage(**changes) -> StageConfig:
    defaults = {
        "objective": "alignment",
        "train": ("decoder",),
        "batch_size": 4,
        "accumulation": 1,
        "steps": 10,
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "beta2": 0.99,
        "clip": 1.0,
    }
    return StageConfig(**{**defaults, **changes})
