"""Parameters and prompts for tests of decoding."""

import dataclasses

import jax
import numpy as np

from ilvr_jax.config.schema import SamplingParams
from ilvr_jax.inference.requests import Request
from ilvr_jax.method.layout import collate, merge_layouts, required_layout
from ilvr_jax.models.qwen2_5_vl.model import Qwen2_5VL
from tests.samples import CONFIG, GEOMETRY, SPECIAL, prompt_of, random_sample

MODEL = Qwen2_5VL(CONFIG)
SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}


def make_request(prompt, max_new_tokens: int, latent_size: int, **changes) -> Request:
    """Return a request; `changes` are its fields or those of its sampling."""
    return changed(Request(prompt, SamplingParams(max_new_tokens), latent_size), **changes)


def changed(request: Request, **changes) -> Request:
    """Return a request with other fields, its own or those of its sampling."""
    sampling = {name: changes.pop(name) for name in SAMPLING & changes.keys()}
    sampling = dataclasses.replace(request.sampling, **sampling)
    return dataclasses.replace(request, **{"sampling": sampling} | changes)


def eager_to_look(scale: float = 3.0):
    """Return parameters under which `latent_start` is likely, so that latent mode occurs."""
    params = MODEL.init(jax.random.key(3))
    params["decoder"]["lm_head"] = params["decoder"]["lm_head"].at[SPECIAL.latent_start].multiply(scale)
    return params


PARAMS = eager_to_look()


def prompts():
    rng = np.random.default_rng(6)
    shapes = [((2, 3),), ((1, 1), (3, 2)), (), ((4, 1),), ((1, 2),)]
    return [prompt_of(random_sample(rng, (2,), 3, images)) for images in shapes]


def lay_out(rows):
    layout = merge_layouts([required_layout(sample, GEOMETRY) for sample in rows])
    return collate(rows, layout, SPECIAL, GEOMETRY)
